"""Networks that take any subset of options at each choice, under a budget that their options' costs add up to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pynas.architecture import Architecture
from pynas.choices import Choice
from pynas.registry import SearchSpace
from pynas.supernet import CostTable

ROUNDING = 1e-9  # share of a budget that sums of costs may be over it


def picks_any(choices: Sequence[Choice]) -> bool:
    """Whether subsets are chosen. Raises ValueError for a space that mixes both kinds of choice."""
    kinds = {choice.pick for choice in choices}
    if len(kinds) > 1:
        raise ValueError("A space whose choices pick one option here and any subset there cannot be searched.")
    return kinds == {"any"}


def log10_networks(choices: Sequence[Choice]) -> float:
    """Logarithm, to base 10, of the number of networks of a space."""
    return math.fsum(len(c.options) * math.log10(2) if c.pick == "any" else math.log10(len(c.options)) for c in choices)


@dataclass(frozen=True)
class SubsetCosts:
    """A cost table as sums over subsets.

    Args:
        values: Cost of every option of every choice, float64, (choices, options).
        mask: Which of them are options, bool, same shape.
        empty: Cost of every choice of which nothing is taken, (choices,).
        fixed: Of everything else.
        unit: Of all costs.
    """

    values: Tensor
    mask: Tensor
    empty: Tensor
    fixed: float
    unit: str

    @staticmethod
    def of(table: CostTable) -> SubsetCosts:
        """From a table of slots; those of one choice go together."""
        empty = torch.zeros(len(table.choices), dtype=torch.float64)
        if table.empty is not None:
            empty.index_add_(0, torch.tensor(table.choice_of), table.empty)
        return SubsetCosts(table.by_choice(), table.choice_mask(), empty, table.fixed, table.unit)

    @property
    def low(self) -> float:
        """Cost of the network that takes nothing."""
        return self.fixed + float(self.empty.sum())

    @property
    def high(self) -> float:
        """Cost of the network that takes every option."""
        return self.fixed + float(self.values[self.mask].sum())

    def check(self, budget: float) -> None:
        """Raises ValueError for a budget that leaves no room for a single option, naming the least that does."""
        first = (self.values - self.empty[:, None])[self.mask]
        least = self.low + max(0.0, float(first.min()))
        if not math.isfinite(budget) or budget * (1 + ROUNDING) < least:
            whole = math.ceil(least) if self.unit == "branches" else math.ceil(least * 1000) / 1000
            raise ValueError(
                f"A budget of {budget:g} {self.unit} leaves room for no branch: it takes {whole:g} at least, and all "
                f"of them take {self.high:.6g}."
            )

    def fill(self, scores: Tensor, budget: float) -> Tensor:
        """Takes options in the order of their scores, highest first, as long as the budget allows.

        One that does not fit is passed over, and cheaper ones after it may still be taken. Where all options cost the
        same, this is the top C of them. Equal scores are taken in the order of the table.

        Args:
            scores: (choices, options).
            budget: Largest cost of the network.

        Returns:
            Which options are taken, bool, (choices, options), on the CPU.
        """
        width = scores.shape[1]
        limit = budget * (1 + ROUNDING)
        ordered = scores.detach().cpu().masked_fill(~self.mask, -torch.inf).flatten()
        order = torch.argsort(ordered, descending=True, stable=True)[: int(self.mask.sum())].tolist()
        values, empty = self.values.tolist(), self.empty.tolist()
        taken = np.zeros(scores.shape, dtype=np.bool_)
        touched = [False] * len(empty)
        total = self.low
        for place in order:
            row, column = divmod(place, width)
            extra = values[row][column] - (0.0 if touched[row] else empty[row])
            if total + extra <= limit:
                total += extra
                touched[row] = taken[row, column] = True
        return torch.from_numpy(taken)


def subset_architecture(space: SearchSpace, taken: Tensor) -> Architecture:
    """The network that takes the options of a mask, bool, (choices, options)."""
    chosen = {
        choice.name: tuple(name for name, on in zip(choice.options, row, strict=False) if on)
        for choice, row in zip(space.choices(), taken.tolist(), strict=True)
    }
    return Architecture(space.name, chosen, space.options())


def random_subsets(space: SearchSpace, table: CostTable, count: int, budget: float, seed: int) -> list[Architecture]:
    """Different networks of a budget, every option with the same chance: `fill` in random orders.

    May be fewer where there are not so many.
    """
    costs, random = SubsetCosts.of(table), np.random.default_rng(seed)
    found: dict[str, Architecture] = {}
    for _ in range(20 * count):
        scores = torch.from_numpy(random.random(tuple(costs.values.shape)))
        architecture = subset_architecture(space, costs.fill(scores, budget))
        found.setdefault(architecture.fingerprint, architecture)
        if len(found) == count:
            break
    return list(found.values())
