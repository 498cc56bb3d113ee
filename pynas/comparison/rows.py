"""What a finished run says for a comparison: its curve over computation, its child, its sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pynas.plan import Plan
from pynas.results import Run
from pynas.strategies.children import FILE as CHILDREN
from pynas.supernet import Supernet
from pynas.training.feed import Feed
from pynas.training.judge import Judging
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels
from pynas.training.where import available

FILE = "compared.json"  # in the folder of a run: what can only be told while its data are open
HELD_OUT, TRAINING = "held-out images", "training batches"


@dataclass(frozen=True)
class Point:
    """A run after an epoch.

    Args:
        gradients: Gradient computations so far.
        seconds: Of searching so far, by the clock.
        accuracy: Of the search network, or for random search of the best network so far.
        child: Of the child without retraining, batch norms recalibrated, where it was watched.
        entropy: Of the distribution over architectures: nats a choice, of ENAS nats a decision.
    """

    gradients: int
    seconds: float
    accuracy: float | None
    child: float | None
    entropy: float | None


@dataclass(frozen=True)
class Row:
    """A run. Accuracies are between 0 and 1; None where a strategy or a setting gives none.

    Args:
        label: Of the strategy with its settings.
        strategy: Its registered name.
        seed: Of the run.
        folder: Name of the run's folder.
        net: The found network.
        gradients: Gradient computations of the search.
        retrain_gradients: Of training the found network alone; none if it was not.
        forward_passes: Batches without a backward pass, where the strategy counts them.
        seconds: Of the search, by the clock.
        search_accuracy: Of the whole search network at the end, on held-out images.
        child_accuracy: Of the found network, on test images, without retraining: with the search's weights and
            recalibrated batch norms.
        child_accuracy_without_recalibration: Likewise, with batch norms as the search left them.
        trained_accuracy: Of the found network trained from scratch, on test images.
        entropy: At the end.
        params: Of the found network.
        macs: For an image.
        predicted_ms: Latency by the table of the device that was asked for.
        latency: Where that comes from.
        measured_ms: Of the whole network, where the device is this host.
        curve: After every epoch.
        curve_source: Which images the accuracies of the curve are of.
    """

    label: str
    strategy: str
    seed: int
    folder: str
    net: str
    gradients: int
    retrain_gradients: int | None
    forward_passes: int | None
    seconds: float
    search_accuracy: float | None
    child_accuracy: float | None
    child_accuracy_without_recalibration: float | None
    trained_accuracy: float | None
    entropy: float | None
    params: int | None
    macs: int | None
    predicted_ms: float
    latency: str
    measured_ms: float | None
    curve: tuple[Point, ...]
    curve_source: str


def note(plan: Plan, run: RunFolder, found: Run) -> None:
    """Judges the child on test images, and keeps that and what the run computed in its folder."""
    config, strategy = plan.config, plan.strategy
    feed = Feed(plan.data, batch_size=strategy.batch_size, seed=config["seed"])
    alone = Feed(plan.data, batch_size=plan.recipe.batch_size, seed=config["seed"], pool="train")
    # A pass of random search that found too few networks in the budget to try has no steps.
    passes = [
        strategy.gradient_passes(feed, epoch) if "loss" in line else 0
        for epoch, line in enumerate(run.metrics("search"))
    ]
    images = plan.recipe.epochs * alone.steps_weights * plan.recipe.batch_size
    run.write_json(
        FILE,
        {
            "gradients": [sum(passes[: epoch + 1]) * strategy.batch_size for epoch in range(len(passes))],
            "retrain_gradients": images if config["retrain"] else None,
            "latency": plan.device.describe(),
            "sources": dict(plan.table.sources),
            **_tested(plan, run, found),
        },
    )


def _tested(plan: Plan, run: RunFolder, found: Run) -> dict[str, float | None]:
    """The child on test images with the weights of the search, where the search has any."""
    names = ("child_accuracy_without_recalibration", "child_accuracy")
    state = (run.load_checkpoint("search") or {}).get("task", {})
    if "net" not in state:
        return dict.fromkeys(names)
    net = Supernet(plan.space)
    net.load_state_dict(state["net"])
    net.to(available(plan.config["train_on"]))
    told: dict[str, float | None] = {}
    for name, calibrate in zip(names, (0, getattr(plan.strategy, "calibrate", 0) or 512), strict=True):
        how = Judging(calibrate=calibrate, amp=plan.config["amp"])
        judges = Submodels(net, plan.data, images=plan.data.test, how=how, processes=1)
        told[name] = judges.scores([found.best])[0].accuracy
    return told


def read_row(label: str, run: RunFolder) -> Row:
    """Reads a finished run. Raises ValueError when a file is broken."""
    config, told, found = run.config(), run.read_json(FILE), Run.open(run.path)
    lines, figures = run.metrics("search"), found.figures
    curve, source = _curve(lines, told["gradients"])
    best = found.candidates[0]
    counted = lines[-1].get("computed", {})
    fitted = told["sources"].get("fitted", 0)
    return Row(
        label,
        config["strategy"]["name"],
        config["seed"],
        run.path.name,
        str(best.architecture),
        told["gradients"][-1],
        told["retrain_gradients"],
        counted.get("forward_passes"),
        curve[-1].seconds,
        (run.read_json(CHILDREN) or {}).get("search_accuracy"),
        told["child_accuracy"],
        told["child_accuracy_without_recalibration"],
        figures.get("test_accuracy"),
        curve[-1].entropy,
        best.params,
        best.macs,
        best.cost,
        told["latency"] + (f"; {fitted} of its ops fitted" if fitted else ""),
        figures.get("measured_ms"),
        curve,
        source,
    )


def _curve(lines: Sequence[dict[str, Any]], gradients: Sequence[int]) -> tuple[tuple[Point, ...], str]:
    watched = any("search_accuracy" in line for line in lines)
    tried = any("accuracies" in line for line in lines)
    points, seconds = [], 0.0
    for line, done in zip(lines, gradients, strict=True):
        seconds += line["seconds"]
        if tried:
            accuracy = max(line["accuracies"], default=None)
        elif watched:
            accuracy = line.get("search_accuracy")
        else:
            accuracy = line.get("train_accuracy", line.get("weight_accuracy"))
        points.append(Point(done, round(seconds, 2), accuracy, line.get("child_accuracy"), _entropy(line)))
    return tuple(points), HELD_OUT if watched or tried else TRAINING


def _entropy(line: dict[str, Any]) -> float | None:
    if "controller_entropy" in line:
        found: float = line["controller_entropy"] / max(1, line["controller_decisions"])
        return found
    return line.get("mean_entropy", _mean(line.get("entropy")))


def _mean(values: Sequence[float] | None) -> float | None:
    return math.fsum(values) / len(values) if values else None


# What a target costs


@dataclass(frozen=True)
class Usable:
    """When a strategy had a network of the target accuracy, searches with further seeds counted as restarts.

    Args:
        gradients: Gradient computations until then, all searches and trainings before included.
        how: In words.
    """

    gradients: int
    how: str


def reached(row: Row, target: float) -> int | None:
    """Gradient computations after which a curve first has the target accuracy; None where it never has."""
    return next((p.gradients for p in row.curve if p.accuracy is not None and p.accuracy >= target), None)


def usable(rows: Sequence[Row], target: float | None) -> Usable | None:
    """Computation until a network can be used, for the runs of one strategy in the order of their seeds.

    A child is usable without retraining if it has the target accuracy on test images; else it is trained, which costs
    its computation; if that fails, too, the next seed is a restart. Without a target the first trained network, or
    where none is trained the first child, counts.
    """
    total = 0
    for number, row in enumerate(rows):
        after = f", after {number} restart{'s' * (number != 1)}" if number else ""
        total += row.gradients
        if _enough(row.child_accuracy, target) and (target is not None or row.trained_accuracy is None):
            return Usable(total, f"without retraining{after}")
        if row.retrain_gradients is not None:
            total += row.retrain_gradients
            if _enough(row.trained_accuracy, target):
                return Usable(total, f"retrained{after}")
    return None


def _enough(accuracy: float | None, target: float | None) -> bool:
    return accuracy is not None and (target is None or accuracy >= target)
