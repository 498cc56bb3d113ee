"""Compiled code against torch: a wrong op is an error, never a row in a table."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .build import Built
from .nodes import Array
from .targets import Target

TOLERANCE = 1e-4
TIMEOUT_S = 300

EMULATORS = {"aarch64": "qemu-aarch64", "armv7": "qemu-arm"}


def why_not(target: Target) -> str:
    """Why code for a target cannot be run here, as a sentence that says what to install; empty if it can."""
    if target.native:
        return ""
    emulator = EMULATORS.get(target.family, "")
    missing = {emulator: "qemu-user", target.compiler: f"gcc-{target.compiler.removesuffix('-gcc')}"}
    packages = [package for command, package in missing.items() if shutil.which(command) is None]
    if not packages:
        return ""
    return f"Code for {target.name} cannot be checked here. Install: sudo apt-get install {' '.join(packages)}"


def can_check(target: Target) -> bool:
    """Whether code for a target can be run here, natively or emulated."""
    return not why_not(target)


def to_channels_last(x: Array) -> Array:
    """(N, C, H, W) to (N, H, W, C); other shapes as they are."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def to_channels_first(x: Array) -> Array:
    """(N, H, W, C) to (N, C, H, W); other shapes as they are."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def check(built: Built, module: Any, input_shape: Sequence[int], seed: int = 0, name: str = "") -> float:
    """Runs compiled code on a random input, natively or under qemu-user, and compares with torch.

    Args:
        built: From `build`.
        module: The torch module that it was built from, unchanged since.
        input_shape: As torch has it.
        seed: Of the input.
        name: Of the op, for errors.

    Returns:
        The largest absolute difference over the largest absolute value of torch's answer.

    Raises:
        ValueError: it is more than 1e-4, or the code cannot be run here (see `why_not`).
    """
    import torch

    x = torch.randn(tuple(input_shape), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = module(x.clone()).numpy()  # its first layer may work in place
    source = to_channels_last(x.numpy())
    answer = built.run(source) if built.target.native else emulate(built, source)
    return compare(to_channels_first(answer), expected, f"{name or _names(built)} for {built.target.name}")


def compare(answer: Array, expected: Array, what: str) -> float:
    """The largest absolute difference over the largest absolute expected value.

    Args:
        answer: Of the code, in the order of `expected`; its shape may differ by dimensions of size 1.
        expected: Torch's.
        what: The op, for errors.

    Raises:
        ValueError: it is more than 1e-4, or not a number, or torch's own answer is zero or not finite.
    """
    if [size for size in answer.shape if size != 1] != [size for size in expected.shape if size != 1]:
        raise ValueError(f"The code of {what} is wrong: its answer has shape {answer.shape}, torch's {expected.shape}.")
    scale = float(np.abs(expected).max())
    if not 0 < scale < float("inf"):
        raise ValueError(f"The code of {what} cannot be checked: torch's own answer is all zero or not finite.")
    error = float(np.abs(answer.reshape(expected.shape).astype(np.float64) - expected).max()) / scale
    if not error <= TOLERANCE:
        raise ValueError(
            f"The code of {what} is wrong: it differs from torch by {error:.1e} of the largest output, more than "
            f"{TOLERANCE:g}. Nothing was recorded; please report it."
        )
    return error


def emulate(built: Built, x: Array, repeats: int = 1) -> Array:
    """Runs a network as a stand-alone program, under qemu-user where the target is another machine.

    Args:
        built: From `build`.
        x: Float32 of `built.input_shape`.
        repeats: How often the network runs.

    Raises:
        ValueError: emulator or compiler are not installed, or the program fails.
    """
    return emulated(built, repeats)(x)


def emulated(built: Built, repeats: int = 1) -> Callable[[Array], Array]:
    """The same for many inputs: the program is made once, and removed with the function that is returned.

    Raises:
        ValueError: emulator or compiler are not installed; or, when called, the program fails.
    """
    reason = why_not(built.target)
    if reason:
        raise ValueError(reason)
    folder = Path(tempfile.mkdtemp(prefix="pynas-"))
    try:
        program = built.program(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

    def run(x: Array) -> Array:
        return execute(built, program, x, repeats)

    weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    return run


def execute(built: Built, program: Path, x: Array, repeats: int = 1) -> Array:
    """Runs a program made by `Built.program`.

    Args:
        built: What it was made from.
        program: The executable; input and output files are written next to it.
        x: Float32 of `built.input_shape`.
        repeats: How often the network runs.

    Returns:
        Float32 of `built.output_shape`.

    Raises:
        ValueError: the program fails, or does not end within five minutes.
    """
    source, answer = program.with_name("input.bin"), program.with_name("output.bin")
    source.write_bytes(np.ascontiguousarray(x, np.float32).tobytes())
    emulator = [] if built.target.native else [EMULATORS[built.target.family]]
    command = [*emulator, str(program.absolute()), str(source), str(answer), str(repeats)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"The code of {_names(built)} did not end within {TIMEOUT_S} s.") from error
    if result.returncode:
        raise ValueError(
            f"The code of {_names(built)} for {built.target.name} fails (exit status {result.returncode}): "
            f"{result.stderr.strip()[:200]}"
        )
    return np.frombuffer(answer.read_bytes(), np.float32).reshape(built.output_shape)


def _names(built: Built) -> str:
    """The layers of a network in a few words."""
    names = [f"{name} ({layer})" for name, layer in built.kernels.items()]
    return ", ".join(names) if len(names) <= 3 else f"a network of {len(built.steps)} layers"
