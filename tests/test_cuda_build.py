"""What nvcc makes of csrc/cuda: it compiles for both targets, and ptxas's report holds no surprise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest

NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")]

TARGETS = ("sm_80", "sm_90")
# Kernels in which a step spends its time: what does not fit their registers would go through memory.
HOT = (
    *("expand_depthwise", "project_gradient", "depthwise_gradient", "project_weights", "expand_weights"),
    *("input_moments", "input_products", "input_gradient", "products_gradient", "combine", "folded_block", "project"),
)
THREADS, REGISTERS_OF_ONE = 128, 65536  # of a block; of a multiprocessor
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def report(unit: str, target: str, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Stack frame and spilled bytes of each kernel, and its registers, by mangled name."""
    flags = ["--fmad=false"] if unit == "sampling" else []
    source = cuda_on_cpu.SOURCES / "cuda" / f"{unit}.cu"
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", f"-arch={target}", "-cubin", "-Xptxas", "-v", *flags, str(source)]
    done = subprocess.run([*command, "-o", str(folder / f"{unit}.cubin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, uses = ENTRY.findall(done.stderr), USE.findall(done.stderr)
    registers = REGISTERS.findall(done.stderr)
    assert len(names) == len(uses) == len(registers) > 0
    return {
        name: (int(frame), int(stores) + int(loads), int(count))
        for name, (frame, stores, loads), count in zip(names, uses, registers, strict=True)
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", cuda_on_cpu.UNITS)
def test_ptxas_report(unit: str, target: str, tmp_path: Path) -> None:
    found = report(unit, target, tmp_path)
    seen = set()
    for name, (frame, spilled, registers) in found.items():
        hot = [kernel for kernel in HOT if re.search(rf"\d{kernel}(I|E)", name)]
        seen.update(hot)
        if hot:
            assert (frame, spilled) == (0, 0), f"{name} needs {frame} bytes of stack and spills {spilled}"
        assert registers * THREADS * 3 <= REGISTERS_OF_ONE, (
            f"{name} has {registers} registers: not three blocks fit a multiprocessor"
        )
    if unit == "mbconv":
        assert seen == set(HOT) - {"folded_block"}
