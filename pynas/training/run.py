"""A run is a folder, complete by itself: what was asked, on what machine, what happened, what was found."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from cost_models.files import write_atomic

PACKAGES = ("pynas", "torch", "torchvision", "numpy", "scipy", "onnx", "onnxruntime")


class RunFolder:
    """Reads and writes the files of one run; every write is atomic.

    `config.yaml` what was asked; `env.json` versions and machine; `metrics.jsonl` one line per finished epoch, `tb/`
    the same for TensorBoard where it is installed; `checkpoints/<stage>.pt`; `theta.npy` theta after every epoch;
    `submodels.jsonl` scores of networks with shared weights; `architectures.jsonl` derived networks; `best.json` the
    best; `pareto.png` the Pareto set; `model/` trained weights, `nets/<number>/model/` those of other networks of the
    set; `trained.jsonl` accuracies of what was trained alone; `export/` what is deployed; `result.json` the final
    figures; `ranking.json` what `pynas rank` found; `report.html` the page. `device/`, `elsewhere/` and, for a budget
    in ms, `training-steps/` are copies of tables.

    Args:
        path: Of a folder that exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._boards: dict[str, Any] = {}

    @staticmethod
    def create(out: str | Path, config: Mapping[str, Any], name: str | None = None) -> RunFolder:
        """Makes a folder in `out`, the next numbered one or that of a name, and writes what was asked.

        Raises:
            OSError: If the folder cannot be made or written.
        """
        parent = Path(out)
        settings = yaml.safe_dump(dict(config), sort_keys=False)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = _next_folder(parent) if name is None else parent / name
            (path / "checkpoints").mkdir(parents=name is not None, exist_ok=name is not None)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"Cannot write runs to {parent}: {reason}. Choose another folder with --out.") from None
        run = RunFolder(path)
        write_atomic(path / "config.yaml", settings)
        run.write_json("env.json", environment())
        return run

    @staticmethod
    def open(path: str | Path) -> RunFolder:
        """An existing run. Raises FileNotFoundError or ValueError when there is none there, or its config is broken."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(
                f"There is no run at {path}: it has no config.yaml. Give a folder such as runs/0001."
            )
        run = RunFolder(path)
        run.config()
        return run

    def config(self) -> dict[str, Any]:
        """What was asked. Raises ValueError when the file is broken."""
        path = self.path / "config.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is broken: {' '.join(str(error).split())}. Start the search anew.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is broken: it holds no settings. Start the search anew.")
        return content

    # Logs

    def log(self, stage: str, epoch: int, record: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`, replacing what an interrupted attempt at the same epoch left."""
        kept = [line for line in self.metrics() if not (line["stage"] == stage and line["epoch"] >= epoch)]
        kept.append({"stage": stage, "epoch": epoch, **record})
        self.write_lines("metrics.jsonl", kept)
        writer = self._board(stage)
        if writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, epoch)
            writer.flush()

    def _board(self, stage: str) -> Any:
        """TensorBoard's writer of a stage, or None where the package is not installed."""
        if stage not in self._boards:
            self._boards[stage] = None
            if find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._boards[stage] = SummaryWriter(str(self.path / "tb" / stage))
        return self._boards[stage]

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`, of one stage or all."""
        lines = self.read_lines("metrics.jsonl")
        return [line for line in lines if stage is None or line["stage"] == stage]

    def close(self) -> None:
        """Ends what is open for logging; the next `log` opens it again."""
        for writer in self._boards.values():
            if writer is not None:
                writer.close()
        self._boards.clear()

    # Checkpoints

    def checkpoint_path(self, stage: str) -> Path:
        """Where a stage's checkpoint is."""
        return self.path / "checkpoints" / f"{stage}.pt"

    def save_checkpoint(self, stage: str, state: Mapping[str, Any]) -> None:
        """Writes a state of tensors and plain values."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomic(self.checkpoint_path(stage), buffer.getvalue())

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
        """The state of a stage, its tensors on the CPU wherever they were, or None before its first checkpoint.

        Raises:
            ValueError: The file is broken.
        """
        path = self.checkpoint_path(stage)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a broken file
            raise ValueError(
                f"The checkpoint {path} is broken ({type(error).__name__}). Remove it to begin this stage anew."
            ) from error
        if not isinstance(state, dict) or "task" not in state:
            raise ValueError(f"The checkpoint {path} is not one of pynas. Remove it to begin this stage anew.")
        return state

    # Other files

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file into the folder."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Content of a JSON file of the folder, or None when it is not there. Raises ValueError when it is broken."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is broken: {error}. Remove it and resume.") from None

    def write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        """Writes a file of one JSON object a line."""
        write_atomic(self.path / name, "".join(json.dumps(record) + "\n" for record in records))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Objects of such a file; none when it is not there. Raises ValueError when a line is broken."""
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise ValueError(f"{path}, line {number} is broken. Remove the line and resume.") from None
        return records

    def write_array(self, name: str, array: NDArray[Any]) -> None:
        """Writes a .npy file."""
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_atomic(self.path / name, buffer.getvalue())


def _next_folder(parent: Path) -> Path:
    """Makes a new numbered folder; two runs that start at once get two."""
    for _ in range(1000):
        numbers = [int(entry.name) for entry in parent.iterdir() if re.fullmatch(r"\d{4,}", entry.name)]
        path = parent / f"{max(numbers, default=0) + 1:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise OSError(f"Cannot number a new run in {parent}.")


def environment() -> dict[str, Any]:
    """Versions and machine, for `env.json`."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "id": uuid.uuid4().hex[:12],
    }
