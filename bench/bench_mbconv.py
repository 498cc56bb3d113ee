"""Times choice layers and single blocks in training: fused, and in plain PyTorch in both memory layouts.

    pytest bench/bench_mbconv.py              a few shapes, one pytest-benchmark group each, ratios in extra_info
    python bench/bench_mbconv.py              tables of mixed layers and of blocks, geometric means
    python bench/bench_mbconv.py mixed 2 64   one of them, at these batch sizes

Forward and backward with all gradients, one thread. All implementations take turns in one process and CPU time counts;
each number is the median over rounds. "pynas" is what runs by default: the fused kernel wherever the rule by shape
says that it pays. The rival is the faster of plain PyTorch in contiguous and in channels_last layout. Give the rival a
good allocator too:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 python bench/...
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from bench_kernels import machine
from torch import nn

from pynas.choices import Choice, Gates, Slot
from pynas.kernels import setting
from pynas.registry import FAMILIES

SHORT = os.environ.get("PYNAS_BENCH_SHORT") == "1"
OPTIONS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
BLOCKS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e6")
# in, out, size, stride, batch sizes: layers of the 32-pixel and of the 224-pixel space.
LAYERS: tuple[tuple[int, int, int, int, tuple[int, ...]], ...] = (
    (16, 16, 32, 1, (1, 2, 16, 64)),
    (24, 24, 32, 1, (1, 2, 16, 64)),
    (24, 32, 32, 2, (1, 2, 16, 64)),
    (32, 32, 16, 1, (1, 2, 16, 64)),
    (64, 64, 8, 1, (1, 2, 16, 64)),
    (112, 112, 8, 1, (1, 2, 16, 64)),
    (184, 184, 4, 1, (1, 2, 16, 64)),
    (16, 16, 112, 1, (1, 2)),
    (16, 24, 112, 2, (1, 2, 4)),
    (24, 24, 56, 1, (1, 2, 16)),
    (32, 32, 28, 1, (1, 2, 16)),
    (64, 64, 14, 1, (1, 2, 16)),
    (112, 112, 14, 1, (1, 2, 16)),
    (184, 184, 7, 1, (1, 2, 16)),
)
GROUPS = {
    "all": range(1000),
    "8 to 56 pixels but 14": (8, 16, 28, 32, 56),
    "16 pixels and more": range(16, 1000),
    "14 pixels": (14,),
    "7 pixels and less": range(8),
}
ROUNDS = 2 if SHORT else 5
Call = Callable[[], object]


def layer(options: tuple[str, ...], channels: int, out: int, size: int, stride: int) -> nn.Module:
    """A choice layer with all options, in training mode."""
    torch.manual_seed(0)
    slot = Slot("layer", Choice("layer", options), "mbconv", channels, out, size, stride)
    return FAMILIES.get("mbconv").mixed(slot).train()


def step(options: tuple[str, ...], shape: tuple[int, int, int, int], batch: int, layout: torch.memory_format) -> Call:
    """Forward and backward of a layer, through its gates where it has several options."""
    channels, out, size, stride = shape
    module: Any = layer(options, *shape).to(memory_format=layout)
    out_size = -(-size // stride)
    x = torch.randn(batch, channels, size, size).to(memory_format=layout).requires_grad_()
    weight = torch.randn(batch, out, out_size, out_size).to(memory_format=layout)
    run = tuple(range(len(options)))
    values = torch.full((len(options),), 1 / len(options), requires_grad=len(options) > 1)
    gates = Gates(values, run, run)

    def go() -> None:
        for leaf in (x, values, *module.parameters()):
            leaf.grad = None
        module(x, gates).backward(weight)

    return go


def calls_of(options: tuple[str, ...], shape: tuple[int, int, int, int], batch: int) -> dict[str, Call]:
    def under(kernels: setting.Setting, layout: torch.memory_format) -> Call:
        go = step(options, shape, batch, layout)

        def run() -> None:
            with setting.using(kernels):
                go()

        return run

    return {
        "pynas": under("auto", torch.channels_last),
        "contiguous": under("reference", torch.contiguous_format),
        "channels_last": under("reference", torch.channels_last),
    }


def interleave(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call; short ones are repeated within a round."""
    repeats = {}
    for name, call in calls.items():
        call()
        begin = time.process_time()
        call()
        repeats[name] = max(1, min(20, int(0.05 / max(time.process_time() - begin, 1e-5))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.process_time() - begin) / repeats[name])
    return {name: median(values) for name, values in taken.items()}


def line(title: str, taken: dict[str, float]) -> tuple[str, float]:
    """A line of a table, and how many times as fast as the best rival the kernel is."""
    ratio = min(taken["contiguous"], taken["channels_last"]) / taken["pynas"]
    numbers = "".join(f"{taken[name] * 1e3:11.2f}" for name in ("pynas", "contiguous", "channels_last"))
    return f"{title:38s}{numbers}{taken['contiguous'] / taken['pynas']:10.2f}{ratio:10.2f}", ratio


def table(title: str, cases: list[tuple[str, tuple[str, ...]]], batches: set[int]) -> None:
    print(f"\n{title:38s}{'pynas ms':>11s}{'contig. ms':>11s}{'ch.last ms':>11s}{'x contig.':>10s}{'x best':>10s}")
    for name, options in cases:
        ratios: list[tuple[int, float]] = []
        for *shape, counts in LAYERS:
            channels, out, size, stride = shape
            kept = tuple(o for o in options if o != "skip" or (stride == 1 and channels == out))
            for batch in sorted(batches & set(counts)):
                where = f"{name} {channels}->{out} {size}x{size}/{stride} n={batch}"
                text, ratio = line(where, interleave(calls_of(kept, (channels, out, size, stride), batch), ROUNDS))
                print(text, flush=True)
                ratios.append((size, ratio))
        for group, sizes in GROUPS.items():
            found = [ratio for size, ratio in ratios if size in sizes]
            if found:
                mean = math.exp(math.fsum(map(math.log, found)) / len(found))
                print(f"{name}, {group}: geometric mean {mean:.2f}, least {min(found):.2f}, of {len(found)}")


@pytest.mark.parametrize("impl", ["pynas", "contiguous", "channels_last"])
@pytest.mark.parametrize("options", [OPTIONS, ("k3_e6",)], ids=["mixed", "k3_e6"])
def test_speed(benchmark: Any, options: tuple[str, ...], impl: str) -> None:
    calls = calls_of(options, (16, 16, 8, 1) if SHORT else (32, 32, 16, 1), 2 if SHORT else 16)
    benchmark.group = "mixed layer" if len(options) > 1 else "block k3_e6"
    if impl == "pynas":
        taken = interleave(calls, ROUNDS)
        benchmark.extra_info.update({"machine": machine()} | {k: v / taken["pynas"] for k, v in taken.items()})
    benchmark.pedantic(calls[impl], rounds=1 if SHORT else 5, iterations=1, warmup_rounds=1)


def main() -> None:
    torch.set_num_threads(1)
    wanted = [word for word in sys.argv[1:] if not word.isdigit()] or ["mixed", "blocks"]
    batches = {int(word) for word in sys.argv[1:] if word.isdigit()} or {1, 2, 4, 16, 64}
    print(machine())
    if "mixed" in wanted:
        table("mixed layers, all options", [("mixed", OPTIONS)], batches)
    if "blocks" in wanted:
        table("single blocks", [(name, (name,)) for name in BLOCKS], batches)


if __name__ == "__main__":
    main()
