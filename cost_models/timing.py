"""Timing one call of something on this machine, the same way for every runtime."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .compiling import Compiler, compile_all, nothing
from .spec import OpSpec
from .steady import RESOLUTION_MS, in_rounds, settled, steady

REPEAT_MS = 1.5
MIN_RUNS, MAX_RUNS = 3, 11  # per repeat
SWEEP_BYTES = 8 << 20  # between the sizes of usual second and third level caches
CALLS_KEPT = 99  # repeats, over whose steady ones the cost of a call is a median


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
    with no_gc():
        return repeats_ms(run, sweep(), repeats, clock(threads))


def sweep() -> Callable[[], Any]:
    """What reads SWEEP_BYTES."""
    import numpy as np

    read: Callable[[], Any] = np.ones(SWEEP_BYTES // 4, np.float32).sum
    return read


class CallTimer:
    """Times what a runtime computes, without what it takes to call that runtime.

    A network is called once, but each row of a table would hold a call of its own, which in cold caches takes 3 to 12
    us: sums of rows of a network of 20 us came out at twice its latency. So three things run after each sweep. `warm`
    comes first, untimed: within a network, the way into the runtime is warm from the layer before. Then `idle`, and
    then what is to be timed. `idle` computes next to nothing, but is as cold as any op: its code, its weights and its
    virtual machine were swept away too. Its time is taken off.

    By TVM, over 30 networks each, the bias of sums went from +133 % to -6 % in `fbnet_tiny` (mean error after
    calibration from 8.7 % to 2.7 %), from -6 % to -12 % in `fbnet32`, and from -10 % to -16 % in `fbnet`, where calls
    had hidden what an op timed alone is too cheap; calibration takes care of that.

    Tried and not worth it: reading the op's input again after the sweep, as a network's layer before has just written
    it, moved the bias by one point in the large spaces and by five, away from zero, in `fbnet_tiny`, and the order not
    at all; sweeping 16 MB instead of 8 left larger errors after calibration.

    Args:
        warm: as `idle`, from other files.
        idle: see above.
        threads: of the runtime.
    """

    def __init__(self, warm: Callable[[], Any], idle: Callable[[], Any], threads: int) -> None:
        self._warm, self._idle = warm, idle
        self._sweep, self._clock = sweep(), clock(threads)
        self._calls_ms: deque[float] = deque(maxlen=CALLS_KEPT)
        for run in (warm, idle):
            run()

    @classmethod
    def of(cls, compiler: Compiler, opened: Callable[[Path], Callable[[], Any]], threads: int) -> CallTimer:
        """For a runtime that loads what `compiler` made by `opened`."""
        folders = compile_all({label: nothing(label) for label in ("nothing-warm", "nothing-idle")}, compiler)
        warm, idle = map(opened, folders.values())
        return cls(warm, idle, threads)

    @property
    def call_ms(self) -> float:
        """What is taken off: the median over the last repeats that were not disturbed."""
        return statistics.median(steady(self._calls_ms))

    def note(self) -> dict[str, str | int]:
        """For the section "machine" of a table: call_ns, rounded; empty when nothing was timed yet."""
        return {"call_ns": round(1e6 * self.call_ms)} if self._calls_ms else {}

    def runs_ms(self, run: Callable[[], Any], repeats: int) -> list[float]:
        """Latency in ms without the call, `repeats` times; what is below 0.1 us, and so below what can be told apart
        from the call, is given as 0.1 us."""
        with no_gc():
            for _ in range(2):  # first runs allocate and choose algorithms
                run()
            runs = runs_per_repeat(min(whole for _, whole in self._once_ms(run, 3)))
            return [self._repeat_ms(run, runs) for _ in range(repeats)]

    def _repeat_ms(self, run: Callable[[], Any], runs: int) -> float:
        calls, wholes = zip(*self._once_ms(run, runs), strict=True)
        self._calls_ms.append(statistics.median(calls))
        whole_ms: float = statistics.median(wholes)
        return max(RESOLUTION_MS, whole_ms - self.call_ms)

    def _once_ms(self, run: Callable[[], Any], runs: int) -> Iterator[tuple[float, float]]:
        """Of the call alone and of the whole run, `runs` times."""
        clock = self._clock
        for _ in range(runs):
            self._sweep()
            self._warm()
            clock()
            begin = clock()
            self._idle()
            middle = clock()
            run()
            end = clock()
            yield (middle - begin) * 1e-6, (end - middle) * 1e-6


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
