"""Boards on which nothing works: found out after a few ops, not after all of them and all tries of each."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .boards import TRIES, Board, Failed, check_repeats
from .spec import OpSpec

ENOUGH = 3  # ops that failed in the same way while none came through
NUMBER = re.compile(r"[0-9a-f]{8,}|[-+]?\d[\d.e+-]*")


class AllAlike(Exception):
    """No op came through, on no board, and several failed in the same way."""


@dataclass
class Watch:
    """What became of the ops on all boards so far.

    Args:
        boards: how many there are; each must have failed before anything is concluded.
    """

    boards: int
    _worked: bool = False
    _tries: Counter[Path] = field(default_factory=Counter)
    _alike: dict[str, dict[Path, str]] = field(default_factory=dict)  # ops given up, by reason without its numbers
    _failing: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def worked(self) -> None:
        self._worked = True

    def failed(self, board: str, compiled: Path, reason: str) -> None:
        """Take note.

        Raises:
            AllAlike: it makes no sense to go on.
        """
        with self._lock:
            self._failing.add(board)
            self._tries[compiled] += 1
            if self._tries[compiled] < TRIES:
                return
            alike = self._alike.setdefault(NUMBER.sub("#", reason), {})
            alike[compiled] = f"{board} {reason}"
            if len(alike) >= ENOUGH and not self._worked and len(self._failing) >= self.boards:
                raise AllAlike(reason)

    def missing(self, ops: Mapping[OpSpec, Path]) -> dict[OpSpec, str]:
        """Why each of the ops is missing, after `AllAlike`: the same words for all that failed alike."""
        told = {compiled: next(iter(alike.values())) for alike in self._alike.values() for compiled in alike}
        others = f"not tried, because nothing came through and {max(map(len, self._alike.values()))} had failed alike"
        return {spec: told.get(compiled, others) for spec, compiled in ops.items()}


@dataclass
class Watched:
    """A board whose failures are noted: a `Board`."""

    board: Board
    watch: Watch
    name: str

    def time_ms(self, compiled: Path, repeats: int) -> list[float]:
        try:
            latencies = self.board.time_ms(compiled, repeats)
            check_repeats(latencies)
        except Failed as error:
            self.watch.failed(self.name, compiled, str(error))
            raise
        self.watch.worked()
        return latencies

    def close(self) -> None:
        self.board.close()


def watched(boards: Sequence[Board]) -> tuple[list[Watched], Watch]:
    """The boards with one watch over all of them."""
    watch = Watch(len({board.name for board in boards}))
    return [Watched(board, watch, board.name) for board in boards], watch
