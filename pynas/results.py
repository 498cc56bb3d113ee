"""What the functions of the front door return."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from cost_models.files import write_atomic
from pynas.architecture import Architecture
from pynas.card import model_card
from pynas.hub import Pretrained, write_pretrained
from pynas.strategies import Candidate
from pynas.training.data import Data
from pynas.training.run import RunFolder


@dataclass(frozen=True)
class Run:
    """A finished search.

    Args:
        folder: Where everything is.
        best: The best network within the budget.
        candidates: All derived networks, best first; with objectives the Pareto set, most accurate first.
        judged: These, and what else was judged with shared weights on the way to a Pareto set.
        figures: The final figures: accuracies, params, MACs, latencies and where they come from, baseline, export.
    """

    folder: Path
    best: Architecture
    candidates: tuple[Candidate, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    judged: tuple[Candidate, ...] = field(default=(), repr=False)

    @property
    def trained(self) -> tuple[Alone, ...]:
        """The networks that were trained alone in this run so far, as a truth for `pynas.rank`.

        Only one recipe's can be compared: that of most networks, of several such the last one used.
        """
        return read_trained(RunFolder(self.folder))

    def save_pretrained(self, folder: str | Path, *, net: int | None = None) -> Path:
        """Writes a trained network as a folder to share: weights (safetensors), config.json and a model card.

        `pynas.from_pretrained(folder)` gives the network back, the same to the last bit; so does timm, after `import
        pynas`, by `timm.create_model("local-dir:<folder>", pretrained=True)`.

        Args:
            folder: New, empty, or written by this before.
            net: Instead of the best another of the networks that the run found, by its number.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: If the network was not trained; names the command.
            ValueError: If there is no such network; if it is a function of yours, which cannot be rebuilt from data; or
                if the folder holds other files.
        """
        if net is not None and (isinstance(net, bool) or not 1 <= net <= len(self.candidates)):
            raise ValueError(f"The run found {len(self.candidates)} networks; there is none of number {net}.")
        saved = load_model(net_folder(self.folder, 1 if net is None else net))
        same = self.figures.get("fingerprint") == saved.architecture.fingerprint
        asked = RunFolder(self.folder).config()
        facts = saved.facts
        card = model_card(saved.architecture, saved.classes, facts, self.figures if same else {}, asked)
        pretrained = Pretrained(saved.net, saved.architecture, saved.classes, saved.mean, saved.std, facts)
        return write_pretrained(folder, pretrained, card)

    @staticmethod
    def open(path: str | Path) -> Run:
        """Reads a run from its folder. Raises ValueError when its search has not finished."""
        folder = RunFolder.open(path)
        judged = read_candidates(folder)
        if not judged:
            raise ValueError(f"The search in {path} has not finished. Go on with: pynas search --resume {path}")
        return Run.of(folder, judged, folder.read_json("result.json") or {})

    @staticmethod
    def of(folder: RunFolder, judged: Sequence[Candidate], figures: Mapping[str, Any]) -> Run:
        """A run of what its folder holds."""
        found = tuple(candidate for candidate in judged if candidate.front)
        return Run(folder.path, found[0].architecture, found, figures, tuple(judged))


def read_candidates(folder: RunFolder) -> list[Candidate]:
    """Networks of a run, the found ones first and of them the best; none before the search is done."""
    found = []
    try:
        for record in folder.read_lines("architectures.jsonl"):
            architecture = Architecture(record["space"], record["choices"], record["options"])
            told = [record[name] for name in ("accuracy", "cost", "origin")]
            later = [record.get("macs"), record.get("params"), record.get("front", True)]  # older runs lack them
            found.append(Candidate(architecture, *told, *later))
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
            "macs": c.macs,
            "params": c.params,
            "front": c.front,
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
        folder: Its `model/` holds the weights: a run, or `nets/<number>` of one.
    """

    model: nn.Module
    architecture: Architecture
    accuracy: float
    images: int
    folder: Path | None = None


@dataclass(frozen=True)
class Alone:
    """Trainings of one network alone, by one recipe.

    Args:
        architecture: What it is.
        accuracy: On the test images, between 0 and 1; the mean over seeds.
        seeds: Of the trainings.
        recipe: `pynas.Recipe` as plain values.
    """

    architecture: Architecture
    accuracy: float
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any] = field(repr=False)


def note_trained(folder: RunFolder, stage: str, record: Mapping[str, Any]) -> None:
    """Adds a finished training to `trained.jsonl`. What another attempt of the same stage left gives way to it."""
    lines, new = folder.read_lines("trained.jsonl"), {"stage": stage, **record}
    if new not in lines:  # a stage that a break made run twice stays where it is
        folder.write_lines("trained.jsonl", [*(line for line in lines if line["stage"] != stage), new])


def read_trained(folder: RunFolder) -> tuple[Alone, ...]:
    """See `Run.trained`. Raises ValueError when the file is broken."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    trainings = folder.read_lines("trained.jsonl")
    try:
        for line in trainings:
            recipe = groups.pop(told := json.dumps(line["recipe"], sort_keys=True), {})
            recipe.setdefault(line["net"], []).append(line)
            groups[told] = recipe  # moves to the end
        chosen: dict[str, list[dict[str, Any]]] = max(reversed(list(groups.values())), key=len, default={})
        return tuple(
            Alone(
                Architecture.from_json(net),
                math.fsum(line["accuracy"] for line in lines) / len(lines),
                tuple(line["seed"] for line in lines),
                lines[0]["recipe"],
            )
            for net, lines in chosen.items()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder.path / 'trained.jsonl'} is broken ({error}). Remove it and train again.") from None


@dataclass(frozen=True)
class SavedModel:
    """What lies in `model/` of a run.

    Args:
        net: With its weights, in eval mode.
        architecture: What it is.
        classes: Names, in the order of the logits.
        mean: Of each channel, as images were normalised.
        std: Of each channel.
        folder: A run, or `nets/<number>` of one: where it lies and is exported.
        facts: Of its training: test_accuracy, test_images, data.
    """

    net: nn.Module
    architecture: Architecture
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_size(self) -> int:
        """Height and width of the image, in pixels."""
        return self.architecture.search_space().input_size


def net_folder(run: Path, number: int) -> Path:
    """Where the weights of a network of the Pareto set lie, by its number; those of the first are the run's own."""
    return run if number == 1 else run / "nets" / str(number)


def run_of(folder: Path) -> Path:
    """The run that a `net_folder` is of."""
    return folder.parents[1] if folder.parent.name == "nets" else folder


def save_model(folder: Path, trained: Trained, data: Data) -> None:
    """Writes `model/` into a folder: weights as safetensors, and what is needed to use them."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
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
    write_atomic(folder / "model" / "model.safetensors", save_tensors(state))
    RunFolder(folder).write_json("model/config.json", config)


def load_model(folder: str | Path) -> SavedModel:
    """Reads `model/` of a run, or of a network of its Pareto set.

    Raises:
        FileNotFoundError: If nothing was trained in the run.
        ValueError: If a file is broken.
    """
    path, run = Path(folder) / "model", run_of(Path(folder))
    again = f"pynas retrain {run}" + (f" --net {Path(folder).name}" if run != Path(folder) else "")
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"There is no trained network in {path}. Train one with: {again}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = Architecture.from_json(config["architecture"])
        net = architecture.build()
        net.load_state_dict(load_tensors((path / "model.safetensors").read_bytes()))
        labels = tuple(config["classes"])
        (r, g, b), (dr, dg, db) = config["mean"], config["std"]
        mean, std = (float(r), float(g), float(b)), (float(dr), float(dg), float(db))
        facts = {name: config[name] for name in ("test_accuracy", "test_images", "data")}
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"The trained network in {path} is broken ({first}). Train again: {again}") from None
    return SavedModel(net.eval(), architecture, labels, mean, std, Path(folder), facts)
