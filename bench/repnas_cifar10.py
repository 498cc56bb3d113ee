"""Do searched branches pay? RepNAS, fixed blocks and random branches on one small host, CIFAR-10, equal epochs.

    python bench/repnas_cifar10.py IMAGES OUT [PIECE ...]

IMAGES is an image folder (train/<class>/*, val/<class>/*), OUT a folder for runs and results. Pieces: "plain:0" ...
"separate:2", a contestant and a seed; "repnas@0.1:0" ... "repnas@0.6:1", RepNAS with another budget;
"ablate:repnas:0" ... "ablate:separate:2" (need that run); "cost:plain" ... "cost:separate". All by default, seed by
seed. Each writes OUT/<piece>.json, goes on where it was broken off, and may run beside others. `python
bench/repnas_report.py OUT` reads them. About four hours of two cores in all.

Fixed before looking: the host `repvgg_tiny` at 32 pixels and width 2 (16 | 16 x2 | 32 x2 | 64 x2; seven blocks, 46
branches); 10,000 training images and 2,500 held out, tested on the whole of `val`; 24 epochs of batch 64, SGD 0.1 with
a cosine to zero, momentum 0.9, decay 1e-4 on weights, clip 5, for all. RepNAS: 3 epochs of random branches, 6 joint,
logits by Adam 0.01, 0.34 of the branches (15); the random contestant takes 15 other branches with every seed. Seeds 0,
1 and 2; other budgets with seeds 0 and 1.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cost_models.files import write_atomic
from cost_models.runners import TorchHost
from pynas import rep
from pynas.architecture import Architecture
from pynas.branch_budget import BranchBudget, branch_table
from pynas.console import Show
from pynas.counting import count
from pynas.fuse import fuse
from pynas.registry import SPACES, SearchSpace
from pynas.strategies.base import Problem
from pynas.strategies.repnas import RepNAS
from pynas.subsets import random_subsets, subset_architecture
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy, recalibrate
from pynas.training.feed import Feed
from pynas.training.judge import Judging
from pynas.training.loop import Progress, train
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels
from pynas.training.train import Training

FIXED = ("plain", "repvgg", "acb", "dbb", "random")
SEARCHED = ("repnas", "separate")  # with weights shared in a block, and without
SEEDS = (0, 1, 2)
SHARE, OTHER_SHARES, OTHER_SEEDS = 0.34, (0.1, 0.2, 0.6), (0, 1)
IMAGES, HELD_OUT = 10000, 2500
HOST: dict[str, Any] = {"host": "repvgg_tiny", "input_size": 32, "width": 2.0, "classes": 10}
STRATEGY = RepNAS(epochs=24, batch_size=64, frozen_epochs=3, joint_epochs=6, logit_lr=0.01)
CALIBRATE = 512


def space_of(name: str) -> SearchSpace:
    return SPACES.get("repnas")(**HOST, sharing=name != "separate")


def problem(space: SearchSpace, share: float, seed: int) -> Problem:
    """Share of the branches as a budget."""
    table, limit = branch_table(space, BranchBudget("ratio", share), batch_size=STRATEGY.batch_size)
    return Problem(space, table, limit, 0.1, seed)


def architecture(name: str, space: SearchSpace, seed: int) -> Architecture:
    """The network of a contestant whose branches are given."""
    if name != "random":
        return rep.fixed(space, name)
    asked = problem(space, SHARE, seed)
    assert asked.budget is not None
    return random_subsets(space, asked.table, 1, asked.budget, 100 + seed)[0]


class Watched:
    """A task whose network is judged on held-out images after every epoch; what it tells goes into the checkpoint."""

    def __init__(self, task: Any, data: Data) -> None:
        self.task, self.data, self.epochs = task, data, task.epochs
        self.history: list[dict[str, float]] = []
        self.cpu_s = 0.0

    def steps(self, feed: Feed, epoch: int) -> int:
        return int(self.task.steps(feed, epoch))

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        began = time.process_time()
        metrics: dict[str, float] = self.task.step(feed, progress)
        self.cpu_s += time.process_time() - began
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        told: dict[str, Any] = self.task.end_epoch(epoch)
        right = accuracy(self._now(), self.data.arch, self.data)
        self.history.append({"epoch": epoch + 1, "accuracy": right})
        return told | {"held_out": right}

    def _now(self) -> nn.Module:
        """The network as it would be if training ended here."""
        if isinstance(self.task, Training):
            return self.task.net
        if self.task.kept is not None:
            return self.task.result()  # type: ignore[no-any-return]
        net = self.task.net.inherit(subset_architecture(self.task.problem.space, self.task.sampler.best()))
        recalibrate(net, self.data.weights, self.data, CALIBRATE)
        return net  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task.state_dict(), "history": json.dumps(self.history), "cpu_s": self.cpu_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state["task"])
        self.history, self.cpu_s = json.loads(state["history"]), state["cpu_s"]


def images(path: Path) -> Data:
    return open_data(path, size=HOST["input_size"], seed=0, limit=IMAGES + HELD_OUT)


def task_of(name: str, share: float, seed: int) -> Any:
    """What is trained, prepared."""
    space = space_of(name)
    torch.manual_seed(seed)
    if name in FIXED:
        return Training(architecture(name, space, seed).build(), STRATEGY.recipe())
    task = RepNAS(**vars_of(STRATEGY))
    task.prepare(problem(space, share, seed))
    return task


def vars_of(strategy: RepNAS) -> dict[str, Any]:
    return {key: value for key, value in vars(strategy).items() if not key.startswith("_")}


def run(path: Path, out: Path, name: str, share: float, seed: int, piece: str) -> None:
    """One contestant with one seed."""
    data = images(path)
    task = task_of(name, share, seed)
    folder = RunFolder(out / f"run-{piece.replace(':', '-')}")
    (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    feed = Feed(data, batch_size=STRATEGY.batch_size, seed=seed)
    watched = Watched(task, data)
    with Show().bar(piece, sum(watched.steps(feed, epoch) for epoch in range(watched.epochs))) as bar:
        train(watched, feed, folder, "train", bar, "the same command")
    net = task.result()
    folded = fuse(net, next(iter([torch.randn(4, 3, 32, 32)])))
    kept = architecture(name, space_of(name), seed) if name in FIXED else _kept(task)
    record = {
        "contestant": name,
        "share": share,
        "seed": seed,
        "test_accuracy": accuracy(folded, data.test, data),
        "held_out": watched.history,
        "losses": [line["loss"] for line in folder.metrics("train")],
        "branches": {block: list(names) for block, names in kept.choices.items()},
        "logits": None if name in FIXED else _logits(task),
        "training_cpu_s": round(watched.cpu_s, 1),
        "training_params": sum(p.numel() for p in net.parameters()),
        "folded": vars(count(folded, (3, 32, 32))),
    }
    write_atomic(out / f"{piece.replace(':', '-')}.json", json.dumps(record, indent=1) + "\n")


def _kept(task: RepNAS) -> Architecture:
    assert task.kept is not None
    return subset_architecture(task.problem.space, task.kept)


def _logits(task: RepNAS) -> dict[str, dict[str, float]]:
    rows = task.sampler.logits.detach().tolist()
    choices = task.problem.space.choices()
    return {c.name: dict(zip(c.options, row, strict=False)) for c, row in zip(choices, rows, strict=True)}


def ablate(path: Path, out: Path, name: str, seed: int, piece: str) -> None:
    """How much the loss on held-out images rises without each of the branches that were kept."""
    state = RunFolder(out / f"run-{name}-{seed}").load_checkpoint("train")
    if state is None:
        sys.exit(f"{piece} needs the run {name}:{seed}.")
    data, task = images(path), task_of(name, SHARE, seed)
    task.load_state_dict(state["task"]["task"])
    whole = _kept(task)
    without = [(block, branch) for block, names in whole.choices.items() for branch in names]
    nets = [whole]
    for block, branch in without:
        rest = tuple(other for other in whole.choices[block] if other != branch)
        nets.append(Architecture(whole.space, {**whole.choices, block: rest}, whole.options))
    models = Submodels(task.net, data, how=Judging(calibrate=CALIBRATE), processes=1)
    scores = models.scores(nets)
    logits = _logits(task)
    rows = [
        {
            "block": block,
            "branch": branch,
            "logit": logits[block][branch],
            "loss_rise": score.loss - scores[0].loss,
            "accuracy_fall": scores[0].accuracy - score.accuracy,
        }
        for (block, branch), score in zip(without, scores[1:], strict=True)
    ]
    record = {"contestant": name, "seed": seed, "rows": rows}
    write_atomic(out / f"{piece.replace(':', '-')}.json", json.dumps(record, indent=1) + "\n")


class Noise:
    """Random batches, for costs."""

    steps_weights = 10**6

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (STRATEGY.batch_size, 3, HOST["input_size"], HOST["input_size"])
        return torch.randn(shape), torch.randint(0, 10, (STRATEGY.batch_size,))


def cost(name: str, target: Path) -> None:
    """Training step and folded latency of a contestant; its peak memory is this process's."""
    task, feed, cpu_ms = task_of(name, SHARE, 0), Noise(), []
    for step in range(33):
        began = time.process_time()
        task.step(feed, Progress(STRATEGY.frozen_epochs if name in SEARCHED else 0, step))
        cpu_ms.append(1000 * (time.process_time() - began))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if name in SEARCHED:
        task._keep(task.sampler.best())
    folded = fuse(task.result())
    times = TorchHost().time_net_ms(folded, (1, 3, HOST["input_size"], HOST["input_size"]), 15)
    record = {
        "contestant": name,
        "step_cpu_ms": sorted(cpu_ms[3:])[15],
        "peak_mb": peak_mb,
        "folded_ms": sorted(times)[7],
        "folded": vars(count(folded, (3, 32, 32))),
    }
    write_atomic(target, json.dumps(record, indent=1) + "\n")


def do(piece: str, path: Path, out: Path) -> None:
    """One piece, unless it is done."""
    target = out / f"{piece.replace(':', '-')}.json"
    kind, _, rest = piece.partition(":")
    if target.exists():
        return
    if kind == "cost" and rest in FIXED + SEARCHED:
        # In a process of its own, whose peak of memory is that of this contestant alone.
        subprocess.run([sys.executable, __file__, "--cost", rest, str(target)], check=True)
    elif kind == "ablate" and rest.partition(":")[0] in SEARCHED:
        name, _, seed = rest.partition(":")
        ablate(path, out, name, int(seed), piece)
    else:
        name, _, share = kind.partition("@")
        if name not in FIXED + SEARCHED or not rest.isdigit() or (share and name in FIXED):
            sys.exit(f"Unknown piece {piece!r}. See the head of this file.")
        run(path, out, name, float(share or SHARE), int(rest), piece)


def pieces() -> list[str]:
    """All of them, seed by seed."""
    found = [f"cost:{name}" for name in FIXED + SEARCHED]
    for seed in SEEDS:
        found += [f"{name}:{seed}" for name in FIXED + SEARCHED]
        found += [f"ablate:{name}:{seed}" for name in SEARCHED]
        found += [f"repnas@{share}:{seed}" for share in OTHER_SHARES if seed in OTHER_SEEDS]
    return found


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "--cost":
        cost(sys.argv[2], Path(sys.argv[3]))
        return
    path, out = (Path(argument).resolve() for argument in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for piece in sys.argv[3:] or pieces():
        do(piece, path, out)


if __name__ == "__main__":
    main()
