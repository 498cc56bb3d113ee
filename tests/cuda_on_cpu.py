"""Builds csrc/cuda as a library that plays a GPU on the CPU, as it is or with a fault planted in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pynas.kernels import cuda

SOURCES = Path(__file__).parent.parent / "csrc"
UNITS = ("sampling", "mbconv", "mbconv_infer", "mbconv_update")
COMPILER = os.environ.get("CXX", "c++")
# No contraction, as nvcc has it for sampling.cu: gates must be the CPU kernel's bit for bit.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DPYNAS_CUDA_ON_CPU", "-x", "c++")


def compiler() -> str | None:
    """The C++ compiler that pip took, if it is still here."""
    return shutil.which(COMPILER)


def build(folder: Path, fault: tuple[str, str, str] | None = None, units: tuple[str, ...] = UNITS) -> cuda.Library:
    """Compiles the sources into a folder.

    Args:
        folder: Where copies and objects go.
        fault: A file, text that occurs in it just once, and what stands there instead.
        units: Files to compile.
    """
    shutil.copytree(SOURCES / "shared", folder / "shared")
    shutil.copytree(SOURCES / "cuda", folder / "cuda")
    if fault is not None:
        name, text, instead = fault
        file = folder / "cuda" / name
        content = file.read_text(encoding="utf-8")
        assert content.count(text) == 1, f"{text!r} occurs {content.count(text)} times in {name}"
        file.write_text(content.replace(text, instead), encoding="utf-8")
    running = []
    for unit in units:
        command = [COMPILER, *FLAGS, "-c", str(folder / "cuda" / f"{unit}.cu"), "-o", str(folder / f"{unit}.o")]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    path = folder / "on_cpu.so"
    subprocess.run([COMPILER, "-shared", "-o", str(path), *(str(folder / f"{unit}.o") for unit in units)], check=True)
    return cuda.Library(path, "cpu")
