"""Kernels: fast C++ for mathematics that plain PyTorch states first.

To add a kernel `stem`:

1. `csrc/cpu/stem.h`: a struct of parameters (sizes, dense arrays as pointers) and a table of functions, declared with
   PYNAS_DECLARE_TABLE. `csrc/cpu/stem.cpp`: the code, in an anonymous namespace and without standard containers,
   because it is compiled once per instruction set; list it in CMakeLists.txt. What a GPU would share goes to
   `csrc/shared/`.
2. `csrc/module.cpp`: the table in `Kernels`, and `bind_stem`. Where one call is short, bind a `FastMethod`: it reads,
   checks and makes tensors in C++ (`csrc/tensors.h`), without torch's headers, in some 40 ns each, and returns None
   for what it cannot take. Elsewhere sizes and addresses do.
3. `pynas/kernels/stem.py`: the reference in plain PyTorch; the hot path, an `autograd.Function` over `native.KERNELS`
   (imported by name) that falls back to the reference; the operator, `torch.library.custom_op` with `register_fake` and
   `register_autograd`; samples; and one `Kernel` record that holds them.
4. Its import line and its entry in `ALL` below. `tests/test_kernels.py` and `bench/bench_kernels.py` walk `ALL`: they
   test and time the new kernel from then on.

To give a kernel a GPU: `csrc/cuda/stem.cu`, against `device.h` alone, with an exported function that takes a struct and
a stream and returns null or what went wrong; its line in CMakeLists.txt; `pynas/kernels/cuda_stem.py`, which fills the
struct; a branch in the kernel's function where `takes` says so; its name in `tests/test_cuda.py`.

Shapes, dtypes, ranges, devices and dense memory are checked before a kernel runs: by a `FastMethod` for its tensors, by
the caller in Python before an address leaves it. Messages are Python's. Sums run in a fixed order, so that a result
depends neither on threads nor, where that is promised, on the instruction set.
"""

from __future__ import annotations

import torch

from pynas.kernels import cuda, cuda_verdicts, native
from pynas.kernels.edge import MIXED_EDGE, mixed_edge
from pynas.kernels.gumbel import GUMBEL_GATES, GumbelGates, gumbel_gates
from pynas.kernels.kernel import Kernel
from pynas.kernels.mbconv import MIXED_MBCONV, mixed_mbconv
from pynas.kernels.mbconv_infer import MBCONV_INFERENCE
from pynas.kernels.patches import PATCH_MOMENTS, patch_moments
from pynas.kernels.paths import FAIR_PATHS, SAMPLE_PATHS, fair_paths, sample_paths, uniform_paths

ALL: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *(GUMBEL_GATES, SAMPLE_PATHS, FAIR_PATHS),
        *(MIXED_MBCONV, MBCONV_INFERENCE, MIXED_EDGE, PATCH_MOMENTS),
    )
}


def facts() -> dict[str, str | bool]:
    """What `pynas info` says about the kernels: whether they are built, how, and for what."""
    return native.facts() | {"cuda": cuda.state()} | _tuned()


def _tuned() -> dict[str, str | bool]:
    if not cuda.built() or not torch.cuda.is_available():
        return {}
    verdicts = cuda_verdicts.read(torch.device("cuda", torch.cuda.current_device())).values()
    faster = sum(verdict.fused for verdict in verdicts)
    told = (
        f"{faster} of {len(verdicts)} passes of layers faster here" if verdicts else "nothing yet; pynas kernels tune"
    )
    return {"cuda_timed": told}


__all__ = [
    "ALL",
    "GumbelGates",
    "Kernel",
    "facts",
    "fair_paths",
    "gumbel_gates",
    "mixed_edge",
    "mixed_mbconv",
    "patch_moments",
    "sample_paths",
    "uniform_paths",
]
