"""What the functions of the front door return."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from cost_models.files import write_atomic
from pynas.architecture import Architecture
from pynas.strategies import Candidate
from pynas.training.data import Data
from pynas.training.run import RunFolder


@dataclass(frozen=True)
class Run:
    """A finished search.

    Args:
        folder: Where everything is.
        best: The best network within the budget.
        candidates: All derived networks, best first.
        figures: The final figures: accuracies, params, MACs, latencies and where they come from, baseline, export.
    """

    folder: Path
    best: Architecture
    candidates: tuple[Candidate, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: str | Path) -> Run:
        """Reads a run from its folder. Raises ValueError when its search has not finished."""
        folder = RunFolder.open(path)
        candidates = tuple(read_candidates(folder))
        if not candidates:
            raise ValueError(f"The search in {path} has not finished. Go on with: pynas search --resume {path}")
        return Run(folder.path, candidates[0].architecture, candidates, folder.read_json("result.json") or {})


def read_candidates(folder: RunFolder) -> list[Candidate]:
    """Derived networks of a run, best first; none before the search is done."""
    found = []
    try:
        for record in folder.read_lines("architectures.jsonl"):
            architecture = Architecture(record["space"], record["choices"], record["options"])
            found.append(Candidate(architecture, record["accuracy"], record["cost"], record["origin"]))
    except (KeyError, TypeError) as error:
        path = folder.path / "architectures.jsonl"
        raise ValueError(f"{path} is broken (it lacks {error}). Remove it and resume the run.") from None
    return found


def write_candidates(folder: RunFolder, candidates: list[Candidate]) -> None:
    """Writes `architectures.jsonl` and `best.json`."""
    records = [
        {
            "accuracy": c.accuracy,
            "cost": c.cost,
            "origin": c.origin,
            "space": c.architecture.space,
            "choices": {name: list(options) for name, options in c.architecture.choices.items()},
            "options": dict(c.architecture.options),
        }
        for c in candidates
    ]
    candidates[0].architecture.save(folder.path / "best.json")
    folder.write_lines("architectures.jsonl", records)


@dataclass(frozen=True)
class Trained:
    """A network trained alone.

    Args:
        model: In eval mode.
        architecture: What it is.
        accuracy: On the test images, between 0 and 1.
        images: Number of test images.
        folder: Where its weights are.
    """

    model: nn.Module
    architecture: Architecture
    accuracy: float
    images: int
    folder: Path | None = None


@dataclass(frozen=True)
class SavedModel:
    """What lies in `model/` of a run.

    Args:
        net: With its weights, in eval mode.
        architecture: What it is.
        classes: Names, in the order of the logits.
        mean: Of each channel, as images were normalised.
        std: Of each channel.
    """

    net: nn.Module
    architecture: Architecture
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def input_size(self) -> int:
        """Height and width of the image, in pixels."""
        return self.architecture.search_space().input_size


def save_model(run: RunFolder, trained: Trained, data: Data) -> None:
    """Writes `model/`: weights as safetensors, and what is needed to use them."""
    (run.path / "model").mkdir(exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    config = {
        "architecture": trained.architecture.to_json(),
        "classes": list(data.classes),
        "mean": [float(value) for value in data.mean],
        "std": [float(value) for value in data.std],
        "test_accuracy": trained.accuracy,
        "test_images": trained.images,
        "data": data.name,
    }
    write_atomic(run.path / "model" / "model.safetensors", save_tensors(state))
    run.write_json("model/config.json", config)


def load_model(folder: str | Path) -> SavedModel:
    """Reads `model/` of a run.

    Raises:
        FileNotFoundError: If nothing was trained in the run.
        ValueError: If a file is broken.
    """
    path = Path(folder) / "model"
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"There is no trained network in {path}. Train one with: pynas retrain {folder}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = Architecture.from_json(config["architecture"])
        net = architecture.build()
        net.load_state_dict(load_tensors((path / "model.safetensors").read_bytes()))
        labels = tuple(config["classes"])
        (r, g, b), (dr, dg, db) = config["mean"], config["std"]
        mean, std = (float(r), float(g), float(b)), (float(dr), float(dg), float(db))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The trained network in {path} is broken ({first}). Train again: pynas retrain {folder}"
        ) from None
    return SavedModel(net.eval(), architecture, labels, mean, std)
