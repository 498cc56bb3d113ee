"""Operators that make children: crossover of cells, and natural, reinforced and prior mutation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pynas.evolution.genomes import Cells, Costs, Floats, Genome, Genomes
from pynas.evolution.policy import Change, Policy
from pynas.evolution.settings import EvolutionSettings
from pynas.pareto import Goal

Context = tuple[float, ...]
Operator = Literal["natural", "reinforced", "prior"]


def cross_cells(first: Genome, second: Genome, cells: Cells, random: np.random.Generator) -> Genome:
    """A child that takes every cell whole from one parent or the other, each with probability one half.

    FairNAS and MoreMNAS cross at the level of cells without saying how many points they cut at [unverified].
    """
    child = list(first)
    for cell in cells:
        if random.random() < 0.5:
            for place in cell:
                child[place] = second[place]
    return tuple(child)


def applied(genome: Genome, change: Change) -> Genome:
    """The genome after a change."""
    return (*genome[: change.place], change.option, *genome[change.place + 1 :])


class Variation:
    """Makes mutations by the shares of `EvolutionSettings`.

    Args:
        genomes: Of the space.
        settings: Shares.
        policy: Of reinforced mutation.
        prior: Weight of every option of every choice for prior mutation, not negative, shape (choices, options).
            None: by known costs, where there are any (`cost_prior`).
        goals: Of the search.
        costs: Of the goals that are known before evaluation.

    Raises:
        ValueError: If the prior is no such array.
    """

    def __init__(
        self,
        genomes: Genomes,
        settings: EvolutionSettings,
        policy: Policy,
        prior: Any,
        goals: Sequence[Goal],
        costs: Mapping[str, Costs],
    ) -> None:
        self._genomes, self._settings, self._policy = genomes, settings, policy
        self._mask = genomes.mask()
        self._prior = cost_prior(genomes, goals, costs) if prior is None else self._checked(prior)
        pursued = [goal for goal in goals if goal.pursued]
        known = [goal for goal in pursued if goal.name in costs]
        self._leads = [bool(len(known) < len(pursued)), bool(known)]

    def _checked(self, prior: Any) -> Floats:
        array = np.asarray(prior, dtype=np.float64)
        fine = array.shape == self._mask.shape and np.isfinite(array[self._mask]).all()
        if not fine or (array[self._mask] < 0).any():
            raise ValueError(
                f"The prior must hold a finite weight of at least 0 for every option, shape {self._mask.shape} "
                f"(choices, options), not {array.shape}."
            )
        return np.where(self._mask, array, 0.0)

    def lead(self, random: np.random.Generator) -> Context:
        """Which goals lead a reinforced mutation: (1, 0) those that need evaluation, (0, 1) those that are known."""
        evaluated, known = self._leads
        share = self._settings.p_evaluated if evaluated and known else float(evaluated)
        return (1.0, 0.0) if random.random() < share else (0.0, 1.0)

    def operator(self, random: np.random.Generator) -> Operator:
        """The kind of a mutation, by the shares. Without prior weights that share goes to natural mutation."""
        kind = random.random()
        if kind < self._settings.p_reinforced:
            return "reinforced"
        prior = self._prior is not None and kind < self._settings.p_reinforced + self._settings.p_prior
        return "prior" if prior else "natural"

    def mutate(
        self,
        genome: Genome,
        operator: Operator,
        context: Context,
        refused: Callable[[Genome], bool],
        random: np.random.Generator,
    ) -> Change | None:
        """A change of one choice that leads to no refused genome, or None where there is none.

        The operator's probabilities are taken given that the change is not refused, so that no operator wastes its
        share on networks that are known already.
        """
        possible = self._mask.copy()
        possible[np.arange(len(genome)), list(genome)] = False
        for place, option in np.argwhere(possible).tolist():
            child = (*genome[:place], option, *genome[place + 1 :])
            possible[place, option] = not refused(self._genomes.canonical(child))
        if not possible.any():
            return None
        weights = possible.astype(np.float64)
        if operator == "reinforced":
            weights = self._policy.probabilities(genome, context) * possible
            total = weights.sum()
            return self._draw(weights / total, genome, context, random) if total > 0 else None
        if operator == "prior" and self._prior is not None and (self._prior * possible).any():
            weights = self._prior * possible
        return self._draw(by_choice(weights), genome, context, random)

    def _draw(self, probabilities: Floats, genome: Genome, context: Context, random: np.random.Generator) -> Change:
        flat = probabilities.ravel()
        index = int(random.choice(len(flat), p=flat))
        place, option = divmod(index, probabilities.shape[1])
        return Change(genome, context, place, option, float(flat[index]))


def by_choice(weights: Floats) -> Floats:
    """Every choice with a positive weight equally probable, its options in proportion; sums to 1."""
    totals = weights.sum(1, keepdims=True)
    shares = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    out: Floats = shares / shares.sum()
    return out


def cost_prior(genomes: Genomes, goals: Sequence[Goal], costs: Mapping[str, Costs]) -> Floats | None:
    """Prior weights from known costs: exp(-z), z the cost of an option in standard deviations of its choice.

    Of several known goals that are pursued the mean z counts; with direction "max" the sign turns. None without any.
    Ours: the articles say that a prior guides part of the mutations, not which [unverified].
    """
    mask: NDArray[np.bool_] = genomes.mask()
    scores = []
    for goal in goals:
        if goal.pursued and goal.name in costs:
            values = np.where(mask, goal.sign * costs[goal.name].values, np.nan)
            spread = np.nanstd(values, axis=1, keepdims=True)
            centred = values - np.nanmean(values, axis=1, keepdims=True)
            scores.append(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0))
    if not scores:
        return None
    return np.where(mask, np.exp(-np.mean(scores, axis=0)), 0.0)
