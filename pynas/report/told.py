"""What a run's folder tells, read once for all sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import cost_models
from pynas.plots import style
from pynas.registry import SearchSpace
from pynas.results import Run, read_candidates
from pynas.settings import LATER
from pynas.training.run import RunFolder


@dataclasses.dataclass(frozen=True)
class Told:
    """A run, finished or not.

    Args:
        folder: Of the run.
        name: As it was given.
    """

    folder: RunFolder
    name: str

    @staticmethod
    def of(run: Run | str | Path) -> Told:
        """Opens a run. Raises FileNotFoundError or ValueError where there is none, or its settings are broken."""
        path = run.folder if isinstance(run, Run) else Path(run)
        told = Told(RunFolder.open(path), str(run.folder if isinstance(run, Run) else run))
        strategy = told.config.get("strategy")
        if not isinstance(strategy, Mapping) or "name" not in strategy or "space" not in told.config:
            raise ValueError(f"{path / 'config.yaml'} is not that of a search: it lacks space or strategy.")
        return told

    @cached_property
    def config(self) -> dict[str, Any]:
        """What was asked."""
        return {**LATER, **self.folder.config()}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and machine; empty where nobody noted them."""
        found: dict[str, Any] = self.folder.read_json("env.json") or {}
        return found

    @cached_property
    def run(self) -> Run | None:
        """The finished search; none before networks were derived."""
        judged = read_candidates(self.folder)
        return Run.of(self.folder, judged, self.figures) if judged else None

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The final figures; empty before the found network is trained."""
        found: dict[str, Any] = self.folder.read_json("result.json") or {}
        return found

    @cached_property
    def space(self) -> SearchSpace:
        """Where was searched."""
        return style.space_of(self.folder)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """What the search logged, an entry an epoch."""
        return self.folder.metrics("search")

    @cached_property
    def device(self) -> cost_models.LatencyTable | None:
        """The latency table of the run; none where its folder holds none."""
        path = self.folder.path / "device"
        return cost_models.load_folder(path) if path.is_dir() else None

    @property
    def strategy(self) -> str:
        """Its name."""
        return str(self.config["strategy"]["name"])

    @property
    def epochs(self) -> int:
        """Of the search, as asked."""
        return int(self.config["strategy"]["settings"].get("epochs", 0))

    @property
    def seconds(self) -> float:
        """Of searching so far, by the clock."""
        return float(sum(line.get("seconds", 0.0) for line in self.lines))

    @property
    def status(self) -> str:
        """How far the run is."""
        if self.figures:
            return "finished"
        if self.run is not None:
            return "searched, not trained"
        return f"searching, epoch {len(self.lines)} of {self.epochs}" if self.lines else "begun"

    @property
    def where(self) -> str:
        """The device in words."""
        return "this host" if self.config["device"] == "host" else str(self.config["device"])
