"""Random numbers that are a pure function of a key and a position.

Nothing here has a state: a number does not depend on what was drawn before it, on threads or on library versions,
and torch's and numpy's global generators are neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def words(key: Sequence[int], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Random 64-bit words at `positions` of the stream that `key` names.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): its n-th output
    is a mix of start + n * gamma, so any position is reached at once.

    Args:
        key: Integers >= 0; every different key is a different stream.
        positions: Any shape.

    >>> [int(word) % 100 for word in words((0, 1), np.arange(4, dtype=np.uint64))]
    [19, 39, 90, 8]
    """
    start = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    mixed = start + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result


def uniform(key: Sequence[int], indices: Sequence[int], columns: int) -> NDArray[np.float64]:
    """A row of `columns` numbers in [0, 1) for each index, shape (len(indices), columns).

    The row of an index is the same whatever else is in `indices`.
    """
    positions = np.asarray(indices)[:, None] * columns + np.arange(columns)
    drawn = words(key, positions.astype(np.uint64))
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: Sequence[int], length: int) -> NDArray[np.int64]:
    """The numbers 0 .. length - 1 in a random order."""
    return np.argsort(words(key, np.arange(length, dtype=np.uint64)), kind="stable")
