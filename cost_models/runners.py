"""Runners: how one op is timed.

To add one (another runtime, a board over RPC), write a class with the members of `Runner` and put it in `RUNNERS`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .spec import OpSpec
from .steady import in_rounds, settled

REPEAT_MS = 1.5
MIN_RUNS, MAX_RUNS = 3, 11  # per repeat
SWEEP_BYTES = 8 << 20  # between the sizes of usual second and third level caches


class Runner(Protocol):
    """Times ops on one device under fixed conditions. Rows made under different conditions never share a table."""

    name: str
    source: str  # "measured" on the device itself, or "modelled"
    precision: str
    threads: int
    batch: int
    schedule: str  # version of the way an op becomes code: change it when old and new rows must not mix

    def provenance(self) -> dict[str, dict[str, str | int]]:
        """The sections "machine" (with "cpu") and "software" (versions) of device.toml."""
        ...

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        """Latency in ms of one run of the op, `repeats` times. The module is in eval mode with BN folded."""
        ...


@dataclass
class TorchHost:
    """Times torch modules on this machine's CPU: fp32, batch 1, eager mode.

    Each repeat is the median of a few runs. Between runs, memory larger than the inner caches is read, as the rest of a
    network would do: in three FBNet spaces, ops timed in warm caches summed to 9 to 30 % less than in their network,
    with this sweep to between 16 % less and 4 % more. One thread is timed by its CPU time, several by the wall clock.
    """

    threads: int = 1
    name: str = "torch"
    source: str = "measured"
    precision: str = "fp32"
    batch: int = 1
    schedule: str = "eager-1"

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ValueError(f"threads is {self.threads!r}; it must be a whole number of at least 1.")

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {
            "machine": {
                "cpu": cpu_model(),
                "cores": os.cpu_count() or 1,
                "system": f"{platform.system()} {platform.machine()}",
            },
            "software": {"torch": _torch_version()},
        }

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        pixels = () if spec.kind == "linear" else (spec.size, spec.size)
        return self._time(module, (self.batch, spec.in_channels, *pixels), repeats)

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
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; it must be at least 1.")
        taken: dict[str, list[float]] = {"net": []}
        for _ in in_rounds({"net": lambda: self._time(module, input_shape, 1)[0]}, taken, repeats):
            pass
        return list(settled(taken["net"], repeats))

    def _time(self, module: Any, input_shape: tuple[int, ...], repeats: int) -> list[float]:
        import torch

        if any(part.training for part in module.modules()):
            raise ValueError("The module to be timed is in training mode, or a part of it; call .eval() first.")
        image = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), _torch_threads(self.threads), _no_gc():
            sweep = torch.ones(SWEEP_BYTES // 4).sum
            return _repeats_ms(lambda: module(image), sweep, repeats, _clock(self.threads))


RUNNERS: dict[str, Callable[..., Runner]] = {"torch": TorchHost}


def _torch_version() -> str:
    """Read from the package's metadata, because importing torch takes seconds."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Name of this machine's CPU, with family and model where Linux tells: virtual machines shorten the name."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), " ".join(filter(str.isprintable, value.split())))
    if "model name" in fields and "cpu family" in fields:
        return f"{fields['model name']} (family {fields['cpu family']} model {fields.get('model', '?')})"
    if "CPU part" in fields:  # ARM Linux
        return f"ARM implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return fields.get("model name") or platform.processor() or platform.machine()


def _repeats_ms(
    run: Callable[[], Any], between: Callable[[], Any], repeats: int, clock: Callable[[], int]
) -> list[float]:
    """Latency in ms, `repeats` times: each the median of a few runs."""

    def once_ms() -> float:
        between()
        begin = clock()
        run()
        return (clock() - begin) * 1e-6

    for _ in range(2):  # first runs allocate and choose algorithms
        run()
    shortest_ms = max(min(once_ms() for _ in range(3)), 1e-6)
    runs = max(MIN_RUNS, min(MAX_RUNS, round(REPEAT_MS / shortest_ms)))
    return [statistics.median(once_ms() for _ in range(runs)) for _ in range(repeats)]


def _clock(threads: int) -> Callable[[], int]:
    """CPU time of this thread where it does all the work, so that other processes on its core do not count."""
    fine = time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time_ns if threads == 1 and fine else time.perf_counter_ns


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
