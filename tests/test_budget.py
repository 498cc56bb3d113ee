"""Networks under a budget: dynamic programming against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pynas.budget import BudgetedPaths, check_budget, cost_range
from pynas.choices import Choice
from pynas.supernet import CostTable


def table_of(costs: list[list[float]], fixed: float = 1.0) -> CostTable:
    width = max(map(len, costs))
    values = torch.zeros(len(costs), width, dtype=torch.float64)
    mask = torch.zeros(len(costs), width, dtype=torch.bool)
    choices = []
    for row, line in enumerate(costs):
        values[row, : len(line)] = torch.tensor(line, dtype=torch.float64)
        mask[row, : len(line)] = True
        choices.append(Choice(f"c{row}", tuple(f"o{i}" for i in range(len(line)))))
    names = tuple(choice.name for choice in choices)
    return CostTable(names, tuple(choices), tuple(range(len(costs))), values, mask, fixed, "ms", {"modelled": 1})


def log_p(table: CostTable, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=table.values.shape) * 2
    logits[~table.mask.numpy()] = -np.inf
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def every_path(table: CostTable) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(choice.options)) for choice in table.choices)))


costs_strategy = st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(costs=costs_strategy, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_paths_meet_the_budget(costs: list[list[float]], share: float, seed: int) -> None:
    table = table_of(costs)
    bounds = cost_range(table)
    budget = bounds.low + share * (bounds.high - bounds.low)
    paths = BudgetedPaths(table, log_p(table, seed), budget)
    for path in [paths.most_likely(), *paths.sample(5, seed)]:
        assert paths.cost(path) <= budget * (1 + 1e-9)
        assert all(table.mask[row, option] for row, option in enumerate(path))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_most_likely_equals_brute_force(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    table = table_of(random.uniform(0, 1, (5, 5)).tolist())
    p, bounds = log_p(table, seed), cost_range(table)
    budget = bounds.low + share * (bounds.high - bounds.low)
    paths = BudgetedPaths(table, p, budget, slack=0.1)
    fitting = [path for path in every_path(table) if 0.9 * budget <= paths.cost(list(path)) <= budget]
    best = max(p[np.arange(5), list(path)].sum() for path in fitting)
    found = paths.most_likely()
    assert 0.9 * budget <= paths.cost(found) <= budget
    # A bin is 1/4096 of the room: only paths that close to the budget may be missed.
    assert p[np.arange(5), found].sum() == pytest.approx(best, abs=0.05)


def test_samples_follow_the_conditional_distribution() -> None:
    table = table_of([[0.1, 0.5, 0.9], [0.2, 0.4, 1.1], [0.3, 0.6, 0.7]])
    p, budget = log_p(table, 3), 2.95
    paths = BudgetedPaths(table, p, budget, slack=0.3)
    fitting = [path for path in every_path(table) if 0.7 * budget <= paths.cost(list(path)) <= budget]
    weights = np.exp([p[np.arange(3), list(path)].sum() for path in fitting])
    drawn = [tuple(path) for path in paths.sample(4000, 0)]
    assert set(drawn) <= set(fitting)
    seen = np.array([drawn.count(path) for path in fitting])
    expected = weights / weights.sum() * len(drawn)
    common = expected > 5
    seen, expected = np.append(seen[common], seen[~common].sum()), np.append(expected[common], expected[~common].sum())
    assert chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 0.01


def test_window_without_networks_gives_the_dearest_below() -> None:
    table = table_of([[0.0, 10.0]], fixed=1.0)
    paths = BudgetedPaths(table, log_p(table, 0), 5.0)
    assert paths.most_likely() == [0]
    assert paths.sample(3, 0) == [[0], [0], [0]]


def test_loose_budget_is_no_constraint() -> None:
    table = table_of([[0.0, 1.0], [0.0, 1.0]])
    paths = BudgetedPaths(table, np.log(np.array([[0.9, 0.1], [0.9, 0.1]])), 1000.0)
    assert paths.most_likely() == [0, 0]


@pytest.mark.parametrize(
    ("budget", "says"), [(1.2, "the cheapest costs 1.3 ms"), (0.0, "positive"), (float("nan"), "positive")]
)
def test_impossible_budget(budget: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_budget(table_of([[0.1, 0.4], [0.2]]), budget)
