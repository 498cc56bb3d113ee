"""Reinforced evolution: what it asks for, what it finds, and that it can be interrupted anywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_space import BOTH, SMALL, SPACE, Oracle, choices
from shared import MACRO, shared_data

from pynas import Choice, read_truth
from pynas.evolution import Costs, Evolution, EvolutionSettings, Genome, Genomes
from pynas.pareto import Goal, goals, hypervolume

BENCH = Path(__file__).parents[1] / "bench" / "macro_oracle.py"
NATURAL = {"p_random": 0.85, "p_reinforced": 0.0}


@pytest.fixture
def oracle() -> Oracle:
    return SPACE


def trace(evolution: Evolution) -> list[Any]:
    return [(each.genome, dict(each.values), each.origin, each.generation) for each in evolution.evaluated]


# What it finds


def test_zdt1() -> None:
    """All 11 points of ZDT1's front on a grid of 11^10 (pymoo's problem; x2 = ... = x10 = 0 on the front)."""
    from pymoo.problems.multi import ZDT1

    problem, steps, places = ZDT1(n_var=10), 11, 10
    of = (Goal("f1", "min"), Goal("f2", "min"))
    reference = {"f1": 1.1, "f2": 1.1}
    x = np.linspace(0, 1, steps)
    whole = hypervolume(np.stack([x, 1 - np.sqrt(x)], 1), of, reference)
    settings = EvolutionSettings(population=40, children=40)
    evolution = Evolution(choices([steps] * places), of, settings, seed=1, reference=reference)
    while evolution.evaluations < 2000 and (
        not evolution.history or evolution.history[-1].hypervolume < 0.9999 * whole
    ):
        asked = evolution.ask()
        values = problem.evaluate(np.array(asked) / (steps - 1))
        evolution.tell([{"f1": float(f1), "f2": float(f2)} for f1, f2 in values])
    assert evolution.history[0].hypervolume < 0.2 * whole
    found = sorted((each.values["f1"], each.values["f2"]) for each in evolution.front())
    np.testing.assert_allclose(found, np.stack([x, 1 - np.sqrt(x)], 1), atol=1e-9)
    assert all(set(each.genome[1:]) == {0} for each in evolution.front())


def test_beats_random_sampling_with_and_without_the_policy() -> None:
    """On a made-up space of 2 million networks after 300 evaluations, mean of two seeds."""
    oracle = Oracle([4, 6, 3, 4, 6, 4, 4, 3, 6, 4], seed=3)
    reference = {"accuracy": 0.5, "macs": oracle.costs.range(Genomes(choices(oracle.sizes)))[1]}
    limited = (Goal("accuracy", "max", limit=0.5), BOTH[1])

    def volume(genomes: list[Genome]) -> float:
        return hypervolume([(oracle.accuracy(g), oracle.costs.cost(g)) for g in genomes], limited, reference)

    means = {}
    for name, changes in (("reinforced", {}), ("natural", NATURAL)):
        runs = [
            oracle.evolution(seed=s, of=limited, settings=EvolutionSettings(**changes), reference=reference)
            for s in range(2)
        ]
        means[name] = np.mean([volume([e.genome for e in oracle.run(run, 300).evaluated[:300]]) for run in runs])
    random, space = np.random.default_rng(0), Genomes(choices(oracle.sizes))
    sampled = np.mean([volume([space.draw(random) for _ in range(300)]) for _ in range(2)])
    assert means["reinforced"] > 1.06 * sampled
    assert means["natural"] > 1.06 * sampled
    assert means["reinforced"] > 0.97 * means["natural"]


def test_nas_bench_macro() -> None:
    """The goals set for the oracle, for a few seeds: 97 % after 300 evaluations, 99.5 % after 655."""
    made = importlib.util.spec_from_file_location("macro_oracle", BENCH)
    assert made is not None
    assert made.loader is not None
    bench = importlib.util.module_from_spec(made)
    made.loader.exec_module(bench)
    macro = bench.Oracle(read_truth(shared_data(MACRO)))
    one_network = bench.one_network
    found = np.median([macro.evolve(seed, one_network, EvolutionSettings()) for seed in range(3)], axis=0)
    assert found[0] >= 0.97
    assert found[1] >= 0.995
    sampled = np.median([macro.sample(seed, one_network) for seed in range(3)], axis=0)
    assert (sampled < found - 0.02).all()


# What it asks for


@pytest.mark.parametrize("start", ["spread", "random"])
def test_nothing_is_evaluated_twice_and_same_seed_same_result(oracle: Oracle, start: Any) -> None:
    settings = dataclasses.replace(SMALL, start=start)
    whole = oracle.run(oracle.evolution(settings=settings), 80)
    genomes = [each.genome for each in whole.evaluated]
    assert len(set(genomes)) == len(genomes) >= 80
    assert trace(oracle.run(oracle.evolution(settings=settings), 80)) == trace(whole)
    assert trace(oracle.run(oracle.evolution(settings=settings, seed=1), 80)) != trace(whole)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_batches_change_nothing(oracle: Oracle, at_once: int) -> None:
    whole = trace(oracle.run(oracle.evolution(), 60))
    parts = trace(oracle.run(oracle.evolution(), 60, at_once))
    assert parts[:60] == whole[:60]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("broken_after", [0, 5, 12, 13, 17, 44])
def test_resumes_bit_for_bit_from_anywhere(oracle: Oracle, broken_after: int) -> None:
    """Before the first answer, inside a generation, and at the end of one (12 + 5 n)."""
    whole = oracle.run(oracle.evolution(), 72, 1)
    first = oracle.evolution()
    for _ in range(broken_after):
        oracle.run(first, first.evaluations + 1, 1)
    assert first.evaluations == broken_after
    state = through_a_file(first.state_dict())
    oracle.run(first, 72, 1)  # what goes on must not write into the saved state
    again = oracle.evolution()
    again.load_state_dict(state)
    oracle.run(again, 72, 1)
    assert trace(again) == trace(whole)
    assert again.history == whole.history
    assert again.ask() == whole.ask()
    ours, theirs = again.state_dict()["policy"], whole.state_dict()["policy"]
    assert all(torch.equal(ours["net"][name], theirs["net"][name]) for name in theirs["net"])
    assert ours["baseline"] == theirs["baseline"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "other seed"),
        ({"of": (BOTH[0], Goal("macs", "max"))}, "other goals"),
        ({"settings": EvolutionSettings(population=13, children=5)}, "other settings"),
        ({"cells": [range(10)]}, "other cells"),
        ({"costs": {"macs": Costs(np.ones((10, 5)))}}, "other costs"),
    ],
)
def test_states_of_other_evolutions_are_refused(oracle: Oracle, changes: dict[str, Any], says: str) -> None:
    state = oracle.evolution().state_dict()
    with pytest.raises(ValueError, match=says):
        oracle.evolution(**changes).load_state_dict(state)


def test_history_adds_up(oracle: Oracle) -> None:
    evolution = oracle.run(oracle.evolution(), 60)
    history = evolution.history
    assert [generation.evaluations for generation in history] == [12 + 5 * i for i in range(len(history))]
    assert list(itertools.chain(*(g.members for g in history))) == list(evolution.evaluated)
    volumes = [generation.hypervolume for generation in history]
    assert volumes == sorted(volumes)
    rows = [[each.values["accuracy"], each.values["macs"]] for each in evolution.evaluated]
    assert volumes[-1] == pytest.approx(hypervolume(rows, BOTH, evolution.reference))
    worst = min(each.values["accuracy"] for each in history[0].members)
    assert evolution.reference["accuracy"] == worst


def test_origins_follow_the_shares(oracle: Oracle) -> None:
    evolution = oracle.run(oracle.evolution(settings=EvolutionSettings(population=40, children=40)), 640)
    counts = Counter(each.origin for each in evolution.evaluated)
    assert counts["start"] == 40
    mutated = counts["natural"] + counts["reinforced"] + counts["prior"]
    assert counts["reinforced"] / mutated == pytest.approx(0.65, abs=0.08)
    assert counts["natural"] / mutated == pytest.approx(0.2, abs=0.07)
    assert 0 < counts["crossover"] < 0.2 * 600 + 30


def test_a_small_space_is_exhausted() -> None:
    oracle = Oracle([2, 1, 3, 2])
    evolution = oracle.run(oracle.evolution(settings=EvolutionSettings(population=4, children=3)), 100)
    assert sorted(each.genome for each in evolution.evaluated) == sorted(Genomes(choices([2, 1, 3, 2])).all())
    assert evolution.ask() == []
    tiny = Oracle([1, 1])
    assert tiny.run(tiny.evolution(), 9).evaluations == 1


def test_genomes_of_one_network_are_asked_for_once() -> None:
    oracle = Oracle([3, 3, 3])

    def ordered(genome: Genome) -> Genome:
        return tuple(sorted(genome))

    class Alike(Costs):
        def cost(self, genome: Genome) -> float:
            return float(sum(genome))

    evolution = oracle.evolution(canonical=ordered, costs={"macs": Alike(np.arange(3.0)[None].repeat(3, 0))})
    oracle.run(evolution, 100)
    found = [each.genome for each in evolution.evaluated]
    assert sorted(found) == sorted({ordered(genome) for genome in itertools.product(range(3), repeat=3)})


# Goals and limits


def test_known_limits_are_never_broken(oracle: Oracle) -> None:
    low, high = oracle.costs.range(Genomes(choices(oracle.sizes)))
    limit = low + 0.15 * (high - low)
    evolution = oracle.run(oracle.evolution(of=(BOTH[0], Goal("macs", "min", limit))), 70)
    assert all(each.values["macs"] <= limit for each in evolution.evaluated)
    assert evolution.evaluations >= 70
    assert evolution.reference["macs"] == limit
    only = (BOTH[0], Goal("macs", "min", limit, pursued=False))
    constrained = oracle.run(oracle.evolution(of=only), 70)
    assert all(each.values["macs"] <= limit for each in constrained.evaluated)
    best = max(constrained.evaluated, key=lambda each: each.values["accuracy"])
    assert constrained.front()[0] == best


def test_direction_is_selectable(oracle: Oracle) -> None:
    """With more parameters wanted the front's networks have more of them than with fewer wanted."""
    means = []
    for direction in ("min", "max"):
        of = goals("accuracy,params", directions={"params": direction})  # type: ignore[dict-item]
        evolution = oracle.evolution(of=of, costs={"params": oracle.costs})
        means.append(np.mean([each.values["params"] for each in oracle.run(evolution, 80).front()]))
    assert means[1] > 1.2 * means[0]


def test_three_goals_of_which_one_is_told(oracle: Oracle) -> None:
    of = goals("accuracy,macs,latency")
    evolution = oracle.evolution(of=of, costs={"macs": oracle.costs})
    while evolution.evaluations < 40:
        asked = evolution.ask(4)
        evolution.tell([{"accuracy": oracle.accuracy(g), "latency_ms": float(sum(g))} for g in asked])
    assert len(evolution.front()) > 2


def test_limits_that_no_network_meets_are_refused(oracle: Oracle) -> None:
    low, high = oracle.costs.range(Genomes(choices(oracle.sizes)))
    with pytest.raises(ValueError, match=rf"has macs <= 1: the nearest has {low:.6g}"):
        oracle.evolution(of=(BOTH[0], Goal("macs", "min", 1.0)))
    with pytest.raises(ValueError, match=rf"has macs >= 1e\+06: the nearest has {high:.6g}"):
        oracle.evolution(of=(BOTH[0], Goal("macs", "max", 1e6)))
    opposite = Costs(-oracle.costs.values)
    of = (BOTH[0], Goal("macs", "min", low + 0.1), Goal("params", "min", 1.1 - high, pursued=False))
    with pytest.raises(ValueError, match=r"all of macs <= .*, params <= .* at once"):
        oracle.evolution(of=of, costs={"macs": oracle.costs, "params": opposite})


def test_limits_that_no_evaluated_network_meets_are_told(oracle: Oracle) -> None:
    evolution = oracle.evolution(of=(Goal("accuracy", "max", limit=2.0), BOTH[1]))
    assert evolution.front() == []
    oracle.run(evolution, 40)
    best = max(each.values["accuracy"] for each in evolution.evaluated)
    with pytest.raises(ValueError, match=rf"None of {evolution.evaluations} .* accuracy >= 2; .*accuracy {best:.6g}"):
        evolution.front()
    assert evolution.history[-1].hypervolume == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([{"accuracy": 0.5}] * 13, "13 values were told for 12"),
        ([{"accuracy": 0.5}, {"macs": 1.0}], "lack 'accuracy'; told must be: accuracy"),
        ([{"accuracy": 0.5}, {"accuracy": float("nan")}], "must be finite"),
    ],
)
def test_bad_values_are_refused_whole(oracle: Oracle, values: Any, says: str) -> None:
    evolution = oracle.evolution()
    asked = evolution.ask()
    with pytest.raises(ValueError, match=says):
        evolution.tell(values)
    assert evolution.evaluations == 0
    assert evolution.ask() == asked


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"of": ()}, "nothing to optimise"),
        ({"of": (BOTH[0], BOTH[0])}, "different names"),
        ({"costs": {"size": Costs(np.ones((10, 5)))}}, "'size', which is no goal"),
        ({"costs": {"macs": Costs(np.ones((9, 5)))}}, "shape"),
        ({"costs": {"macs": Costs(np.full((10, 5), np.nan))}}, "finite"),
        ({"cells": [[0, 1], [1, 2]]}, "exactly one cell"),
        ({"prior": np.ones((2, 2))}, "prior must hold"),
        ({"prior": -np.ones((10, 5))}, "prior must hold"),
        ({"reference": {"params": 1.0}}, "The reference must be"),
        ({"reference": {"macs": float("inf")}}, "The reference must be"),
        ({"canonical": lambda genome: (9, *genome[1:])}, "'layer0' has 4 options"),
        ({"canonical": lambda genome: genome[1:]}, "has 10 options, not 9"),
    ],
)
def test_what_does_not_fit_is_refused(oracle: Oracle, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        oracle.evolution(**changes)


def test_choices_of_subsets_are_refused() -> None:
    with pytest.raises(ValueError, match="'branches' picks any subset"):
        Evolution([Choice("branches", ("a", "b"), pick="any")], BOTH[:1])
    with pytest.raises(ValueError, match="at least one choice"):
        Evolution([], BOTH[:1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"population": 1}, "population of evolution must be at least 2"),
        ({"children": 0}, "children of evolution"),
        ({"mutation": 1.1}, "mutation of evolution"),
        ({"p_random": 0.3}, r"must add up to 1, not \[0.3, 0.65, 0.15\]"),
        ({"p_evaluated": 1.2, "p_known": -0.2}, "must add up to 1"),
        ({"policy_lr": 0.0}, "policy_lr"),
        ({"start": "spred"}, "Did you mean 'spread'"),
        ({"population": 7.5}, "whole number"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EvolutionSettings(**changes)
