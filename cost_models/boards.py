"""Ops on boards: several boards at a time, each op wholly on one, and none of a board's moods in the table."""

from __future__ import annotations

import math
import queue
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .spec import OpSpec
from .steady import settled

TRIES = 4  # of an op, before it is reported as missing
PAUSES_S = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)  # before the next try; a board that cannot be reached after the last is lost
ABSURD_MS = 1e9
ABSURD_RATIO = 20.0  # of a repeat to the median of the others
NOISE_MS = 0.02  # a smaller difference is not absurd: of a tiny op, little is left when the call is taken off


class Unreachable(OSError):
    """No connection to a board, or to the tracker that lends it."""


class Failed(RuntimeError):
    """A board was reached, but an op did not come through."""


class Board(Protocol):
    """One place where ops can be timed. Used by one thread at a time."""

    name: str

    def time_ms(self, compiled: Path, repeats: int) -> list[float]:
        """Latency in ms of a compiled op, at least `repeats` times.

        Raises:
            Unreachable: no connection; another op would fare no better.
            Failed: the op or the board failed on the way.
            ValueError: what must not be tried again, such as a board of another CPU.
        """
        ...

    def close(self) -> None:
        """Let the board go, from any thread, even in the middle of a measurement."""
        ...


def check_repeats(latencies: Sequence[float]) -> None:
    """Refuse what no board can have measured.

    Raises:
        Failed: a value is not positive, not finite, at least 1e9 ms, or 20 times more or less than the median of the
            others and 0.02 ms off it.
    """
    for number, value in enumerate(latencies):
        others = [other for at, other in enumerate(latencies) if at != number]
        if not math.isfinite(value) or not 0 < value < ABSURD_MS:
            raise Failed(f"gave a latency of {value} ms")
        middle = statistics.median(others) if others else value
        if not middle / ABSURD_RATIO <= value <= middle * ABSURD_RATIO and abs(value - middle) > NOISE_MS:
            raise Failed(f"gave a latency of {value:.4g} ms among others of {middle:.4g} ms")


@dataclass
class _Work:
    """What all lanes share."""

    ops: Mapping[OpSpec, Path]
    repeats: int
    todo: deque[OpSpec]
    told: queue.Queue[tuple[OpSpec, list[float] | BaseException] | None] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)


def time_on_boards(
    boards: Sequence[Board], ops: Mapping[OpSpec, Path], repeats: int, done: Callable[[OpSpec, list[float]], None]
) -> dict[OpSpec, str]:
    """Time ops, each board taking the next as soon as it is free.

    An op that fails is tried again after growing pauses. A board that stays out of reach is given up; its op goes to
    the others.

    Args:
        boards: at least one; closed at the end.
        ops: folders of compiled ops.
        repeats: per op.
        done: receives each op's latencies in ms, in this thread.

    Returns:
        Ops that could not be timed, with the reason.

    Raises:
        ValueError: what a board raised that must not be tried again.
    """
    work = _Work(ops, repeats, deque(ops))
    missing: dict[OpSpec, str] = {}
    working = list(boards)
    lost = ""
    try:
        while work.todo and working:
            for board, reason in _run_lanes(working, work, missing, done):
                working.remove(board)
                lost = reason
    finally:
        work.stop.set()
        for board in boards:
            board.close()
    return missing | dict.fromkeys(work.todo, lost)


def _run_lanes(
    boards: Sequence[Board], work: _Work, missing: dict[OpSpec, str], done: Callable[[OpSpec, list[float]], None]
) -> list[tuple[Board, str]]:
    """Let all boards work until nothing is left to do or they are lost; returns those that were."""
    lost: list[tuple[Board, str]] = []
    lanes = [threading.Thread(target=_lane, args=(board, work, lost), daemon=True) for board in boards]
    for lane in lanes:
        lane.start()
    running = len(lanes)
    while running:
        news = work.told.get()
        if news is None:
            running -= 1
            continue
        spec, outcome = news
        if isinstance(outcome, list):
            done(spec, outcome)
        elif isinstance(outcome, Failed):
            missing[spec] = str(outcome)
        else:
            raise outcome
    return lost


def _lane(board: Board, work: _Work, lost: list[tuple[Board, str]]) -> None:
    """One board's work, in a thread of its own."""
    try:
        while work.todo and not work.stop.is_set():
            try:
                spec = work.todo.popleft()
            except IndexError:  # another board was faster
                break
            try:
                work.told.put((spec, time_patiently(board, work.ops[spec], work.repeats, work.stop)))
            except Unreachable as error:
                work.todo.appendleft(spec)
                lost.append((board, str(error)))
                break
            except Failed as error:
                work.told.put((spec, error))
            except Exception as error:
                work.stop.set()
                work.told.put((spec, error))
    finally:
        work.told.put(None)


def time_patiently(board: Board, compiled: Path, repeats: int, stop: threading.Event | None = None) -> list[float]:
    """Time one op, trying again after growing pauses.

    Args:
        board: where.
        compiled: folder of the compiled op.
        repeats: how many.
        stop: set from elsewhere, ends the trying.

    Returns:
        Latency in ms, `repeats` times.

    Raises:
        Failed, Unreachable: patience ended.
        ValueError: what a board raised that must not be tried again.
    """
    stop = stop or threading.Event()
    failures = absences = 0
    while True:
        try:
            latencies = board.time_ms(compiled, repeats)
            check_repeats(latencies)
            return list(settled(latencies, repeats))
        except Failed as error:
            failures, absences = failures + 1, 0
            if failures == TRIES or stop.is_set():
                raise Failed(f"{board.name} {error} ({failures} tries)") from error
            pause = PAUSES_S[min(failures, len(PAUSES_S)) - 1]
        except Unreachable:
            absences += 1
            if absences > len(PAUSES_S) or stop.is_set():
                raise
            pause = PAUSES_S[absences - 1]
        stop.wait(pause)
