"""Parts of the evolution: beginnings, operators and the policy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_space import BOTH, SPACE, Oracle, choices

from cost_models import Macs, Params
from pynas import SPACES
from pynas.evolution import Costs, EvolutionSettings, Genomes, cells_of, to_genome
from pynas.evolution.policy import Change, Policy
from pynas.evolution.start import random_start, spread_start
from pynas.evolution.variation import Operator, Variation, cost_prior, cross_cells
from pynas.pareto import Goal
from pynas.supernet import cost_table


@pytest.fixture
def oracle() -> Oracle:
    return SPACE


def test_spread_start_reaches_both_ends_evenly(oracle: Oracle) -> None:
    space = Genomes(choices(oracle.sizes))
    low, high = oracle.costs.range(space)
    gaps, ends = {}, {}
    for make in (random_start, spread_start):
        args = (space, 40, {"macs": oracle.costs}, {"macs": (low, high)}, lambda _: True, np.random.default_rng(0))
        found = make(*args)
        assert len(set(found)) == len(found) == 40
        costs = np.sort([oracle.costs.cost(genome) for genome in found])
        gaps[make], ends[make] = np.diff(np.array([low, *costs, high])).max(), (costs[0], costs[-1])
    assert ends[spread_start] == pytest.approx((low, high))
    assert gaps[spread_start] < 0.5 * gaps[random_start]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_crossover_keeps_cells_whole(seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = ((0, 3), (1,), (2, 4, 5))
    child = cross_cells((0,) * 6, (1,) * 6, cells, random)
    assert all(len({child[place] for place in cell}) == 1 for cell in cells)


def test_cells_are_the_stages() -> None:
    cells = cells_of(SPACES.get("fbnet")())
    assert [len(cell) for cell in cells] == [1, 4, 4, 4, 4, 4, 1]
    assert list(itertools.chain(*cells)) == list(range(22))
    assert [len(cell) for cell in Genomes(choices([2] * 10)).cells] == [4, 4, 2]


def test_costs_and_genomes_of_a_space() -> None:
    from pynas.budget import to_architecture

    space = SPACES.get("fbnet_tiny")()
    genomes = Genomes(space.choices(), cells_of(space))
    for model in (Macs(), Params()):
        table = cost_table(space, model)
        costs = Costs.of(table)
        for seed in range(3):
            genome = genomes.draw(np.random.default_rng(seed))
            architecture = to_architecture(space, space.choices(), list(genome))
            assert to_genome(architecture) == genome
            assert costs.cost(genome) == table.cost(architecture)


def variation(oracle: Oracle, prior: Any = None, **changes: Any) -> tuple[Variation, Genomes, Policy]:
    space, settings = Genomes(choices(oracle.sizes)), EvolutionSettings(**changes)
    policy = Policy(space.sizes, 4, settings, seed=0)
    return Variation(space, settings, policy, prior, BOTH, {"macs": oracle.costs}), space, policy


@pytest.mark.parametrize("operator", ["natural", "reinforced", "prior"])
def test_every_mutation_changes_one_choice_and_knows_its_probability(oracle: Oracle, operator: Operator) -> None:
    mutations, space, _ = variation(oracle)
    random = np.random.default_rng(0)
    genome = (0, *space.draw(random)[1:])
    drawn: Counter[tuple[int, int]] = Counter()
    told = {}
    for _ in range(1500):
        change = mutations.mutate(genome, operator, (0.0, 0.0, 1.0, 0.0), lambda child: child[0] == 3, random)
        assert change is not None
        assert 0 <= change.option < space.sizes[change.place]
        assert change.option != genome[change.place]
        assert (change.place, change.option) != (0, 3)  # refused
        drawn[change.place, change.option] += 1
        told[change.place, change.option] = change.probability
    assert sum(told.values()) == pytest.approx(1)
    expected = np.array([told[key] * 1500 for key in told])
    seen = np.array([drawn[key] for key in told])
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_operators_follow_the_shares(oracle: Oracle) -> None:
    mutations, space, policy = variation(oracle)
    random = np.random.default_rng(0)
    counts = Counter(mutations.operator(random) for _ in range(2000))
    for operator, share in (("natural", 0.2), ("reinforced", 0.65), ("prior", 0.15)):
        assert counts[operator] / 2000 == pytest.approx(share, abs=0.05)  # type: ignore[index]
    unguided = Variation(space, EvolutionSettings(), policy, None, BOTH, {})
    assert {unguided.operator(random) for _ in range(50)} == {"natural", "reinforced"}


def test_prior_prefers_cheap_options(oracle: Oracle) -> None:
    space = Genomes(choices(oracle.sizes))
    weights = cost_prior(space, BOTH, {"macs": oracle.costs})
    assert weights is not None
    for row, size in enumerate(space.sizes):
        order = np.argsort(oracle.costs.values[row, :size])
        assert (np.diff(weights[row, order]) < 0).all()
        assert (weights[row, size:] == 0).all()
    dear = cost_prior(space, (BOTH[0], Goal("macs", "max")), {"macs": oracle.costs})
    assert dear is not None
    assert dear[0].argmax() == weights[0, :4].argmin()
    assert cost_prior(space, BOTH, {}) is None


def test_lead_follows_the_shares(oracle: Oracle) -> None:
    mutations, space, policy = variation(oracle)
    random = np.random.default_rng(0)
    assert np.mean([mutations.lead(random)[0] for _ in range(2000)]) == pytest.approx(0.7, abs=0.05)
    known_only = Variation(space, EvolutionSettings(), policy, None, BOTH[1:], {"macs": oracle.costs})
    assert {known_only.lead(random) for _ in range(20)} == {(0.0, 1.0)}


def rewarded(
    policy: Policy, random: np.random.Generator, reward: Callable[[Change], float], rounds: int, behaviour: str
) -> None:
    """Lets the policy learn from mutations drawn by itself or uniformly."""
    genome, context = (0, 0, 0), (0.5,)
    for _ in range(rounds):
        rewards = []
        for _ in range(10):
            p = policy.probabilities(genome, context)
            if behaviour == "uniform":
                p = (p > 0) / (p > 0).sum()
            index = int(random.choice(p.size, p=p.ravel()))
            change = Change(genome, context, *divmod(index, p.shape[1]), float(p.ravel()[index]))
            rewards.append(reward(change))
            policy.remember(change, rewards[-1])
        policy.learn(rewards)


@pytest.mark.parametrize("behaviour", ["policy", "uniform"])
def test_policy_learns_what_pays(behaviour: str) -> None:
    """Its own mutations teach it, and so do natural ones, whose probabilities are known."""
    policy = Policy((3, 2, 4), 1, EvolutionSettings(), seed=0)
    before = policy.probabilities((0, 0, 0), (0.5,))
    np.testing.assert_allclose(before[before > 0], 1 / 6)
    assert (before > 0).sum() == 2 + 1 + 3
    rewarded(policy, np.random.default_rng(0), lambda c: float((c.place, c.option) == (2, 3)), 30, behaviour)
    after = policy.probabilities((0, 0, 0), (0.5,))
    assert after[2, 3] > 0.6
    assert after[2, 0] == after[1, 2] == 0


def test_policy_keeps_trying_without_evidence() -> None:
    policy = Policy((3, 2, 4), 1, EvolutionSettings(), seed=0)
    rewarded(policy, np.random.default_rng(0), lambda _: 0.5, 20, "policy")
    found = policy.probabilities((0, 0, 0), (0.5,))
    np.testing.assert_allclose(found[found > 0], 1 / 6, atol=0.03)


def test_policy_follows_the_score_function() -> None:
    """One step on mutations of its own: the gradient of the mean of (reward - baseline) log p."""
    settings = EvolutionSettings(policy_steps=1, policy_entropy=0.0, baseline_decay=1.0)
    policy = Policy((2, 3), 1, settings, seed=0)
    changes = [Change((0, 0), (0.0,), 0, 1, 1 / 3), Change((0, 0), (0.0,), 1, 2, 1 / 3)]
    policy.baseline = 0.5
    for change, reward in zip(changes, (1.0, 0.2), strict=True):
        policy.remember(change, reward)
    policy.learn([1.0, 0.2])
    assert policy.baseline == 0.5
    bias = policy.state_dict()["optimizer"]["state"][3]["exp_avg"] / 0.1  # Adam's first moment after one step
    p = torch.full((6,), 1 / 3)
    p[[0, 2, 3]] = 0.0  # option 2 of the first choice does not exist; the options the genome has are no changes
    gradient = torch.zeros(6)
    for change, advantage in zip(changes, (0.5, -0.3), strict=True):
        hot = torch.nn.functional.one_hot(torch.tensor(change.place * 3 + change.option), 6)
        gradient -= advantage * (hot - p) / 2
    torch.testing.assert_close(bias, gradient)
