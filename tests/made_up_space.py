"""A made-up space whose networks answer at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from pynas import Choice
from pynas.evolution import Costs, Evolution, EvolutionSettings, Genome
from pynas.pareto import Goal

BOTH = (Goal("accuracy", "max"), Goal("macs", "min"))
SMALL = EvolutionSettings(population=12, children=5)


def choices(sizes: list[int]) -> list[Choice]:
    return [Choice(f"layer{i}", tuple(f"o{j}" for j in range(size))) for i, size in enumerate(sizes)]


class Oracle:
    """A made-up space with unequal choices: accuracy saturates in what layers add, neighbours interact, MACs add up."""

    def __init__(self, sizes: list[int], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.sizes, shape = sizes, (len(sizes), max(sizes))
        self.costs = Costs(random.uniform(0.5, 2, (len(sizes), 1)) * random.uniform(0.1, 1, shape).cumsum(1), 1.0)
        self._gain = random.uniform(0.2, 1.5, (len(sizes), 1)) * np.sqrt(np.sort(random.random(shape), 1))
        self._gain += random.normal(0, 0.12, shape)
        self._pair = random.normal(0, 0.08, (len(sizes) - 1, max(sizes), max(sizes)))

    def accuracy(self, genome: Genome) -> float:
        index, layers = np.array(genome), np.arange(len(genome))
        total = self._gain[layers, index].sum() + self._pair[layers[:-1], index[:-1], index[1:]].sum()
        return float(1 - np.exp(-total / 4))

    def evolution(self, *, seed: int = 0, of: tuple[Goal, ...] = BOTH, **changes: Any) -> Evolution:
        changes = {"settings": SMALL, "costs": {"macs": self.costs}, **changes}
        return Evolution(choices(self.sizes), of, seed=seed, **changes)

    def run(self, evolution: Evolution, until: int, at_once: int | None = None) -> Evolution:
        while evolution.evaluations < until and (asked := evolution.ask(at_once)):
            evolution.tell([{"accuracy": self.accuracy(genome)} for genome in asked])
        return evolution


SPACE = Oracle([4, 3, 5, 2, 4, 4, 1, 3, 5, 4])
