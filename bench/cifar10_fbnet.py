"""Does the search beat chance? FBNet on CIFAR-10 under a latency budget, against random nets of the same latency.

    python bench/cifar10_fbnet.py IMAGES OUT [PIECE ...]

IMAGES is an image folder (train/<class>/*, val/<class>/*), OUT a folder for runs. Pieces: "search", "random-1" ...
"random-8", "found" (needs "search"), "table"; all of them in this order by default; "random-3:1" trains with seed 1
only. Every piece goes on where it was broken off, and pieces may run side by side in several processes. About an hour
of two cores in all.

Fixed before looking: the space `fbnet_tiny` at 32 pixels, stem stride 2 and width 2 (stem 16; 16 | 32 x2 | 48 x2 | 96;
layers see 16, 16, 8, 8, 4, 4 pixels), 10,000 training images, budget in the middle between the cheapest and the dearest
net, nets within 4 % below it, 24 search epochs, 60 epochs of training from scratch on all 10,000 images with two seeds,
tested on the whole of `val`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import pynas
from cost_models.files import write_atomic
from pynas import pipeline
from pynas.architecture import Architecture
from pynas.console import Show
from pynas.plan import Plan, make_plan
from pynas.results import read_candidates
from pynas.strategies.random import random_architectures
from pynas.training.run import RunFolder

RANDOM_NETS = 8
SEARCH_SEED = 0
RANDOM_SEED = 1  # of the draw of random architectures
TRAIN_SEEDS = (0, 1)  # of initial weights and image order, the same for every net
SETTINGS: dict[str, Any] = {
    "space": "fbnet_tiny",
    "space_options": {"input_size": 32, "stem_stride": 2, "width": 2.0},
    "strategy": pynas.FBNet.preset("quick", epochs=24, warmup_epochs=6),
    "recipe": pynas.Recipe(epochs=60),
    "limit": 10000,
    "slack": 0.04,
    "seed": SEARCH_SEED,
    "threads": 1,
}


def search(images: Path, out: Path) -> RunFolder:
    """The search itself; its run folder is OUT/0001."""
    if (out / "0001" / "config.yaml").exists():
        if not read_candidates(RunFolder.open(out / "0001")):
            pynas.search(resume=str(out / "0001"))
    else:
        pynas.search(data=str(images), out=str(out), retrain=False, **SETTINGS)
    return RunFolder.open(out / "0001")


def alone(images: Path, out: Path, name: str, architecture: Architecture, seed: int) -> None:
    """Trains one net from scratch and writes OUT/<name>.json."""
    target = out / f"{name}-seed{seed}.json"
    if target.exists():
        return
    plan = _plan(images, out)
    folder = RunFolder(out / f"{name}-seed{seed}")
    (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    trained = pipeline.train_alone(plan, architecture, folder, "train", seed, Show())
    counts = pynas.count(trained.model, (3, plan.space.input_size, plan.space.input_size))
    record = {
        "net": str(architecture),
        "seed": seed,
        "accuracy": trained.accuracy,
        "images": trained.images,
        "predicted_ms": plan.table.cost(architecture),
        "macs": counts.macs,
        "params": counts.params,
    }
    write_atomic(target, json.dumps(record) + "\n")


def _plan(images: Path, out: Path) -> Plan:
    run = RunFolder.open(out / "0001")
    return make_plan({**run.config(), "data": str(images)}, Show(quiet=True), run)


def random_nets(images: Path, out: Path) -> list[Architecture]:
    """The random nets: uniform over those whose predicted latency lies in the same window."""
    plan = _plan(images, out)
    return random_architectures(plan.space, plan.table, RANDOM_NETS, plan.budget, plan.config["slack"], RANDOM_SEED)


def table(out: Path) -> None:
    """Prints every net's accuracy by seed, best mean first, and how the found one stands."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*-seed*.json")):
        records.setdefault(path.stem.rpartition("-seed")[0], []).append(json.loads(path.read_text()))
    means = {name: statistics.fmean(r["accuracy"] for r in trained) for name, trained in records.items()}
    for name in sorted(means, key=lambda name: -means[name]):
        first = records[name][0]
        seeds = "  ".join(f"seed {r['seed']}: {r['accuracy']:.2%}" for r in records[name])
        print(f"{name:9} {seeds}  {first['predicted_ms']:.3f} ms  {first['macs']:,} MACs  {first['net']}")
    chance = [mean for name, mean in means.items() if name.startswith("random")]
    if len(chance) > 1 and "found" in means:
        beaten = sum(mean < means["found"] for mean in chance)
        print(
            f"found {means['found']:.2%}; {len(chance)} random nets: mean {statistics.fmean(chance):.2%}, "
            f"standard deviation {statistics.stdev(chance):.2%}, best {max(chance):.2%}; found beats {beaten} of them"
        )


def main() -> None:
    images, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    pieces = sys.argv[3:] or ["search", *(f"random-{n + 1}" for n in range(RANDOM_NETS)), "found", "table"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for piece in pieces:
        if piece == "search":
            search(images, out)
        elif piece.startswith(("random-", "found")):
            name, _, chosen = piece.partition(":")
            if name == "found":
                net = read_candidates(RunFolder.open(out / "0001"))[0].architecture
            else:
                net = random_nets(images, out)[int(name.removeprefix("random-")) - 1]
            for seed in [int(chosen)] if chosen else TRAIN_SEEDS:
                alone(images, out, name, net, seed)
        elif piece == "table":
            table(out)
        else:
            sys.exit(f"Unknown piece {piece!r}. See the head of this file.")


if __name__ == "__main__":
    main()
