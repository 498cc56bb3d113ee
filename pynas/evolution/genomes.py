"""Genomes: architectures as option indices, grouped into cells, with what is known of them before any evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pynas.architecture import Architecture
from pynas.choices import Choice, Slot
from pynas.registry import SearchSpace
from pynas.supernet import CostTable

Genome = tuple[int, ...]
Cells = tuple[tuple[int, ...], ...]
Floats = NDArray[np.float64]
CELL = 4  # choices of a cell where no cells are given: the longest run of layers in a stage of FairNAS's space


class Genomes:
    """The set of genomes of a space: one option index for each choice.

    Args:
        choices: Of the space; each picks one option. Numbers of options may differ.
        cells: Groups of choices that crossover keeps together, as indices; every choice in exactly one. By default
            runs of four choices; `cells_of` makes them from a space's stages.
        canonical: Maps a genome to the one that stands for all genomes of the same network; by default itself.

    Raises:
        ValueError: If a choice picks "any", or the cells do not divide the choices.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        cells: Sequence[Sequence[int]] | None = None,
        canonical: Callable[[Genome], Genome] | None = None,
    ) -> None:
        subset = [choice.name for choice in choices if choice.pick != "one"]
        if subset or not choices:
            raise ValueError(
                f"A genome takes one option of each choice, but {subset[0]!r} picks any subset."
                if subset
                else "A genome needs at least one choice."
            )
        self.choices = tuple(choices)
        self.sizes = tuple(len(choice.options) for choice in choices)
        places = range(len(choices))
        self.cells: Cells = tuple(
            tuple(int(place) for place in cell) for cell in (cells or [places[i : i + CELL] for i in places[::CELL]])
        )
        if sorted(itertools.chain(*self.cells)) != list(places) or not all(self.cells):
            raise ValueError(
                f"Each of the {len(choices)} choices must be in exactly one cell, none of them empty, but the cells "
                f"are {[list(cell) for cell in self.cells]}."
            )
        self._canonical = canonical

    @property
    def count(self) -> int:
        """Number of genomes, those of the same network counted apart."""
        return math.prod(self.sizes)

    def all(self) -> Iterator[Genome]:
        """Every genome, in order."""
        return itertools.product(*(range(size) for size in self.sizes))

    def canonical(self, genome: Sequence[int]) -> Genome:
        """The genome that stands for this network. Raises ValueError for what is no genome of the space."""
        own = self.check(genome)
        return own if self._canonical is None else self.check(self._canonical(own))

    def check(self, genome: Sequence[int]) -> Genome:
        """The genome as a tuple of integers. Raises ValueError for one of another space."""
        found = tuple(int(option) for option in genome)
        if len(found) != len(self.sizes):
            raise ValueError(f"A genome of this space has {len(self.sizes)} options, not {len(found)}: {found}.")
        for choice, option in zip(self.choices, found, strict=True):
            if not 0 <= option < len(choice.options):
                raise ValueError(
                    f"{choice.name!r} has {len(choice.options)} options, counted from 0; option {option} of genome "
                    f"{found} is none of them."
                )
        return found

    def draw(self, random: np.random.Generator) -> Genome:
        """A genome with every option equally probable."""
        return self.canonical([int(random.integers(size)) for size in self.sizes])

    def mask(self) -> NDArray[np.bool_]:
        """Which options exist, shape (choices, most options)."""
        mask = np.zeros((len(self.sizes), max(self.sizes)), dtype=bool)
        for row, size in enumerate(self.sizes):
            mask[row, :size] = True
        return mask


def cells_of(space: SearchSpace) -> Cells:
    """Cells of a space: the stages, that is runs of choices up to where the width or the resolution changes.

    A choice of several slots belongs where its first slot stands.
    """
    cells: list[list[int]] = []
    before: Slot | None = None
    seen: dict[str, None] = {}
    for slot in space.slots():
        if slot.choice.name in seen:
            continue
        starts = before is None or slot.stride != 1 or slot.out_channels != before.out_channels
        place = len(seen)
        seen[slot.choice.name] = None
        if starts:
            cells.append([place])
        else:
            cells[-1].append(place)
        before = slot
    return tuple(tuple(cell) for cell in cells)


def to_genome(architecture: Architecture) -> Genome:
    """Option indices of an architecture, in the order of its space's choices."""
    choices = architecture.search_space().choices()
    return tuple(choice.options.index(architecture.choices[choice.name][0]) for choice in choices)


@dataclass(frozen=True)
class Costs:
    """A cost that is known from the genome: a sum over choices.

    Args:
        values: Cost of every option of every choice, shape (choices, most options); padding is not read.
        fixed: Cost of everything outside the choices.
    """

    values: Floats
    fixed: float = 0.0

    @staticmethod
    def of(table: CostTable) -> Costs:
        """The costs in a table of MACs, parameters or latencies."""
        return Costs(table.by_choice().numpy(), table.fixed)

    def cost(self, genome: Genome) -> float:
        """Of one network."""
        return float(self.values[np.arange(len(genome)), list(genome)].sum()) + self.fixed

    def range(self, genomes: Genomes) -> tuple[float, float]:
        """Of the cheapest and the dearest network."""
        mask = genomes.mask()
        low, high = np.where(mask, self.values, np.inf).min(1), np.where(mask, self.values, -np.inf).max(1)
        return float(low.sum()) + self.fixed, float(high.sum()) + self.fixed
