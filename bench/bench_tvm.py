"""Compares blocks compiled by TVM with torch eager and onnxruntime on this machine: batch 1, one thread, BN folded.

    pytest bench/bench_tvm.py            one short pass
    python bench/bench_tvm.py [ROUNDS]   one table

All runtimes of a block take turns; every run is timed by the CPU time of its thread after 8 MB of other memory was
read, as between the layers of a network (`cost_models.timing`). torch runs in both memory formats, and the faster one
counts. The TVM block takes and gives channels-last tensors, torch and onnxruntime the layout that they choose.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from math import prod
from statistics import median
from typing import Any

import pytest
import torch

from cost_models import OpSpec
from cost_models.compiling import Job, compile_all
from cost_models.machine import cpu_model
from cost_models.runners import TorchHost, make_runner
from cost_models.timing import runs_ms
from pynas.plan import deployed

SHORT = os.environ.get("PYNAS_BENCH_SHORT") == "1"
ROUNDS = 3 if SHORT else 25
# in channels, out channels, size, kernel, expansion, groups
SHAPES = (
    (16, 16, 112, 3, 6, 1),
    (16, 16, 112, 5, 6, 1),
    (24, 24, 56, 3, 6, 1),
    (24, 24, 56, 5, 6, 1),
    (24, 24, 56, 3, 1, 1),
    (24, 24, 56, 3, 1, 2),
    (32, 32, 28, 3, 6, 1),
    (112, 112, 14, 3, 6, 1),
    (184, 352, 7, 3, 6, 1),
    (352, 352, 7, 3, 6, 1),
    (16, 16, 32, 3, 6, 1),
    (32, 32, 16, 3, 6, 1),
    (64, 64, 8, 3, 6, 1),
)
BLOCKS = tuple(
    OpSpec("mbconv", i, o, size, kernel=kernel, expansion=expansion, groups=groups)
    for i, o, size, kernel, expansion, groups in SHAPES
)


def whole_call(runner: str, module: Any, shape: tuple[int, ...]) -> Callable[[], float]:
    """Times a module with the call of its runtime, which rows of tables leave out: torch's numbers hold theirs too."""
    made: Any = make_runner(runner)
    run = made.open(compile_all({0: Job("net", module, shape)}, made.compiler)[0])
    return lambda: runs_ms(run, 1, 1)[0]


def times_ms(spec: OpSpec, rounds: int) -> dict[str, float]:
    """Median latency in ms of one block in each runtime, interleaved."""
    shape = (1, spec.in_channels, spec.size, spec.size)
    torch.manual_seed(0)
    module: Any = deployed(spec)
    last = deployed(spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last.load_state_dict(module.state_dict())
    calls: dict[str, Callable[[], float]] = {
        "tvm": whole_call("tvm-local", module, shape),
        "torch": TorchHost().net(module, shape),
        "torch channels_last": TorchHost().net(last, shape),
        "onnxruntime": whole_call("ort-local", module, shape),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(call())
    return {name: median(values) for name, values in taken.items()}


def line(spec: OpSpec, taken: dict[str, float]) -> str:
    eager = min(taken["torch"], taken["torch channels_last"])
    numbers = "".join(f"{taken[name]:10.3f}" for name in ("tvm", "torch", "torch channels_last", "onnxruntime"))
    return f"{spec.key:42s}{numbers}{eager / taken['tvm']:10.2f}{taken['onnxruntime'] / taken['tvm']:10.2f}"


@pytest.mark.parametrize("spec", BLOCKS[-1:] if SHORT else BLOCKS, ids=lambda spec: spec.key)
def test_block(benchmark: Any, spec: OpSpec) -> None:
    pytest.importorskip("tvm", reason="needs the extra 'tvm'")
    taken = times_ms(spec, ROUNDS)
    benchmark.group = spec.key
    benchmark.extra_info.update(taken)
    call = make_runner("tvm-local").net(deployed(spec), (1, spec.in_channels, spec.size, spec.size))
    benchmark.pedantic(call, rounds=1 if SHORT else 5, iterations=1)


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(f"{cpu_model()}, {platform.system()}, torch {torch.__version__}, {rounds} rounds, medians in ms")
    names = ("tvm", "torch", "torch cl", "ort", "eager/tvm", "ort/tvm")
    print(f"{'block':42s}" + "".join(f"{name:>10s}" for name in names))
    against_eager, against_ort = [], []
    for spec in BLOCKS:
        taken = times_ms(spec, rounds)
        print(line(spec, taken), flush=True)
        against_eager.append(min(taken["torch"], taken["torch channels_last"]) / taken["tvm"])
        against_ort.append(taken["onnxruntime"] / taken["tvm"])
    means = [prod(values) ** (1 / len(values)) for values in (against_eager, against_ort)]
    print(f"geometric means: TVM {means[0]:.2f}x as fast as eager (least {min(against_eager):.2f}x), ", end="")
    print(f"{means[1]:.2f}x as fast as onnxruntime (least {min(against_ort):.2f}x)")


if __name__ == "__main__":
    main()
