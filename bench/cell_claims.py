"""SNAS's claims, tried small: children without retraining, edges that a cost prunes, found cells trained again.

    python bench/cell_claims.py IMAGES OUT [PIECE ...]

IMAGES is an image folder (train/<class>/*, val/<class>/*) of CIFAR-10, OUT a folder for runs and results. Pieces:
"snas-0.01:0", an arm and a seed, searches and writes OUT/<arm>-<seed>.json; "retrain-snas-0.01:0" trains the cells that
this search found in a larger network and writes OUT/retrain-<arm>-<seed>.json. All by default, seed by seed. A piece
goes on where it was broken off, also in its midst, and may run beside others; a retraining needs its search to be done.
`python bench/cell_claims_report.py OUT` reads them. CELL_CLAIMS_TINY=1 shrinks everything to seconds, to try the
machinery; its results are never mixed with others.

Fixed before looking at any accuracy, by measured time alone (`FULL` below): the space `cell` with all 14 edges and 8
operations, 4 cells of 8 channels, images at 16 pixels; 40,000 of the 50,000 training images for the weights, 10,000
held out for the architecture, batch 64. Every search has 384 gradient computations, a batch through a backward pass of
the whole supernet each: 1,152 steps, but 576 of bi-level DARTS, whose steps take one for alpha and one for the weights
(384 and 192 before the fused edges, which make a step three times as fast; nothing of that length was looked at).
Weights: SGD, 0.05 to 0.001 by a cosine, momentum 0.9, decay 3e-4, clip 5. Alpha: Adam 0.02, decay 1e-3. No drop-path.
Seeds 0, 1 and 2.

Arms: "snas-<eta>" in one level, eta on the logarithms of the three resource measures by reparametrization, temperature
1 to 0.03, child by arg-max with `none`. At the start the gradients of loss and cost are equally long at an eta of about
0.06 (seed 99, which is not used); hence none, the released code's 0.01, about that, and five times that. "darts"
bi-level in first order, and "single", the same on one batch in one level, child by the two strongest edges of a node.
"uniform", weights trained under alpha = 0, child the best on held-out images of 16 uniform draws. Every child is judged
with its inherited weights on all 10,000 test images, which nothing else ever sees, with the running statistics of the
batch norms as they are and after 512 training images; likewise the whole search network: softmax(alpha), or for SNAS a
draw for every 250 images at the last temperature. Children of both rules of derivation are judged.

Retraining: the cells in 6 cells of 16 channels with affine norms, from scratch on all 50,000 training images, 8 epochs
at batch 96 (`pynas.Recipe` with half an epoch of warm-up), tested on the test images.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost_models.analytic import Macs
from cost_models.files import write_atomic
from pynas import concrete
from pynas.architecture import Architecture
from pynas.choices import Gates
from pynas.console import Show
from pynas.counting import count
from pynas.draw import cells_of, most_probable
from pynas.registry import SPACES, STRATEGIES, SearchSpace
from pynas.strategies.base import Problem
from pynas.strategies.children import RULES, log_probabilities
from pynas.strategies.relaxed import gates_of
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy
from pynas.training.feed import Feed, batches
from pynas.training.judge import Judging
from pynas.training.loop import Progress, train
from pynas.training.optim import fast_layout
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels
from pynas.training.train import Recipe, Training

ETAS = (0.0, 0.01, 0.05, 0.25)
SNAS_ARMS = tuple(f"snas-{eta:g}" for eta in ETAS)
ARMS = ("uniform", "single", "darts", *SNAS_ARMS)
RETRAINED = ("uniform", "single", "darts", "snas-0.01", "snas-0.05")
SEEDS = (0, 1, 2)
OPERATIONS = 8  # that run on an edge
DRAWS = 1 << 41  # numbers of the draws that test a search network, apart from those of the search


@dataclass(frozen=True)
class Setting:
    """The sizes of everything; a result keeps them, and results of different ones are not compared."""

    size: int = 16
    cells: int = 4
    channels: int = 8
    batch_size: int = 64
    passes: int = 1152
    parts: int = 12
    watch: int = 512
    samples: int = 16
    calibrate: int = 512
    limit: int | None = None
    large_cells: int = 6
    large_channels: int = 16
    retrain_epochs: int = 8
    retrain_batch: int = 96


FULL = Setting()
TINY = Setting(
    size=8, cells=3, channels=4, batch_size=8, passes=8, parts=4, watch=32, samples=2, calibrate=16, limit=200,
    large_cells=4, large_channels=8, retrain_epochs=2,
)  # fmt: skip
SETTING = TINY if os.environ.get("CELL_CLAIMS_TINY") == "1" else FULL


def strategy_of(arm: str, setting: Setting) -> Any:
    """The strategy of an arm."""
    common: dict[str, Any] = {
        "epochs": setting.parts,
        "batch_size": setting.batch_size,
        "weight_lr": 0.05,
        "path_gradients": setting.passes * OPERATIONS,
        "calibrate": setting.calibrate,
    }
    if arm == "uniform":
        return STRATEGIES.get("uniform")(**common, relaxation="mean", samples=setting.samples)
    common |= {"alpha_lr": 0.02, "watch_images": setting.watch}
    if arm in ("darts", "single"):
        return STRATEGIES.get("darts")(**common, order="first" if arm == "darts" else "single")
    eta = float(arm.removeprefix("snas-"))
    return STRATEGIES.get("snas")(**common, drop_path=0.0, eta=eta, objective="eta", credit=False)


class Timed:
    """A task with the CPU seconds that its steps took, which go into the checkpoint."""

    def __init__(self, task: Any) -> None:
        self.task, self.epochs, self.cpu_s = task, task.epochs, 0.0

    def steps(self, feed: Feed, epoch: int) -> int:
        return int(self.task.steps(feed, epoch))

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        began = time.process_time()
        metrics: dict[str, float] = self.task.step(feed, progress)
        self.cpu_s += time.process_time() - began
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        found: dict[str, Any] = self.task.end_epoch(epoch)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task.state_dict(), "cpu_s": self.cpu_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state["task"])
        self.cpu_s = state["cpu_s"]


def trained(task: Any, feed: Feed, folder: Path, stage: str) -> tuple[Timed, RunFolder]:
    """Trains to the end, from where it stood."""
    run, timed = RunFolder(folder), Timed(task)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    total = sum(timed.steps(feed, epoch) for epoch in range(timed.epochs))
    with Show().bar(f"{folder.name}, {stage}", total) as bar:
        train(timed, feed, run, stage, bar, "the same command")
    return timed, run


# Searching


def search(images: Path, out: Path, arm: str, seed: int, setting: Setting = SETTING) -> None:
    """Searches with one arm and one seed, and judges what it found on the test images."""
    began = time.process_time()
    space = SPACES.get("cell")(input_size=setting.size, cells=setting.cells, channels=setting.channels)
    data = open_data(images, size=setting.size, seed=0, limit=setting.limit)
    strategy = strategy_of(arm, setting)
    torch.manual_seed(seed)
    strategy.prepare(Problem(space, cost_table(space, Macs()), None, 0.1, seed))
    feed = Feed(data, batch_size=setting.batch_size, seed=seed)
    timed, folder = trained(strategy, feed, out / f"{arm}-{seed}", "search")
    candidates = strategy.derive(feed, folder)
    log_p = log_probabilities(strategy.theta)
    children = {"draw": candidates[0].architecture} if arm == "uniform" else {}
    if arm != "uniform":
        children = {rule: derive(space, log_p) for rule, derive in RULES.items()}
    own = "draw" if arm == "uniform" else strategy.rule
    record = {
        "kind": "search",
        "arm": arm,
        "seed": seed,
        "setting": dataclasses.asdict(setting),
        "computed": strategy.tally.report(),
        "search_accuracy": search_accuracy(strategy, arm, seed, data, setting),
        "rule": own,
        "children": judged(strategy.net, children, data, setting),
        "draws": [c.accuracy for c in candidates] if arm == "uniform" else [],
        "most_probable_reads_image": space.reads_image(
            {name: (option,) for name, option in most_probable(space, log_p).items()}
        ),
        "history": history(folder),
        "cells": cells(space, strategy),
        "training_cpu_s": round(timed.cpu_s, 1),
        "last_attempt_cpu_s": round(time.process_time() - began, 1),
    }
    write_atomic(out / f"{arm}-{seed}.json", json.dumps(record, indent=1) + "\n")


def search_accuracy(strategy: Any, arm: str, seed: int, data: Data, setting: Setting) -> float:
    """Accuracy of the whole search network on the test images."""
    net, theta = strategy.net.eval(), strategy.theta
    choice_of = torch.tensor(strategy.table.choice_of)

    def gates(batch: int) -> Mapping[str, Gates]:
        rows = theta.probabilities()
        if arm.startswith("snas"):
            temperature = strategy.temperature(setting.parts - 1)
            rows = concrete.draw(theta.logits, theta.mask, temperature, seed, DRAWS + batch).z[0]
        return gates_of(net.slots, rows[choice_of])

    right = total = 0
    with torch.inference_mode():
        for batch, (x, y) in enumerate(batches(data.test, 250, data)):
            right += int((net(fast_layout(x), gates(batch)).argmax(1) == y).sum())
            total += len(y)
    return right / total


def judged(net: Any, children: Mapping[str, Architecture], data: Data, setting: Setting) -> dict[str, Any]:
    """Children on the test images, with inherited weights, and their sizes, by rule."""
    found: dict[str, Any] = {}
    size, architectures = setting.size, list(children.values())
    scores = [
        Submodels(net, data, images=data.test, how=Judging(calibrate=calibrate), processes=1).scores(architectures)
        for calibrate in (0, setting.calibrate)
    ]
    for (rule, child), bare, recalibrated in zip(children.items(), *scores, strict=True):
        counts = count(child.build(), (3, size, size))
        there = cells_of(net.space, {name: options[0] for name, options in child.choices.items()})
        found[rule] = {
            "net": child.to_json(),
            "accuracy_without_recalibration": bare.accuracy,
            "accuracy": recalibrated.accuracy,
            "params": counts.params,
            "macs": counts.macs,
            "edges": {cell: len(edges) for cell, edges in there.items()},
            "nodes": {cell: len({node for _, node in edges}) for cell, edges in there.items()},
        }
    return found


def history(folder: RunFolder) -> list[dict[str, float]]:
    """What was seen after every part of the search."""
    names = ("train_accuracy", "search_accuracy", "child_accuracy_without_recalibration", "child_accuracy")
    told = []
    for line in folder.metrics("search"):
        # Those that were watched at the last step only stand in the log as they are: a mean over one value.
        seen = {name: line[name] for name in (*names, "mean_entropy", "expected_cost") if name in line}
        told.append({"gradient_passes": line["computed"]["gradient_passes"], **seen})
    return told


def cells(space: SearchSpace, strategy: Any) -> list[dict[str, str]]:
    """The most probable option of every choice after every part; none for a distribution that never moves."""
    if not hasattr(strategy, "theta_history"):
        return []
    return [most_probable(space, log_p) for log_p in strategy.theta_history()]


# Training found cells in a larger network


def retrain(images: Path, out: Path, arm: str, seed: int, setting: Setting = SETTING) -> None:
    """Trains the cells that a search found, more of them and wider, and tests them."""
    began = time.process_time()
    source = out / f"{arm}-{seed}.json"
    if not source.exists():
        sys.exit(f"The cells of {arm}:{seed} are not there yet. Search first: cell_claims.py IMAGES {out} {arm}:{seed}")
    result = json.loads(source.read_text(encoding="utf-8"))
    if result["setting"] != dataclasses.asdict(setting):
        sys.exit(f"{source} was made with other sizes ({result['setting']}). Choose another OUT.")
    found = Architecture.from_json(result["children"][result["rule"]]["net"])
    large = found.with_options(cells=setting.large_cells, channels=setting.large_channels, affine=True)
    data = open_data(images, size=setting.size, seed=0, limit=setting.limit)
    recipe = Recipe(epochs=setting.retrain_epochs, batch_size=setting.retrain_batch, warmup_epochs=0.5)
    if setting.limit is not None:
        recipe = dataclasses.replace(recipe, batch_size=min(setting.retrain_batch, setting.limit // 4))
    torch.manual_seed(seed)
    training = Training(large.build(), recipe)
    feed = Feed(data, batch_size=recipe.batch_size, seed=seed, pool="train")
    timed, folder = trained(Halves(training), feed, out / f"retrain-{arm}-{seed}", "retrain")
    counts = count(training.net, (3, setting.size, setting.size))
    record = {
        "kind": "retrain",
        "arm": arm,
        "seed": seed,
        "setting": dataclasses.asdict(setting),
        "net": large.to_json(),
        "accuracy": accuracy(training.result(), data.test, data),
        "params": counts.params,
        "macs": counts.macs,
        "gradient_passes": timed.epochs * timed.steps(feed, 0),
        "history": [
            {"loss": line["loss"], "train_accuracy": line["train_accuracy"]}
            for line in folder.metrics("retrain")
            if "loss" in line  # a part of a very short training may have no step
        ],
        "training_cpu_s": round(timed.cpu_s, 1),
        "last_attempt_cpu_s": round(time.process_time() - began, 1),
    }
    write_atomic(out / f"retrain-{arm}-{seed}.json", json.dumps(record, indent=1) + "\n")


class Halves:
    """A training whose epochs are cut in parts, so that it is checkpointed more often."""

    PARTS = 8

    def __init__(self, training: Training) -> None:
        self.training, self.epochs = training, training.epochs * self.PARTS

    def steps(self, feed: Feed, epoch: int) -> int:
        whole, part = feed.steps_weights, epoch % self.PARTS
        return whole * (part + 1) // self.PARTS - whole * part // self.PARTS

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        epoch, part = divmod(progress.epoch, self.PARTS)
        before = feed.steps_weights * part // self.PARTS
        return self.training.step(feed, Progress(epoch, before + progress.step))

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return self.training.end_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.training.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state)


# Pieces


def pieces() -> list[str]:
    """All of them, seed by seed, searches before retrainings."""
    return [
        piece
        for seed in SEEDS
        for piece in (*(f"{arm}:{seed}" for arm in ARMS), *(f"retrain-{arm}:{seed}" for arm in RETRAINED))
    ]


def parse(piece: str) -> tuple[Callable[..., None], str, int]:
    """What a piece does, of which arm and seed."""
    name, _, seed = piece.partition(":")
    arm = name.removeprefix("retrain-")
    if arm not in ARMS or not seed.isdigit():
        sys.exit(f"Unknown piece {piece!r}. Arms: {', '.join(ARMS)}; for instance darts:0 or retrain-darts:0.")
    return (retrain if name != arm else search), arm, int(seed)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    images, out = (Path(argument).resolve() for argument in sys.argv[1:3])
    todo = [(piece.replace(":", "-"), *parse(piece)) for piece in sys.argv[3:] or pieces()]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, work, arm, seed in todo:
        if not (out / f"{name}.json").exists():
            work(images, out, arm, seed)


if __name__ == "__main__":
    main()
