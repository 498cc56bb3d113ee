"""Times blocks of RepNAS's branches in training: one convolution with exact statistics against branch by branch.

    python bench/bench_branches.py

Forward and backward of a block at stride 1, one thread, interleaved, CPU time, medians in ms; the rival is this
package's own branches in the faster of both memory formats. Every shape with all seven branches, and with the first
five, three and two. "fused" always merges, "auto" by the rule of `pynas.ops.fast_merge`, on channels_last; the last two
columns are their ratios to the rival. Memory is not fetched from the system anew, as in bench_supernet.py.
"""

from __future__ import annotations

import os
import sys
import time
from statistics import median

import torch
from bench_kernels import machine
from bench_supernet import TUNED

from pynas import Choice
from pynas.kernels import setting
from pynas.ops.branches import BRANCHES
from pynas.ops.rep import RepBlock, RepSlot

SHAPES = ((16, 32, 2), (16, 32, 16), (32, 32, 16), (32, 16, 16), (32, 16, 64), (48, 32, 16), (64, 16, 16), (64, 16, 64))
COUNTS = (7, 5, 3, 2)
ROUNDS = 5


def times(channels: int, size: int, images: int, count: int) -> dict[str, float]:
    """Milliseconds by variant."""
    names = tuple(BRANCHES.names())[:count]
    slot = RepSlot("here", Choice("here", names, "any"), "rep", channels, channels, size)
    block = RepBlock(slot, names).train()
    found: dict[str, list[float]] = {"fused": [], "auto": [], "contiguous": [], "channels_last": []}
    for number in range(ROUNDS + 1):
        for variant, taken in found.items():
            layout = torch.contiguous_format if variant == "contiguous" else torch.channels_last
            block.to(memory_format=layout)  # type: ignore[call-overload]
            x = torch.randn(images, channels, size, size).contiguous(memory_format=layout).requires_grad_()
            with setting.using(variant if variant in ("fused", "auto") else "reference"):  # type: ignore[arg-type]
                start = time.process_time()
                block(x).sum().backward()
                if number:
                    taken.append(1e3 * (time.process_time() - start))
    return {variant: median(taken) for variant, taken in found.items()}


def main() -> None:
    if not set(TUNED) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**TUNED, **os.environ})
    torch.set_num_threads(1)
    print(machine())
    heads = zip(("fused", "auto", "contiguous", "ch._last", "fused", "auto"), (9, 9, 12, 10, 8, 8), strict=True)
    print(f"{'channels, size, batch, branches':34s}" + "".join(f"{head:>{width}s}" for head, width in heads))
    for shape in SHAPES:
        for count in COUNTS:
            found = times(*shape, count)
            best = min(found["contiguous"], found["channels_last"])
            row = "".join(f"{found[name]:{width}.1f}" for name, width in zip(found, (9, 9, 12, 10), strict=True))
            print(f"{shape!s:28s}{count:6d}{row}{best / found['fused']:8.2f}{best / found['auto']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
