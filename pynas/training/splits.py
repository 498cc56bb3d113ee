"""Which image serves the weights, which the architecture, and which the final test.

A hash of the seed and its name ranks an image within its class, and the rank decides the part. So a split depends on
nothing but the seed and the names, adding a file moves few others, and the test set is the same for every `limit` and
`arch_share`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pynas.training.sources import Source


@dataclass(frozen=True)
class Split:
    """Positions in the source of the images of each part. Each part is in random order.

    Args:
        weights: Train the weights.
        arch: Train the architecture, or judge it during the search.
        test: For the final evaluation only.
    """

    weights: tuple[int, ...]
    arch: tuple[int, ...]
    test: tuple[int, ...]


def split(source: Source, *, seed: int, arch_share: float, test_share: float, limit: int | None) -> Split:
    """Splits class by class, so that every part has the classes in the same shares.

    Args:
        source: Images with their names and labels.
        seed: Any integer.
        arch_share: Share of the training images that is held out for the architecture, in (0, 1).
        test_share: Share of all images that is held out for the test, in (0, 1); for a source without a test set.
        limit: At most so many training images (weights and architecture together), shared out by class.

    Raises:
        ValueError: If a class has too few images for each part to get one, or if the limit leaves it too few.
    """
    keys = [hashlib.blake2b(os.fsencode(f"{seed}:{name}"), digest_size=16).digest() for name in source.names]
    tests: list[list[int]] = [[] for _ in source.classes]
    trains: list[list[int]] = [[] for _ in source.classes]
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        (tests if row in source.tests else trains)[source.labels[row]].append(row)
    if not source.tests:
        _check_counts(source, trains, 3, "training, architecture and test")
        for label, rows in enumerate(trains):
            count = min(max(round(len(rows) * test_share), 1), len(rows) - 2)
            tests[label], trains[label] = rows[:count], rows[count:]
    _check_counts(source, trains, 2, "training and architecture")
    if limit is not None:
        quotas = share_out(limit, [len(rows) for rows in trains])
        trains = [rows[:quota] for rows, quota in zip(trains, quotas, strict=True)]
    weights, archs, held_out = [], [], [row for rows in tests for row in rows]
    for rows in trains:
        count = min(max(round(len(rows) * arch_share), 1), len(rows) - 1)
        archs += rows[:count]
        weights += rows[count:]
    # Other bytes of the hash than those that decided the parts: within a part, the latter go with the class.
    shuffled = (sorted(part, key=lambda row: keys[row][8:]) for part in (weights, archs, held_out))
    return Split(*map(tuple, shuffled))


def share_out(limit: int, counts: Sequence[int]) -> list[int]:
    """How many images of each class to take: `limit` in all, two or more of each, the rest in proportion to `counts`.

    Raises:
        ValueError: If the limit is below two per class.
    """
    if limit >= sum(counts):
        return list(counts)
    spare = limit - 2 * len(counts)
    if spare < 0:
        raise ValueError(
            f"limit={limit} is too few for {len(counts)} classes: each needs an image for the weights and one for the "
            f"architecture. Give limit={2 * len(counts)} or more."
        )
    room = sum(counts) - 2 * len(counts)
    exact = [(count - 2) * spare / room for count in counts]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda label: (quotas[label] - exact[label], label))
    for label in by_remainder[: spare - sum(quotas)]:
        quotas[label] += 1
    return [2 + quota for quota in quotas]


def _check_counts(source: Source, rows: list[list[int]], least: int, parts: str) -> None:
    for name, found in zip(source.classes, rows, strict=True):
        if len(found) < least:
            raise ValueError(
                f"Class {name!r} of {source.name} has {len(found)} training image{'s' * (len(found) != 1)}, and needs "
                f"{least} or more: one each for {parts}. Add images, or remove the class."
            )
