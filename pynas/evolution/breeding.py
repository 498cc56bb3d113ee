"""Children: parents crossed and mutated until the child is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pynas.evolution.genomes import Genome, Genomes
from pynas.evolution.policy import Change
from pynas.evolution.settings import EvolutionSettings
from pynas.evolution.variation import Context, Operator, Variation, applied, cross_cells

TRIES = 100  # for one new child
WIDER = 20  # failed tries after which one more choice is mutated
AT_ONCE = 64  # pairs of parents drawn by one tournament

Parents = tuple[Genome, Genome, tuple[float, ...]]  # two genomes, and where they stand in the mean in each goal


@dataclass(frozen=True)
class Child:
    """A network to be evaluated, and how it came about.

    Args:
        genome: Canonical.
        origin: What made it.
        changes: The mutations in it, for the policy to learn from.
    """

    genome: Genome
    origin: str
    changes: tuple[Change, ...] = ()

    def plain(self) -> list[Any]:
        """As a list of plain values."""
        return [list(self.genome), self.origin, [change.plain() for change in self.changes]]

    @staticmethod
    def of(entry: Sequence[Any]) -> Child:
        """What `plain` wrote."""
        genome, origin, changes = entry
        return Child(tuple(genome), origin, tuple(Change.of(change) for change in changes))


class Breeder:
    """Makes the children of a generation.

    Args:
        genomes: Of the space.
        settings: Shares of crossover and mutation.
        variation: Makes mutations.
    """

    def __init__(self, genomes: Genomes, settings: EvolutionSettings, variation: Variation) -> None:
        self._genomes, self._settings, self._variation = genomes, settings, variation

    def breed(
        self,
        parents: Callable[[int], list[Parents]],
        refused: Callable[[Genome], bool],
        random: np.random.Generator,
    ) -> list[Child]:
        """Different children that are not refused; fewer than wanted where no new ones are found.

        A child that is no new network is not kept: other parents are drawn, every child is mutated from then on, and
        after more failures at more choices at once.

        Args:
            parents: Draws pairs by tournament.
            refused: Whether a genome was evaluated before or breaks a known limit.
            random: Of everything.
        """
        children: dict[Genome, Child] = {}
        pairs: list[Parents] = []

        def known(genome: Genome) -> bool:
            return genome in children or refused(genome)

        for _ in range(self._settings.children):
            mutated = random.random() < self._settings.mutation
            # Drawn once for a child: redrawn for every try, the operator with the most repeats would lose its share.
            operator, lead = self._variation.operator(random), self._variation.lead(random)
            for attempt in range(TRIES):
                pairs = pairs or parents(AT_ONCE)
                changes = 1 + attempt // WIDER if mutated or attempt > 0 else 0
                child = self._child(pairs.pop(), changes, operator, lead, known, random)
                if child is not None and not known(child.genome):
                    children[child.genome] = child
                    break
        return list(children.values())

    def _child(
        self,
        pair: Parents,
        changes: int,
        operator: Operator,
        lead: Context,
        known: Callable[[Genome], bool],
        random: np.random.Generator,
    ) -> Child | None:
        first, second, standing = pair
        genome, origin = first, "crossover"
        if random.random() < self._settings.crossover:
            genome = cross_cells(first, second, self._genomes.cells, random)
        made: list[Change] = []
        for left in range(changes, 0, -1):
            passes = known if left == 1 else _none
            change = self._variation.mutate(genome, operator, (*standing, *lead), passes, random)
            if change is None:
                return None
            origin = operator
            made.append(change)
            genome = applied(genome, change)
        return Child(self._genomes.canonical(genome), origin, tuple(made))


def _none(genome: Genome) -> bool:
    return False
