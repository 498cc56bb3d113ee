"""Which runs there are, and how far they are."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path

from pynas.console import Show
from pynas.report.parts import number, percent
from pynas.report.told import Told


@dataclass(frozen=True)
class Listed:
    """A run in a list.

    Args:
        folder: Of the run.
        status: How far it is, or why it cannot be read.
        strategy: Its name.
        space: Searched.
        device: Whose latency.
        accuracy: Of the best network between 0 and 1: on test images once it is trained, else on held-out ones.
        latency_ms: Predicted of the best network; none before the search is done, and where branches are counted.
        changed: Last change of its logs, in seconds since 1970.
    """

    folder: Path
    status: str
    strategy: str = ""
    space: str = ""
    device: str = ""
    accuracy: float | None = None
    latency_ms: float | None = None
    changed: float = 0.0


def runs(folder: str | Path = "runs", *, quiet: bool = False) -> list[Listed]:
    """Lists the runs in a folder with their status, the oldest first.

    Args:
        folder: That holds run folders; those of a comparison count, too.
        quiet: Prints nothing.

    Returns:
        What was found. A run that cannot be read is among it, with the reason as its status.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    parent = Path(folder)
    if not parent.is_dir():
        raise FileNotFoundError(f"There is no folder {parent}. Start a search (pynas search), or name another folder.")
    places = [parent] if (parent / "config.yaml").is_file() else sorted(parent.iterdir())
    found = [_listed(place) for place in places if (place / "config.yaml").is_file()]
    show = Show(quiet)
    if not found:
        show.line(f"There is no run in {parent}. Start one with: pynas search --out {parent}")
        return found
    columns = ("run", "status", "strategy", "space", "device", "best", "ms", "last change")
    show.table(
        "Runs", columns, [_row(run) for run in found], note="best: test accuracy of finished runs, else held out"
    )
    return found


def _listed(place: Path) -> Listed:
    changed = max(path.stat().st_mtime for path in (place, *place.glob("*.json*"), *place.glob("checkpoints/*")))
    try:
        told = Told.of(place)
        status, run, figures = told.status, told.run, told.figures
        accuracy = figures.get("test_accuracy")
        cost = figures.get("predicted_ms")
        if run is not None and not figures:
            accuracy = run.candidates[0].accuracy
            cost = run.candidates[0].cost if run.best.search_space().choices()[0].pick == "one" else None
        if accuracy is None and told.lines:
            logged = [max(line["accuracies"]) for line in told.lines if line.get("accuracies")]
            accuracy = logged[-1] if logged else None
        return Listed(place, status, told.strategy, str(told.config["space"]), told.where, accuracy, cost, changed)
    except (ValueError, OSError, KeyError) as error:
        return Listed(place, f"cannot be read: {error}", changed=changed)


def _row(run: Listed) -> tuple[str, ...]:
    best = (percent(run.accuracy), number(run.latency_ms, ".3g"))
    return (str(run.folder), run.status, run.strategy, run.space, run.device, *best, _ago(run.changed))


def _ago(moment: float) -> str:
    seconds = time.time() - moment
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min ago"
    return datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
