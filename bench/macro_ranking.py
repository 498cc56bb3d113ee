"""Does strict fairness rank networks better? Supernets on NAS-Bench-Macro's space, CIFAR-10, against its table.

    python bench/macro_ranking.py IMAGES TABLE OUT [PIECE ...] [--train-on cuda]

IMAGES is an image folder (train/<class>/*, val/<class>/*), TABLE nas-bench-macro_cifar10.json, OUT a folder for runs
and results. Pieces: "fairnas:0" ... "one_shot:2", a strategy and a seed; all by default, seed by seed. Each writes
OUT/<strategy>-<seed>.json, which says on what it trained, goes on where it was broken off, and may run beside others.
`--train-on cuda` trains and judges on a GPU. `python bench/macro_ranking_report.py` reads them.

Fixed before looking: the space `macro` at half the width (16; 32 x2, 64 x3, 128 x3; tail 640), 32 pixels; the 40,000
images for the weights of a 80/20 split of the 50,000; batch 64, SGD 0.05 with a cosine to zero, momentum 0.9, decay
4e-5 for all; 36,000 path-gradients each (FairNAS: 12,000 updates of three networks on one batch; EF: 12,000 draws of
three updates; SPOS: 36,000 updates; One-Shot: as many in expectation), seeds 0, 1 and 2. After every eighth of them 24
networks, and at the end 240, evenly over MACs, the same for all runs, are judged with inherited weights after their
batch norms have seen 512 images for the weights, on images held out (1,000 and 4,000 of them). Only training counts as
the budget.

It began with 18,000 path-gradients, about 20 minutes of a core for each piece. The number was doubled before any result
was looked at, so that training alone would take a CPU more than eight hours of a core.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from cost_models.analytic import Macs
from cost_models.files import write_atomic
from pynas.architecture import Architecture
from pynas.console import Show
from pynas.registry import SPACES, STRATEGIES, SearchSpace
from pynas.strategies.base import Problem
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed
from pynas.training.judge import Judging
from pynas.training.loop import train
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels
from pynas.training.where import TrainOn, check_train_on, describe

STRATEGY_NAMES = ("fairnas", "spos", "ef", "one_shot")
SEEDS = (0, 1, 2)
WIDTH, HEAD = 0.5, 640
PATH_GRADIENTS, PARTS = 36000, 8
SETTINGS: dict[str, Any] = {
    "epochs": PARTS,
    "batch_size": 64,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 4e-5,
}
FEW, MANY = 24, 240  # networks judged on the way and at the end
ON_THE_WAY = Judging(calibrate=512, limit=1000)
AT_THE_END = Judging(calibrate=512, limit=4000)
OPTIONS = ("identity", "k3_e3", "k5_e6")  # digits of a key


def architecture(key: str, space: SearchSpace) -> Architecture:
    """The network of a key of the table."""
    names = zip(space.choices(), key, strict=True)
    return Architecture(space.name, {c.name: (OPTIONS[int(digit)],) for c, digit in names}, dict(space.options()))


def evenly(truth: dict[str, Any], count: int) -> list[str]:
    """Keys of networks, as evenly over MACs as there are some; no network twice under two keys."""
    macs = {key: row["flops"] for key, row in truth.items()}
    seen: set[tuple[float, float, float]] = set()
    distinct = []
    for key in sorted(truth):
        same = (macs[key], truth[key]["params"], truth[key]["mean_acc"])
        if same not in seen:
            seen.add(same)
            distinct.append(key)
    low, high = min(macs.values()), max(macs.values())
    bins: list[list[str]] = [[] for _ in range(max(1, count // 4))]
    for key in distinct:
        bins[min(len(bins) - 1, int((macs[key] - low) / (high - low) * len(bins)))].append(key)
    generator = random.Random(0)
    for some in bins:
        generator.shuffle(some)
    chosen: list[str] = []
    while len(chosen) < count:  # in turns, so that where there are few, all are taken
        for some in bins:
            if some and len(chosen) < count:
                chosen.append(some.pop())
    return sorted(chosen)


class Watched:
    """A strategy whose networks are judged after every epoch; what it tells goes into the checkpoint."""

    def __init__(self, strategy: Any, data: Data, keys: list[str]) -> None:
        self.strategy, self.data, self.keys = strategy, data, keys
        self.epochs = strategy.epochs
        self.history: list[dict[str, Any]] = []
        self.cpu_s = self.seconds = 0.0

    def steps(self, feed: Feed, epoch: int) -> int:
        return int(self.strategy.steps(feed, epoch))

    def step(self, feed: Feed, progress: Any) -> Any:
        began = time.process_time(), time.monotonic()
        metrics = self.strategy.step(feed, progress)
        self.cpu_s += time.process_time() - began[0]
        self.seconds += time.monotonic() - began[1]
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        found = judge(self.strategy, self.data, self.keys, ON_THE_WAY, None)
        values = list(found.values())
        self.history.append(
            {
                "share": (epoch + 1) / self.epochs,
                "mean": sum(values) / len(values),
                "least": min(values),
                "most": max(values),
                "accuracies": found,
            }
        )
        return self.strategy.end_epoch(epoch) | {"one_shot": self.history[-1]["mean"]}

    def state_dict(self) -> dict[str, Any]:
        told = {"history": json.dumps(self.history), "cpu_s": self.cpu_s, "seconds": self.seconds}
        return {"strategy": self.strategy.state_dict(), **told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state["strategy"])
        self.history, self.cpu_s, self.seconds = json.loads(state["history"]), state["cpu_s"], state["seconds"]


def judge(strategy: Any, data: Data, keys: list[str], how: Judging, path: Path | None) -> dict[str, float]:
    """Accuracy of networks with a strategy's weights, by key."""
    net = strategy.shared.net
    models = Submodels(net, data, how=how, processes=1, path=path)
    scores = models.scores([architecture(key, net.space) for key in keys])
    return {key: score.accuracy for key, score in zip(keys, scores, strict=True)}


def run(
    data: Data, truth: dict[str, Any], out: Path, name: str, seed: int, train_on: TrainOn, path_gradients: int
) -> None:
    """One strategy with one seed."""
    target = out / f"{name}-{seed}.json"
    if target.exists():
        return
    space = the_space()
    strategy = STRATEGIES.get(name)(**SETTINGS, path_gradients=path_gradients)
    torch.manual_seed(seed)
    strategy.prepare(Problem(space, cost_table(space, Macs()), None, 0.1, seed, train_on=train_on))
    folder = RunFolder(out / f"{name}-{seed}")
    (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    feed = Feed(data, batch_size=SETTINGS["batch_size"], seed=seed, device=train_on)
    watched = Watched(strategy, data, evenly(truth, FEW))
    with Show().bar(f"{name}, seed {seed}", sum(watched.steps(feed, e) for e in range(watched.epochs))) as bar:
        train(watched, feed, folder, "search", bar, "the same command")
    final = judge(strategy, data, evenly(truth, MANY), AT_THE_END, folder.path / "submodels.jsonl")
    record = {
        "strategy": name,
        "seed": seed,
        "path_gradients": path_gradients,
        "trained_on": describe(train_on),
        "training_s": round(watched.seconds),
        "training_cpu_s": round(watched.cpu_s),
        "updates": strategy.counts.report(),
        "history": watched.history,
        "accuracies": final,
    }
    write_atomic(target, json.dumps(record, indent=1) + "\n")


def the_space() -> SearchSpace:
    """Where all of them search."""
    return SPACES.get("macro")(width=WIDTH, head_channels=HEAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "table", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("pieces", nargs="*", default=[f"{name}:{seed}" for seed in SEEDS for name in STRATEGY_NAMES])
    parser.add_argument("--train-on", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--path-gradients", type=int, default=PATH_GRADIENTS, help="fewer are for a rehearsal")
    asked = parser.parse_args()
    pairs = [tuple(piece.split(":")) for piece in asked.pieces]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in STRATEGY_NAMES or not pair[1].isdigit():
            parser.error(f"Unknown piece {':'.join(pair)!r}. See the head of this file.")
    check_train_on(asked.train_on, "leave out --train-on")
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    truth = json.loads(asked.table.read_text())
    data = open_data(asked.images, size=the_space().input_size, seed=0)
    for name, seed in pairs:
        run(data, truth, asked.out.resolve(), name, int(seed), asked.train_on, asked.path_gradients)


if __name__ == "__main__":
    main()
