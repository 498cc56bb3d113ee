"""From shared weights to candidates: networks within the budget, judged with inherited weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pynas.architecture import Architecture
from pynas.budget import BudgetedPaths, cost_range, to_architecture
from pynas.strategies.base import Candidate, Problem
from pynas.strategies.pareto_set import evolution_of, evolved
from pynas.strategies.random import random_architectures
from pynas.strategies.shared_weights import Descending, SharedWeights
from pynas.supernet import Supernet
from pynas.training.feed import Feed
from pynas.training.judge import Judging
from pynas.training.loop import Bar, Bars, Best
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels

Floats = np.ndarray[Any, np.dtype[np.float64]]
Found = Sequence[tuple[str, Architecture]]  # networks with their origin


def submodels(
    net: Supernet, problem: Problem, feed: Feed, calibrate: int, run: RunFolder | None, expected: int = 0
) -> Submodels:
    """Judges networks on the images held out for the architecture, each after a recalibration of its batch norms.

    With a run folder, scores are kept in its `submodels.jsonl`, and an interrupted derivation goes on there.
    """
    path = None if run is None else run.path / "submodels.jsonl"
    how = Judging(calibrate=calibrate, amp=problem.amp)
    return Submodels(net, feed.data, how=how, path=path, expected=expected)


def sampled(problem: Problem, log_probabilities: Floats, samples: int) -> Found:
    """The most probable network of a factorised distribution within the budget, and draws from it given the budget.

    Args:
        problem: Space, costs, budget and seed.
        log_probabilities: Of every option, shape (choices, options), minus infinity where a choice has none.
        samples: Draws; the same network may come several times, so fewer may be found.
    """
    table, budget = problem.table, problem.budget
    limit = cost_range(table).high if budget is None else budget
    paths = BudgetedPaths(table, log_probabilities, limit, 1.0 if budget is None else problem.slack)
    drawn = [("most probable", paths.most_likely())]
    drawn += [("sample", path) for path in paths.sample(samples, problem.seed)] if samples else []
    found: dict[str, tuple[str, Architecture]] = {}
    for origin, path in drawn:
        architecture = to_architecture(problem.space, table.choices, path)
        found.setdefault(architecture.fingerprint, (origin, architecture))
    return list(found.values())


def ranked(problem: Problem, found: Found, judges: Submodels, bar: Bar) -> list[Candidate]:
    """Networks as candidates, best first; of equal accuracy, the one of lower cross-entropy."""
    best = Best()
    scores = judges.scores([net for _, net in found], lambda _, score: bar.advance(best.see(score.accuracy)))
    order = sorted(range(len(found)), key=lambda place: (-scores[place].accuracy, scores[place].loss))
    return [
        Candidate(architecture, scores[place].accuracy, problem.table.cost(architecture), origin)
        for place, (origin, architecture) in ((place, found[place]) for place in order)
    ]


def check_goals(problem: Problem, evaluations: int) -> None:
    """Refuses goals that no network of the space meets, as far as that is known before training.

    Raises:
        ValueError: Naming the nearest value.
    """
    if problem.goals:
        evolution_of(problem, evaluations)


def derive_shared(
    shared: SharedWeights, strategy: Descending, feed: Feed, run: RunFolder | None, bars: Bars
) -> list[Candidate]:
    """Networks of a trained supernet: by an evolution where there are goals, else uniform samples within the budget.

    The place of another search: anything that proposes networks of `problem` and reads their scores from `submodels`
    can stand here.
    """
    problem = shared.problem
    if problem.goals:
        judges = submodels(shared.net, problem, feed, strategy.calibrate, run, strategy.evaluations)
        return evolved(problem, strategy.evaluations, judges, run, bars)
    drawn = random_architectures(
        problem.space, problem.table, strategy.samples, problem.budget, problem.slack, problem.seed
    )
    found = [("sample", architecture) for architecture in drawn]
    with bars("judging", len(found)) as bar:
        return ranked(problem, found, submodels(shared.net, problem, feed, strategy.calibrate, run), bar)
