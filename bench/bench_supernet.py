"""Times whole training steps of supernets, and measures their memory: fused kernels against plain PyTorch.

    python bench/bench_supernet.py       everything, as tables; names of cases select some
    pytest bench/bench_supernet.py       one step with pytest-benchmark, ratios in extra_info
    PYNAS_BENCH_SHORT=1                  small sizes: shows that it runs, not how fast

A weight step is forward, backward and SGD; a theta step is forward and the gradient of theta alone. The rival is this
package's own reference path in both memory formats. All three take turns in one process on one thread, and CPU time
counts, so that the ratios hold on a busy machine too. With MALLOC_MMAP_THRESHOLD_=4294967296,
MALLOC_TRIM_THRESHOLD_=8589934592 and MALLOC_TOP_PAD_=268435456 in the environment memory is not fetched from the system
anew in every step, which helps plain PyTorch most; without, this program sets them.

Memory is the highest resident size during one step, above that of weights, gradients and momentum; every number comes
from a process of its own, with the usual malloc.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bench_kernels import machine
from torch import Tensor, nn
from torch.nn import functional

from cost_models.spec import OpSpec
from pynas import Gates, Supernet
from pynas.kernels import setting
from pynas.ops.layers import build
from pynas.plan import make_space

SHORT = os.environ.get("PYNAS_BENCH_SHORT") == "1"
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
ROUNDS = 1 if SHORT else 3
VARIANTS = ("fused", "contiguous", "channels_last")
TINY: dict[str, Any] = {"stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32}

Step = Callable[[], object]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=1e-4)


def in_layout(thing: Any, variant: str) -> Any:
    last = variant != "contiguous"
    return thing.to(memory_format=torch.channels_last if last else torch.contiguous_format)


@dataclass(frozen=True)
class Layers:
    """FBNet's supernet: all options of all layers."""

    space: str
    options: dict[str, Any]
    step: str

    def make(self, variant: str) -> Callable[[int], None]:
        """A step as a function of the batch size. Every variant begins with the same weights."""
        torch.manual_seed(0)
        net = in_layout(Supernet(make_space(self.space, self.options)), variant).train()
        theta = [torch.zeros(len(slot.choice.options), requires_grad=True) for slot in net.slots]
        optimizer = sgd(net)

        def gates(theta: Iterable[Tensor]) -> dict[str, Gates]:
            every = {slot.name: tuple(range(len(slot.choice.options))) for slot in net.slots}
            rows = zip(net.slots, theta, strict=True)
            return {s.name: Gates(row.softmax(0), every[s.name], every[s.name]) for s, row in rows}

        def weights(batch: int) -> None:
            x, y = batch_of(batch, net.space.input_size, variant)
            loss = functional.cross_entropy(net(x, gates([row.detach() for row in theta])), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        def thetas(batch: int) -> None:
            x, y = batch_of(batch, net.space.input_size, variant)
            for row in theta:
                row.grad = None
            functional.cross_entropy(net(x, gates(theta)), y).backward(inputs=theta)

        return weights if self.step == "weights" else thetas


@dataclass(frozen=True)
class Cells:
    """DARTS's and SNAS's supernet of 8 cells and 16 channels: all options of all edges.

    A SNAS step descends weights and theta by one gradient; a DARTS step takes theta's on one batch and then the
    weights' on another.
    """

    options: dict[str, Any]
    step: str

    def make(self, variant: str) -> Callable[[int], None]:
        torch.manual_seed(0)
        net = in_layout(Supernet(make_space("cell", self.options)), variant).train()
        choices = {slot.choice.name: len(slot.choice.options) for slot in net.slots}
        theta = {name: torch.zeros(count, requires_grad=True) for name, count in choices.items()}
        rows, optimizer = list(theta.values()), sgd(net)

        def loss(batch: int, frozen: bool) -> Tensor:
            x, y = batch_of(batch, net.space.input_size, variant)
            values = {name: (row.detach() if frozen else row).softmax(0) for name, row in theta.items()}
            run = {name: tuple(range(count)) for name, count in choices.items()}
            names = {slot.name: slot.choice.name for slot in net.slots}
            gates = {slot: Gates(values[name], run[name], run[name]) for slot, name in names.items()}
            return functional.cross_entropy(net(x, gates), y)

        def snas(batch: int) -> None:
            for row in rows:
                row.grad = None
            optimizer.zero_grad(set_to_none=True)
            loss(batch, frozen=False).backward()
            optimizer.step()

        def darts(batch: int) -> None:
            for row in rows:
                row.grad = None
            loss(batch, frozen=False).backward(inputs=rows)
            optimizer.zero_grad(set_to_none=True)
            loss(batch, frozen=True).backward()
            optimizer.step()

        return snas if self.step == "snas" else darts


# FairNAS-A (arXiv 1907.01845): of a stage channels and stride of the first layer; of each layer expansion and kernel.
FAIRNAS_A = (
    (32, 2, ((3, 7), (3, 3))),
    (40, 2, ((3, 7), (6, 3), (6, 7), (3, 3))),
    (80, 2, ((3, 3), (6, 7), (6, 7), (3, 5))),
    (96, 1, ((6, 3), (3, 5), (3, 5), (6, 3))),
    (192, 2, ((6, 3), (6, 7), (6, 3), (6, 7))),
    (320, 1, ((6, 5),)),
)


class FairPath(nn.Module):
    """The path of FairNAS-A: stem, separable block, 19 blocks with ReLU6, head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        blocks = [build(OpSpec("conv", 3, 32, size, kernel=3, stride=2, activation="relu6"))]
        size, channels = size // 2, 16
        blocks.append(build(OpSpec("conv", 32, 32, size, kernel=3, groups=32, activation="relu6")))
        blocks.append(build(OpSpec("conv", 32, 16, size, activation="none")))
        block = partial(OpSpec, "mbconv", activation="relu6")
        for out, stride, layers in FAIRNAS_A[:1] if SHORT else FAIRNAS_A:
            for number, (expansion, kernel) in enumerate(layers):
                step = 1 if number else stride
                blocks.append(build(block(channels, out, size, kernel=kernel, expansion=expansion, stride=step)))
                channels, size = out, -(-size // step)
        blocks.append(build(OpSpec("conv", channels, 1280, size, activation="relu6")))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(x).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Path19:
    """A weight step of one path."""

    size: int

    def make(self, variant: str) -> Callable[[int], None]:
        torch.manual_seed(0)
        net = in_layout(FairPath(self.size), variant).train()
        optimizer = sgd(net)

        def weights(batch: int) -> None:
            x, y = batch_of(batch, self.size, variant)
            loss = functional.cross_entropy(net(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return weights


def batch_of(batch: int, size: int, variant: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return in_layout(x, variant), torch.randint(10, (batch,), generator=generator)


_SPACE32: dict[str, Any] = TINY if SHORT else {}
_STRIDES: dict[str, Any] = {"input_size": 32, "classes": 10, **(TINY if SHORT else {})}
Case = Layers | Cells | Path19
CASES: dict[str, tuple[Case, int]] = {
    f"{name} {step} {batch}": (Layers(space, options, step), batch)
    for name, space, options in (("fbnet32", "fbnet32", _SPACE32), ("fbnet-at-32px", "fbnet", _STRIDES))
    for batch in ((2,) if SHORT else (16, 64))
    for step in ("weights", "theta")
}
_CELLS: dict[str, Any] = {"cells": 3, "channels": 4, "input_size": 8} if SHORT else {}
for _step in ("snas", "darts"):
    CASES[f"cells {_step}"] = (Cells(_CELLS, _step), 2 if SHORT else 16)
CASES["fairnas-path 224px"] = (Path19(32 if SHORT else 224), 2 if SHORT else 8)
CASES["fairnas-path 32px"] = (Path19(32), 2 if SHORT else 64)
IN_MEMORY = [
    name
    for name, (case, batch) in CASES.items()
    if isinstance(case, Cells) or (isinstance(case, Layers) and batch != 16)
]


def timed(case: Case, batch: int) -> dict[str, list[float]]:
    """CPU seconds of each variant, round by round."""
    steps = {variant: case.make(variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(ROUNDS + 1):
        for variant, step in steps.items():
            gc.collect()
            with setting.using("auto" if variant == "fused" else "reference"):
                start = time.process_time()
                step(batch)
                if number:  # the first round warms up
                    times[variant].append(time.process_time() - start)
    return times


def ratios(times: dict[str, list[float]]) -> tuple[float, float]:
    """The better layout of plain PyTorch over fused, by medians and by minima."""
    of_medians = min(median(times[variant]) for variant in VARIANTS[1:]) / median(times["fused"])
    return of_medians, min(min(times[variant]) for variant in VARIANTS[1:]) / min(times["fused"])


# Memory


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of(name: str, variant: str) -> int:
    """Bytes that one step needs above the state; to be called in a fresh process."""
    case, batch = CASES[name]
    with setting.using("auto" if variant == "fused" else "reference"):
        step = case.make(variant)
        with setting.using("reference"):
            step(2)  # makes gradients and momentum
        gc.collect()
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        before = resident("VmRSS")
        step(batch)
        return resident("VmHWM") - before


def measured_peak(name: str, variant: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    path = os.pathsep.join([str(Path(__file__).parent), *[entry for entry in sys.path if entry]])
    code = (
        f"import torch; torch.set_num_threads(1); import bench_supernet as b; print(b.peak_of({name!r}, {variant!r}))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout)


@pytest.mark.parametrize("step", ["weights", "theta"])
def test_step(benchmark: Any, step: str) -> None:
    name = f"fbnet-at-32px {step} {2 if SHORT else 16}"
    case, batch = CASES[name]
    torch.set_num_threads(1)
    benchmark.group = name
    times = timed(case, batch)
    benchmark.extra_info.update({"machine": machine(), "times_fused": ratios(times)[0]})
    benchmark.pedantic(partial(case.make("fused"), batch), rounds=1, iterations=1, warmup_rounds=1)


def main() -> None:
    if not set(TUNED) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**TUNED, **os.environ})
    torch.set_num_threads(1)
    chosen = [name for name in CASES if not sys.argv[1:] or any(asked in name for asked in sys.argv[1:])]
    print(machine())
    print(
        f"{'CPU seconds of a step':28s}{'fused':>9s}{'contiguous':>12s}{'ch._last':>10s}{'ratio':>8s}{'of minima':>11s}"
    )
    for name in chosen:
        times = timed(*CASES[name])
        middle = [median(times[variant]) for variant in VARIANTS]
        of_medians, of_minima = ratios(times)
        print(
            f"{name:28s}{middle[0]:9.3f}{middle[1]:12.3f}{middle[2]:10.3f}{of_medians:8.2f}{of_minima:11.2f}",
            flush=True,
        )
    in_memory = [name for name in chosen if name in IN_MEMORY]
    if not in_memory:
        return
    print(f"\n{'MB above the state':28s}{'fused':>9s}{'contiguous':>12s}{'ch._last':>10s}{'ratio':>8s}")
    for name in in_memory:
        peaks = [measured_peak(name, variant) / 2**20 for variant in VARIANTS]
        print(f"{name:28s}{peaks[0]:9.0f}{peaks[1]:12.0f}{peaks[2]:10.0f}{min(peaks[1:]) / peaks[0]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
