"""Times every kernel against its reference and against what one would write in torch instead.

Layers and blocks at the sizes of real networks: `bench_mbconv.py`, `bench_inference.py` and `bench_supernet.py`.

    pytest bench/bench_kernels.py        one pytest-benchmark group per kernel, ratios in extra_info
    python bench/bench_kernels.py        one table

All calls of a kernel take turns in one process on one thread, and CPU time counts, so that the ratios hold on a busy
machine too. Timings are for people to read: none of them fails a test.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pynas import kernels
from pynas.kernels.kernel import Kernel

LAYERS, OPTIONS, TAU = 22, 9, 5.0  # FBNet's space
SHORT = os.environ.get("PYNAS_BENCH_SHORT") == "1"  # small sizes, few rounds: shows that it runs, not how fast
PATHS, ROUNDS = (20_000, 2_000) if SHORT else (1_000_000, 100_000)

Call = Callable[[], object]


def step(function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    """A call of a kernel; where it is differentiable, forward and backward through autograd as in a search."""
    flat = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else (arg,))]
    leaves = [part for part in flat if isinstance(part, Tensor) and part.requires_grad]
    if not leaves:
        return lambda: function(*args)
    torch.manual_seed(0)
    outputs = function(*args)
    indices = [i for i, output in enumerate(outputs) if output.requires_grad]

    def kept(found: tuple[Tensor, ...]) -> list[Tensor]:
        return [found[i] for i in indices]

    weights = [torch.randn_like(output) for output in kept(outputs)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(kept(function(*args)), weights)

    return run


def gumbel_args() -> tuple[Any, ...]:
    torch.manual_seed(0)
    mask = torch.ones(LAYERS, OPTIONS, dtype=torch.bool)
    mask[:: LAYERS // 4, -1] = False  # strided layers have no skip
    return torch.randn(LAYERS, OPTIONS).requires_grad_(), mask, torch.rand(LAYERS, OPTIONS), TAU, 1, 2, 1


def batched_gumbel(theta: Tensor, mask: Tensor, cost: Tensor, tau: float, *_: int) -> tuple[Tensor, ...]:
    """The same work as gumbel_gates in one batch of torch calls, with torch's own noise."""
    logits = theta.masked_fill(~mask, -torch.inf)
    noisy = logits - torch.empty_like(theta).exponential_().log()
    soft = torch.softmax(noisy / tau, -1)
    index = noisy.argmax(-1)
    log_prob = logits.log_softmax(-1).gather(-1, index[:, None]).squeeze(-1)
    return soft, index, log_prob, (soft * cost).sum()


def looped_gumbel(args: tuple[Any, ...]) -> Call:
    """The soft gates alone, layer by layer, as public FBNet code has it."""
    thetas = [row.detach().clone().requires_grad_() for row in args[0]]
    weights = [torch.randn(OPTIONS) for _ in thetas]

    def run() -> None:
        for theta in thetas:
            theta.grad = None
        torch.autograd.backward([functional.gumbel_softmax(theta, TAU) for theta in thetas], weights)

    return run


def path_args() -> tuple[Any, ...]:
    torch.manual_seed(0)
    share = torch.randn(LAYERS, OPTIONS).double().softmax(-1).cumsum(-1)
    return (share[:, :-1] * 2.0**32).long(), PATHS, 1, 2


def multinomial(cuts: Tensor) -> Call:
    edges = torch.cat([torch.zeros(LAYERS, 1), cuts.double() / 2.0**32, torch.ones(LAYERS, 1)], -1)
    p = edges.diff(dim=-1).float()
    return lambda: torch.multinomial(p, PATHS, replacement=True)


def calls_of(kernel: Kernel) -> dict[str, Call]:
    """The kernel first, then its reference, then its rivals."""
    args: tuple[Any, ...]
    rivals: dict[str, Call]
    if kernel.name == "gumbel_gates":
        args = gumbel_args()
        rivals = {"batched torch": step(batched_gumbel, args), "loop of F.gumbel_softmax": looped_gumbel(args)}
    elif kernel.name == "sample_paths":
        args = path_args()
        rivals = {"torch.multinomial": multinomial(args[0])}
    elif kernel.name == "fair_paths":
        args = torch.full((LAYERS,), OPTIONS), ROUNDS, OPTIONS, 1, 2
        rivals = {"torch.rand + argsort": lambda: torch.rand(ROUNDS, LAYERS, OPTIONS).argsort(-1)}
    else:
        args, rivals = kernel.samples(torch.device("cpu"), torch.float32)[0], {}
    return {"fused": step(kernel.function, args), "reference": step(kernel.reference, args)} | rivals


def interleave(calls: dict[str, Call], rounds: int = 2 if SHORT else 45, slice_s: float = 0.01) -> dict[str, float]:
    """Median CPU seconds per call, without the garbage collector; each call gets about `slice_s` in every round."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, int(slice_s / max(time.process_time() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # brings its code and data back into the caches
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time() - start) / repeats[name])
        gc.collect()
    gc.enable()
    return {name: median(values) for name, values in times.items()}


def report(kernel: Kernel, medians: dict[str, float]) -> str:
    lines = [f"{kernel.name}"]
    for name, seconds in medians.items():
        lines.append(f"  {name:28s}{seconds * 1e3:12.4f} ms{seconds / medians['fused']:9.2f} x fused")
    return "\n".join(lines)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {cpu}, {os.cpu_count()} CPUs, load {load}, "
        f"torch {torch.__version__}, isa {kernels.facts()['isa']}, one thread, median CPU time of interleaved rounds"
    )


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("kernel", kernels.ALL.values(), ids=list(kernels.ALL))
def test_speed(benchmark: Any, kernel: Kernel, impl: str) -> None:
    calls = calls_of(kernel)
    benchmark.group = kernel.name
    if impl == "fused":
        medians = interleave(calls)
        ratios = {name: seconds / medians["fused"] for name, seconds in medians.items()}
        benchmark.extra_info.update({"machine": machine(), "times_fused": ratios})
        print(f"\n{report(kernel, medians)}")
    benchmark.pedantic(calls[impl], rounds=1 if SHORT else 5, iterations=1, warmup_rounds=1)


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    for name in sys.argv[1:] or kernels.ALL:
        kernel = kernels.ALL[name]
        print(report(kernel, interleave(calls_of(kernel))))


if __name__ == "__main__":
    main()
