"""Compares pynas.kernels' inference block with torch eager and onnxruntime: one thread, batch norms folded.

    pytest bench/bench_inference.py            one short pass
    python bench/bench_inference.py [SECONDS]  one table; so long per block

All runtimes of a block take turns in one process, and CPU time counts. torch runs in both memory formats, and the
faster one counts; onnxruntime reads and writes memory that is bound beforehand; pynas takes and gives tensors with
channels last, through Python, and looks at every call whether the weights have changed. Memory stays with the process
between calls, which helps torch most. Timings are for people to read: none of them fails a test.
"""

from __future__ import annotations

import io
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from math import prod
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cost_models import OpSpec
from cost_models.machine import cpu_model
from pynas.fuse import fuse
from pynas.kernels import facts
from pynas.ops.mbconv import MBConv
from pynas.ops.prepared import prepare

SHORT = os.environ.get("PYNAS_BENCH_SHORT") == "1"
SECONDS = 0.02 if SHORT else 1.0
LEAST_ROUNDS = 3
ROUND_SECONDS = 5e-4  # a round repeats calls that take less
# in channels, out channels, size
SHAPES = (
    *((16, 16, 112), (24, 24, 56), (32, 32, 28), (64, 64, 14), (112, 112, 14)),
    *((184, 352, 7), (352, 352, 7), (16, 16, 32), (32, 32, 16), (64, 64, 8)),
)
OPTIONS = ((3, 1, 1), (3, 1, 2), (3, 6, 1), (5, 6, 1))  # kernel, expansion, groups
BLOCKS = tuple(
    OpSpec("mbconv", ins, outs, size, kernel=kernel, expansion=expansion, groups=groups)
    for ins, outs, size in SHAPES
    for kernel, expansion, groups in OPTIONS
)
BATCHES = (1, 16)
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

Call = Callable[[], object]


def onnx_call(module: nn.Module, x: Tensor) -> Call:
    import numpy
    import onnxruntime

    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracing exporter, which takes a tenth of the other's time
        torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    binding, y = session.io_binding(), module(x)
    for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())

    def call(keep: tuple[Tensor, ...] = (x, y)) -> object:
        return session.run_with_iobinding(binding)

    return call


def calls_of(spec: OpSpec, batch: int) -> dict[str, Call]:
    torch.manual_seed(0)
    block = MBConv(spec).eval()
    folded = fuse(nn.Sequential(block))
    last: nn.Module = fuse(nn.Sequential(block)).to(memory_format=torch.channels_last)
    x = torch.randn(batch, spec.in_channels, spec.size, spec.size)
    x_last = x.to(memory_format=torch.channels_last)
    prepared = prepare(block)
    torch.testing.assert_close(prepared(x_last), folded(x), rtol=1e-3, atol=1e-3)
    return {
        "pynas": lambda: prepared(x_last),
        "torch": lambda: folded(x),
        "torch cl": lambda: last(x_last),
        "ort": onnx_call(folded, x),
    }


def times_us(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median CPU time of a call in us; the calls take turns."""
    repeats = {name: max(1, int(ROUND_SECONDS / cpu_s(call, 1))) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken["pynas"]) < LEAST_ROUNDS:
        for name, call in calls.items():
            taken[name].append(cpu_s(call, repeats[name]))
    return {name: 1e6 * median(values) for name, values in taken.items()}


def cpu_s(call: Call, repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return max((time.process_time() - begin) / repeats, 1e-9)


def ratios(taken: dict[str, float]) -> tuple[float, float, float]:
    """How many times as fast as eager, as onnxruntime, and as the better of the two."""
    eager, ort = min(taken["torch"], taken["torch cl"]), taken["ort"]
    return eager / taken["pynas"], ort / taken["pynas"], min(eager, ort) / taken["pynas"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("spec", BLOCKS[-2:] if SHORT else BLOCKS, ids=lambda spec: spec.key)
def test_block(benchmark: Any, spec: OpSpec, batch: int) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    with torch.no_grad():
        calls = calls_of(spec, batch)
        benchmark.group = f"{spec.key}, batch {batch}"
        benchmark.extra_info.update(times_us(calls, SECONDS))
        benchmark.pedantic(calls["pynas"], rounds=1 if SHORT else 5, iterations=1)


def main() -> None:
    if any(os.environ.get(name) != value for name, value in TUNED_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | TUNED_MALLOC)
    torch.set_num_threads(1)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    print(f"{cpu_model()}, {platform.system()}, torch {torch.__version__}, pynas {facts()['isa']}, medians in us")
    names = ("pynas", "torch", "torch cl", "ort")
    print(f"{'batch block':44s}" + "".join(f"{name:>10s}" for name in (*names, "eager/", "ort/")))
    found: dict[int, list[tuple[float, float, float]]] = {batch: [] for batch in BATCHES}
    with torch.no_grad():
        for batch in BATCHES:
            for spec in BLOCKS:
                taken = times_us(calls_of(spec, batch), seconds)
                found[batch].append(ratios(taken))
                numbers = "".join(f"{taken[name]:10.1f}" for name in names)
                print(f"{batch:5d} {spec.key:38s}{numbers}" + "{:10.2f}{:10.2f}".format(*found[batch][-1]), flush=True)
    for batch, rows in found.items():
        means = [prod(values) ** (1 / len(rows)) for values in zip(*rows, strict=True)]
        least = [min(values) for values in zip(*rows, strict=True)]
        print(
            f"batch {batch}, geometric means: {means[0]:.2f}x as fast as eager (least {least[0]:.2f}x), "
            f"{means[1]:.2f}x as fast as onnxruntime (least {least[1]:.2f}x), {means[2]:.2f}x as the better"
        )


if __name__ == "__main__":
    main()
