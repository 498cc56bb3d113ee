"""Faults planted in the CUDA sources, which the threads played on a CPU must find."""

from __future__ import annotations

from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from test_cuda import agree, results

from pynas import kernels
from pynas.kernels import cuda

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="no C++ compiler to build CUDA kernels with")

CPU = torch.device("cpu")

FAULTS = {
    "a barrier less": (
        "mbconv_forward.h",
        "return activate(kind, value + bias[column]); });\n    __syncthreads();",
        "return activate(kind, value + bias[column]); });",
    ),
    "an index off by one": (
        "tile.h",
        "h[((row * S + ky) * kIn + i) * kChunk + lane]",
        "h[((row * S + ky) * kIn + i + 1) * kChunk + lane]",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    faulty = cuda_on_cpu.build(tmp_path / "faulty", FAULTS[name], units=("mbconv", "mbconv_update"))
    kernel = kernels.ALL["mixed_mbconv"]
    found = []
    for args in kernel.samples(CPU, torch.float32)[:3]:
        theirs = results(kernel.reference, args)
        with cuda.using(faulty):
            try:
                found.append(not agree(kernel, results(kernel.function, args), theirs))
            except RuntimeError as error:
                found.append(str(error).startswith("A CUDA kernel of pynas failed"))
    assert any(found)
