"""CPUs that code is made for.

To add one, add an entry to `TARGETS`: its family decides the shape of every kernel, its core only the order of
instructions.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cost_models.names import unknown

Family = Literal["x86", "aarch64", "armv7"]


@dataclass(frozen=True)
class Target:
    """A CPU, as far as its code depends on it.

    Args:
        name: Under which it is asked for.
        family: Of instruction sets.
        triple: LLVM's, for instance "aarch64-linux-gnu"; empty for this machine.
        cpu: LLVM's name of the core.
        features: LLVM's, "+neon" or "-avx512f", beyond those of the core.
        lanes: Float32 numbers in one vector register.
        registers: Vector registers.
        compiler: Command of the C compiler that links for it.
    """

    name: str
    family: Family
    triple: str
    cpu: str
    features: tuple[str, ...]
    lanes: int
    registers: int
    compiler: str

    @property
    def native(self) -> bool:
        """Whether this machine runs its code."""
        return not self.triple

    def tvm(self) -> Any:
        """The `tvm.target.Target`. Raises ImportError when TVM is not installed."""
        settings: dict[str, Any] = {"kind": "llvm", "mcpu": self.cpu, "num-cores": 1}
        if self.triple:
            settings["mtriple"] = self.triple
        if self.triple.endswith("hf"):
            settings["mfloat-abi"] = "hard"
        if self.features:
            settings["mattr"] = list(self.features)
        return import_tvm().target.Target(settings)


def import_tvm() -> Any:
    """The package `tvm`. Raises ImportError with the command that installs it."""
    try:
        import tvm
    except ImportError as error:
        raise ImportError("TVM is not installed. Install it with: pip install 'pynas[tvm]'") from error
    return tvm


@functools.cache
def _host() -> Target:
    """This machine, by what its processor and operating system really offer: virtual machines mask features."""
    tvm = import_tvm()
    cpu = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    if platform.machine().lower() in ("aarch64", "arm64"):
        return Target("host", "aarch64", "", cpu, ("+neon",), 4, 32, "gcc")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ValueError(f"Code for this machine ({platform.machine()}) cannot be made; only x86-64 and aarch64 can.")
    found = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    present = {str(name) for name, value in found.items() if value}
    implied = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    vector = {name for name in map(str, implied) if name.startswith(("avx", "amx")) or name in ("fma", "f16c")}
    masked = tuple(f"-{name}" for name in sorted(vector - present))
    if {"avx512f", "avx512vl"} <= present:
        return Target("host", "x86", "", cpu, masked, 16, 32, "gcc")
    if {"avx2", "fma"} <= present:
        return Target("host", "x86", "", cpu, masked, 8, 16, "gcc")
    return Target("host", "x86", "", cpu, masked, 4, 16, "gcc")


def _aarch64(name: str) -> Callable[[], Target]:
    return lambda: Target(
        name, "aarch64", "aarch64-linux-gnu", name, ("+neon",), lanes=4, registers=32, compiler="aarch64-linux-gnu-gcc"
    )


def _armv7() -> Target:
    """Any 32-bit Raspberry Pi from model 2 on; scheduled for the Cortex-A53 of models 2 (late) and 3."""
    return Target(
        "armv7",
        "armv7",
        "armv7l-linux-gnueabihf",
        "cortex-a53",
        ("+neon",),
        lanes=4,
        registers=16,
        compiler="arm-linux-gnueabihf-gcc",
    )


TARGETS: dict[str, Callable[[], Target]] = {
    "host": _host,
    "cortex-a53": _aarch64("cortex-a53"),
    "cortex-a55": _aarch64("cortex-a55"),
    "cortex-a72": _aarch64("cortex-a72"),
    "cortex-a76": _aarch64("cortex-a76"),
    "neoverse-n1": _aarch64("neoverse-n1"),
    "armv7": _armv7,
}


def target(name: str) -> Target:
    """A target by name.

    Raises:
        ValueError: there is no such target; the message lists them.
        ImportError: "host" is asked for and TVM, which knows the machine, is not installed.
    """
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]()
