"""Timing one call of something on this machine, the same way for every runtime."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from .spec import OpSpec
from .steady import in_rounds, settled

REPEAT_MS = 1.5
MIN_RUNS, MAX_RUNS = 3, 11  # per repeat
SWEEP_BYTES = 8 << 20  # between the sizes of usual second and third level caches


def input_shape(spec: OpSpec, batch: int) -> tuple[int, ...]:
    """Shape of an op's input in torch's layout: (batch, channels, height, width), for linear (batch, channels)."""
    return (batch, spec.in_channels) if spec.kind == "linear" else (batch, spec.in_channels, spec.size, spec.size)


def runs_per_repeat(latency_ms: float) -> int:
    """How many runs make a repeat, whose latency is their median."""
    return max(MIN_RUNS, min(MAX_RUNS, round(REPEAT_MS / max(latency_ms, 1e-6))))


def repeats_ms(
    run: Callable[[], Any], between: Callable[[], Any], repeats: int, clock: Callable[[], int]
) -> list[float]:
    """Latency in ms, `repeats` times: each the median of a few runs.

    Args:
        run: what is timed.
        between: called before each run, not timed; reads as much memory as the rest of a network would (SWEEP_BYTES).
        repeats: how many.
        clock: in ns.
    """

    def once_ms() -> float:
        between()
        begin = clock()
        run()
        return (clock() - begin) * 1e-6

    for _ in range(2):  # first runs allocate and choose algorithms
        run()
    runs = runs_per_repeat(min(once_ms() for _ in range(3)))
    return [statistics.median(once_ms() for _ in range(runs)) for _ in range(repeats)]


def net_repeats_ms(once: Callable[[], float], repeats: int) -> list[float]:
    """Latency in ms of one thing, taken like the rows of a table: see `cost_models.steady`.

    Raises:
        ValueError: repeats is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1.")
    taken: dict[str, list[float]] = {"net": []}
    for _ in in_rounds({"net": once}, taken, repeats):
        pass
    return list(settled(taken["net"], repeats))


def runs_ms(run: Callable[[], Any], threads: int, repeats: int) -> list[float]:
    """Latency in ms of something that runs on so many threads, `repeats` times."""
    import numpy as np

    with no_gc():
        return repeats_ms(run, np.ones(SWEEP_BYTES // 4, np.float32).sum, repeats, clock(threads))


def clock(threads: int) -> Callable[[], int]:
    """CPU time of this thread where it does all the work, so that other processes on its core do not count."""
    fine = time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time_ns if threads == 1 and fine else time.perf_counter_ns


def check_threads(threads: int) -> None:
    """Raise ValueError unless a number of threads is a whole number of at least 1."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; it must be a whole number of at least 1.")


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Without Python's garbage collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
