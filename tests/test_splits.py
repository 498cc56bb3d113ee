"""Splits: no image in two parts, every image in one, classes in the same shares, whatever the numbers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynas.training.sources import Source
from pynas.training.splits import share_out, split


def listing(counts: list[int], tests: int = 0) -> Source:
    """A source without pictures: so many images of each class, then `tests` of each as a test set of its own."""
    listed = [(f"train/{label}/{i}", label) for label, count in enumerate(counts) for i in range(count)]
    held_out = [(f"val/{label}/{i}", label) for label in range(len(counts)) for i in range(tests)]
    files, labels = zip(*listed, *held_out, strict=True)
    classes = tuple(f"class{label}" for label in range(len(counts)))
    span = range(len(listed), len(listed) + len(held_out))
    return Source("toy", classes, files, labels, span, open=lambda row: pytest.fail("a split must not open images"))


steady = settings(deadline=None, derandomize=True)
counts_of_classes = st.lists(st.integers(3, 40), min_size=2, max_size=5)
shares = st.floats(0.01, 0.99)


@steady
@given(counts_of_classes, shares, shares, st.integers(0, 2**40), st.integers(0, 3))
def test_split_is_disjoint_exhaustive_and_stratified(
    counts: list[int], arch_share: float, test_share: float, seed: int, tests: int
) -> None:
    source = listing(counts, tests)
    found = split(source, seed=seed, arch_share=arch_share, test_share=test_share, limit=None)
    rows = found.weights + found.arch + found.test
    assert sorted(rows) == list(range(len(source.names)))
    per_class = [Counter(source.labels[row] for row in part) for part in (found.weights, found.arch, found.test)]
    for label, count in enumerate(counts):
        weights, arch, test = (counter[label] for counter in per_class)
        expected_test = tests or min(max(round(count * test_share), 1), count - 2)
        assert test == expected_test
        rest = count if tests else count - test
        assert arch == min(max(round(rest * arch_share), 1), rest - 1)
        assert weights == rest - arch
    if tests:
        assert set(found.test) == set(source.tests)


@steady
@given(counts_of_classes, st.integers(0, 9), st.data())
def test_limit_is_exact_and_leaves_the_test_set_alone(counts: list[int], seed: int, data: st.DataObject) -> None:
    source = listing(counts)
    whole = split(source, seed=seed, arch_share=0.2, test_share=0.2, limit=None)
    train = len(whole.weights + whole.arch)
    limit = data.draw(st.integers(2 * len(counts), train + 5))
    found = split(source, seed=seed, arch_share=0.4, test_share=0.2, limit=limit)
    assert found.test == whole.test
    assert len(found.weights + found.arch) == min(limit, train)
    assert set(found.weights + found.arch) <= set(whole.weights + whole.arch)
    assert (
        {source.labels[row] for row in found.weights}
        == {source.labels[row] for row in found.arch}
        == set(source.labels)
    )


@steady
@given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.data())
def test_shares_of_the_limit_are_exact_and_proportional(counts: list[int], data: st.DataObject) -> None:
    limit = data.draw(st.integers(2 * len(counts), sum(counts)))
    quotas = share_out(limit, counts)
    assert sum(quotas) == limit
    room = sum(counts) - 2 * len(counts)
    for quota, count in zip(quotas, counts, strict=True):
        assert 2 <= quota <= count
        assert room == 0 or abs(quota - 2 - (count - 2) * (limit - 2 * len(counts)) / room) < 1


@steady
@given(st.permutations(range(30)))
def test_split_does_not_depend_on_the_order_of_the_listing(order: list[int]) -> None:
    source = listing([18, 12])
    shuffled = Source(
        "toy",
        source.classes,
        tuple(source.names[row] for row in order),
        tuple(source.labels[row] for row in order),
        range(0),
        source.open,
    )
    arguments = {"seed": 3, "arch_share": 0.2, "test_share": 0.3, "limit": 17}
    one, other = (split(s, **arguments) for s in (source, shuffled))  # type: ignore[arg-type]
    for part in ("weights", "arch", "test"):
        assert [source.names[row] for row in getattr(one, part)] == [
            shuffled.names[row] for row in getattr(other, part)
        ]
