"""Runners: how one op is timed.

To add one (another runtime), write a class with the members of `Runner` and put it in `RUNNERS`. Its fields are its
options; each says in its metadata what it is for. One that turns ops into files first has the members of
`Compiling` too; one that measures on other machines those of `OnBoards`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .boards import Board
from .compiling import Compiler
from .machine import cpu_model, host
from .names import unknown
from .ort_local import OrtLocal
from .spec import OpSpec
from .timing import SWEEP_BYTES, check_threads, clock, input_shape, net_repeats_ms, no_gc, repeats_ms
from .torch_threads import torch_threads
from .tvm_local import TvmLocal
from .tvm_model import TvmModel
from .tvm_rpc import TvmRpc

__all__ = ["RUNNERS", "Compiling", "OnBoards", "Runner", "TorchHost", "cpu_model", "make_runner", "options_of"]


class Runner(Protocol):
    """Times ops on one device under fixed conditions. Rows made under different conditions never share a table."""

    name: str
    source: str  # "measured" on the device itself, or "modelled"
    precision: str
    threads: int
    batch: int
    schedule: str  # version of the way an op becomes code: change it when old and new rows must not mix

    def provenance(self) -> dict[str, dict[str, str | int]]:
        """The sections "machine" (with "cpu"), "software" (versions) and, if any, "build" (target) of device.toml.

        Raises:
            ImportError: the runtime is not installed.
            OSError, ValueError: the device cannot be reached.
        """
        ...

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        """Latency in ms of one run of the op, `repeats` times.

        Args:
            module: in eval mode with BN folded; for a `Compiling` runner what its `open` gave.
            spec: the op.
            repeats: how many.
        """
        ...

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """A whole network (torch, eval mode, BN folded) made ready; each call of what comes back is one repeat in ms,
        taken in the very same way as those of a row, so that several networks can take turns."""
        ...


@runtime_checkable
class Compiling(Protocol):
    """A runner that turns all ops into files before it times the first."""

    @property
    def compiler(self) -> Compiler:
        """How."""
        ...

    def open(self, folder: Path) -> Any:
        """Load a compiled op, and run it once against the outputs of torch that lie beside it.

        Raises:
            ValueError: the outputs differ.
        """
        ...


@runtime_checkable
class OnBoards(Protocol):
    """A compiling runner that times on other machines, several at a time."""

    def boards(self) -> list[Board]:
        """The boards that are there now. Each connects when it is first used, and lets go when it is closed."""
        ...


@dataclass
class TorchHost:
    """Times torch modules on this machine's CPU: fp32, batch 1, eager mode.

    Each repeat is the median of a few runs. Between runs, memory larger than the inner caches is read, as the rest of a
    network would do: in three FBNet spaces, ops timed in warm caches summed to 9 to 30 % less than in their network,
    with this sweep to between 16 % less and 4 % more. One thread is timed by its CPU time, several by the wall clock.
    """

    threads: int = 1
    name: str = field(default="torch", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default="eager-1", kw_only=True)

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {"machine": {"cpu": cpu_model(), **host()}, "software": {"torch": _torch_version()}}

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        return self._time(module, input_shape(spec, self.batch), repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        return lambda: self._time(module, input_shape, 1)[0]

    def time_net_ms(self, module: Any, input_shape: tuple[int, ...], repeats: int = 15) -> list[float]:
        """Time a whole network in the very same way as the rows of a table, so that both can be compared.

        Args:
            module: a torch module in eval mode, BN folded.
            input_shape: with the batch dimension.
            repeats: how many times to measure; takes 0.1 s or more each.

        Returns:
            Latency in ms of one run, `repeats` times; its median is what a table would hold.

        Raises:
            ValueError: the module is in training mode, or repeats is not positive.
        """
        return net_repeats_ms(self.net(module, input_shape), repeats)

    def _time(self, module: Any, input_shape: tuple[int, ...], repeats: int) -> list[float]:
        import torch

        if any(part.training for part in module.modules()):
            raise ValueError("The module to be timed is in training mode, or a part of it; call .eval() first.")
        image = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), torch_threads(self.threads), no_gc():
            sweep = torch.ones(SWEEP_BYTES // 4).sum
            return repeats_ms(lambda: module(image), sweep, repeats, clock(self.threads))


RUNNERS: dict[str, Callable[..., Runner]] = {
    "torch": TorchHost,
    "tvm-local": TvmLocal,
    "tvm-rpc": TvmRpc,
    "tvm-model": TvmModel,
    "ort-local": OrtLocal,
}


def options_of(runner: str) -> dict[str, str]:
    """The options of a runner beside `threads`, each with a line on what it is for.

    Raises:
        ValueError: an unknown runner.
    """
    fields: Any = dataclasses.fields(_runner_class(runner))
    return {entry.name: entry.metadata["help"] for entry in fields if "help" in entry.metadata}


def make_runner(runner: str, threads: int = 1, **options: Any) -> Runner:
    """A runner by name; options that are None count as not given.

    Raises:
        ValueError: an unknown runner, an option it does not take, or a value it refuses.
    """
    known = options_of(runner)
    given = {name: value for name, value in options.items() if value is not None}
    strange = sorted(set(given) - set(known))
    if strange:
        others = [name for name in RUNNERS if set(strange) <= set(options_of(name))]
        takes = f"it takes {', '.join(['threads', *known])}"
        hint = f" The runner {' or '.join(map(repr, others))} does." if others else ""
        raise ValueError(f"The runner {runner!r} takes no {', '.join(strange)}; {takes}.{hint}")
    return RUNNERS[runner](threads, **given)


def _runner_class(runner: str) -> Any:
    if runner not in RUNNERS:
        raise unknown("runner", runner, RUNNERS)
    return RUNNERS[runner]


def _torch_version() -> str:
    """Read from the package's metadata, because importing torch takes seconds."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
