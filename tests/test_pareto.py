"""Dominance, fronts, crowding, hypervolume and selection of several objectives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynas.pareto import Goal, Selection, dominators, front, goals, hypervolume, ranks, violations

BOTH = (Goal("accuracy", "max"), Goal("macs", "min"))
THREE = (*BOTH, Goal("params", "max"))


def points(columns: int = 2) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Few different values, so that ties and equal points are common."""
    return st.lists(st.tuples(*[st.integers(0, 6)] * columns), min_size=1, max_size=25)


def dominates(a: tuple[int, ...], b: tuple[int, ...], of: tuple[Goal, ...]) -> bool:
    gains = [(y - x) * goal.sign for x, y, goal in zip(a, b, of, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(points(3))
def test_ranks_are_those_of_the_definition(values: list[tuple[int, ...]]) -> None:
    found = ranks(values, THREE)
    left = set(range(len(values)))
    for number in itertools.count():
        if not left:
            break
        best = {i for i in left if not any(dominates(values[j], values[i], THREE) for j in left)}
        assert {i for i in left if found[i] == number} == best
        left -= best
    assert sorted(front(values, THREE)) == [i for i in range(len(values)) if found[i] == 0]
    counted = [sum(dominates(other, value, THREE) for other in values) for value in values]
    assert dominators(values, values, THREE).tolist() == counted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(points())
def test_hypervolume_counts_dominated_cells(values: list[tuple[int, ...]]) -> None:
    cells = itertools.product(range(1, 8), range(0, 6))  # unit squares by their corner nearest to the reference
    covered = sum(any(a >= x and m <= y for a, m in values) for x, y in cells)
    assert hypervolume(values, BOTH, {"accuracy": 0, "macs": 6}) == pytest.approx(covered)


def test_hypervolume_of_one_objective_and_of_none_feasible() -> None:
    one = (Goal("accuracy", "max"),)
    assert hypervolume([[0.5], [0.7]], one, {"accuracy": 0.4}) == pytest.approx(0.3)
    assert hypervolume([[0.3]], one, {"accuracy": 0.4}) == 0
    limited = (Goal("accuracy", "max", limit=0.9), BOTH[1])
    assert hypervolume([[0.8, 1.0]], limited, {"accuracy": 0.5, "macs": 2}) == 0
    assert front([[0.8, 1.0]], limited).size == 0


def test_infeasible_networks_come_last_by_violation() -> None:
    limited = (Goal("accuracy", "max"), Goal("macs", "min", limit=10), Goal("latency_ms", "min", 2, pursued=False))
    values = [[0.9, 12, 1], [0.5, 9, 1], [0.7, 10, 2], [0.99, 11.25, 1], [0.6, 9, 2.25]]
    np.testing.assert_allclose(violations(values, limited), [[0.2, 0], [0, 0], [0, 0], [0.125, 0], [0, 0.125]])
    assert ranks(values, limited).tolist() == [2, 0, 0, 1, 1]
    assert front(values, limited).tolist() == [2, 1]
    assert dominators(values, values, limited).tolist() == [4, 0, 0, 2, 2]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(points(), st.integers(1, 25))
def test_survivors_are_the_best_fronts_and_their_ends(values: list[tuple[int, ...]], keep: int) -> None:
    selection = Selection(values, BOTH, keep, np.random.default_rng(0))
    kept, rank = selection.survivors.tolist(), ranks(values, BOTH)
    assert len(set(kept)) == len(kept) == min(keep, len(values))
    worst = max(rank[kept])
    assert set(np.flatnonzero(rank < worst)) <= set(kept)
    split = [i for i in range(len(values)) if rank[i] == worst]
    if len(set(kept) & set(split)) >= 2 and len({values[i] for i in split}) == len(split):
        assert max(values[i][0] for i in split) == max(values[i][0] for i in set(kept) & set(split))
        assert min(values[i][1] for i in split) == min(values[i][1] for i in set(kept) & set(split))


def test_crowding_drops_the_most_crowded() -> None:
    values = [[0.0, 0.0], [0.1, 0.1], [0.11, 0.11], [0.5, 0.5], [1.0, 1.0]]
    kept = Selection(values, BOTH, 4, np.random.default_rng(0)).survivors
    assert sorted(kept) in ([0, 2, 3, 4], [0, 1, 3, 4])


def test_parents_win_their_tournaments() -> None:
    values = [[10 - i, i] for i in range(10)]  # ranks 0 to 9
    selection = Selection(values, BOTH, 10, np.random.default_rng(0))
    counts = np.bincount(selection.parents(500).ravel(), minlength=10)
    assert counts[9] == 0
    # In a binary tournament without repeats, rank r wins with probability 2 (9 - r) / 90.
    expected = 1000 * 2 * (9 - np.arange(10)) / 90
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_feasible_parents_beat_infeasible_ones() -> None:
    limited = (Goal("accuracy", "max", limit=0.5), BOTH[1])
    selection = Selection([[0.4, 0.0], [0.6, 5.0]], limited, 2, np.random.default_rng(0))
    assert set(selection.parents(50).ravel()) == {1}


def test_goals_by_name() -> None:
    made = goals("accuracy, macs", limits={"latency": 20.0, "macs": 1e6})
    assert [goal.name for goal in made] == ["accuracy", "macs", "latency_ms"]
    assert [goal.pursued for goal in made] == [True, True, False]
    assert [goal.limit for goal in made] == [None, 1e6, 20.0]
    assert goals(["params"], directions={"params": "max"})[0].direction == "max"
    assert goals("params")[0].direction == "min"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: goals("accuracy,speed"), "Unknown objective 'speed'"),
        (lambda: goals("acuracy"), "Did you mean 'accuracy'"),
        (lambda: goals("latency,latency_ms"), "named twice"),
        (lambda: goals(" , "), "at least one objective"),
        (lambda: goals("macs", limits={"macs": float("nan")}), "finite"),
        (lambda: goals("macs", directions={"macs": "up"}), "direction of macs"),  # type: ignore[dict-item]
        (lambda: goals("accuracy", directions={"params": "max"}), "params, which is neither an objective nor limited"),
        (lambda: Goal("macs", "min", pursued=False), "leave it out"),
        (lambda: ranks([[1.0]], BOTH), "shape"),
        (lambda: ranks([[1.0, float("nan")]], BOTH), "macs of network 0"),
        (lambda: ranks([[1.0]], (Goal("macs", "min", 1, pursued=False),)), "nothing to optimise"),
        (lambda: hypervolume([[1.0, 2.0]], BOTH, {"macs": 1}), "lacks 'accuracy'"),
    ],
)
def test_bad_input_is_told(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]
