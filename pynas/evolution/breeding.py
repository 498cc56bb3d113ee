"""Children: parents crossed and mutated until the child is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pynas.evolution.genomes import Genome, Genomes
from pynas.evolution.policy import Change
from pynas.evolution.settings import EvolutionSettings
from pynas.evolution.variation import Variation, applied, cross_cells

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
        for _ in range(self._settings.children):
            for attempt in range(TRIES):
                pairs = pairs or parents(AT_ONCE)
                child = self._child(pairs.pop(), attempt, random)
                if child.genome not in children and not refused(child.genome):
                    children[child.genome] = child
                    break
        return list(children.values())

    def _child(self, pair: Parents, attempt: int, random: np.random.Generator) -> Child:
        first, second, standing = pair
        genome, origin = first, "crossover"
        if random.random() < self._settings.crossover:
            genome = cross_cells(first, second, self._genomes.cells, random)
        changes: list[Change] = []
        if attempt > 0 or random.random() < self._settings.mutation:
            context = (*standing, *self._variation.lead(random))
            for _ in range(1 + attempt // WIDER):
                mutation = self._variation.mutate(genome, context, random)
                if mutation is None:
                    break
                change, origin = mutation
                changes.append(change)
                genome = applied(genome, change)
        return Child(self._genomes.canonical(genome), origin, tuple(changes))
