"""Timing on a machine that others use too.

Other load only ever adds time, and comes in bursts of a second or so. Latencies well above the fastest one of the same
op are therefore taken again, later: a row speaks for a machine that is left alone. On a busy 2-core virtual machine
this brought the largest error of a row from 60 % to 5 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

TOLERANCE = 1.1  # the fastest times this is still steady
RESOLUTION_MS = 1e-4  # of a latency without its call (`cost_models.timing`): what differs by less is equal
PATIENCE = 4  # rounds per wanted repeat before the rest is accepted as it is
ROUND_SECONDS = 0.1  # a round lasts at least this long, so that the repeats of few ops outlast a burst

Key = TypeVar("Key", bound=Hashable)


def steady(latencies: Collection[float]) -> tuple[float, ...]:
    """Those latencies that lie within 10 % of the fastest, or within 0.1 us."""
    limit = _limit(latencies)
    return tuple(latency for latency in latencies if latency <= limit)


def settled(latencies: Sequence[float], repeats: int) -> tuple[float, ...]:
    """The first `repeats` steady latencies; on a machine that never calmed down, the fastest others fill the gap."""
    kept = steady(latencies)[:repeats]
    limit = _limit(latencies)
    others = sorted(latency for latency in latencies if latency > limit)
    return kept + tuple(others[: repeats - len(kept)])


def _limit(latencies: Collection[float]) -> float:
    fastest = min(latencies, default=0.0)
    return max(TOLERANCE * fastest, fastest + RESOLUTION_MS)


def in_rounds(take: Mapping[Key, Callable[[], float]], taken: Mapping[Key, list[float]], repeats: int) -> Iterator[Key]:
    """Time several things in turn until each has `repeats` steady latencies, or patience ends.

    Args:
        take: measures one latency of a thing.
        taken: receives the latencies; may hold some already.
        repeats: steady latencies wanted of each.

    Yields:
        The thing whose list has just grown.
    """
    for _ in range(PATIENCE * repeats):
        lacking = [key for key in take if len(steady(taken[key])) < repeats]
        if not lacking:
            return
        begin = time.monotonic()
        for key in lacking:
            taken[key].append(take[key]())
            yield key
        time.sleep(max(0.0, begin + ROUND_SECONDS - time.monotonic()))
