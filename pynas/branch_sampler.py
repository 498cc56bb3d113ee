"""Gates of RepNAS (arXiv 2109.03508): the options of largest noisy logits over the whole net, within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pynas.choices import Choice, Gates, Slot
from pynas.kernels.noise import Domain, gumbel, random_words
from pynas.subsets import SubsetCosts
from pynas.supernet import CostTable


@dataclass(frozen=True)
class BranchDraw:
    """One draw for the whole net.

    Args:
        gates: By slot name; exactly 0 or 1 in the forward pass.
        taken: Which options have a gate of 1, bool, (choices, options), on the CPU.
        empty: Choices that were left with nothing; their blocks run the fallback, which counts apart.
    """

    gates: Mapping[str, Gates]
    taken: Tensor
    empty: int


class BranchSampler(nn.Module):
    """Logits of all branches of a net, and gates drawn from them, where the logits are.

    Every draw ranks r = logit + Gumbel - Gumbel (logistic noise) over all branches at once and takes the best within
    the budget; a gate is 1 for these and 0 for the others, and its gradient that of sigmoid(r) (as in the released
    code; the article's own formula is not known). Only taken branches run, so only they give their logits a gradient.

    Args:
        choices: Of the space.
        slots: Of the space, each with one of these choices.
        table: Cost of every branch.
        budget: Largest sum of costs.
        seed: Together with the step it determines the noise.
    """

    def __init__(
        self, choices: Sequence[Choice], slots: Sequence[Slot], table: CostTable, budget: float, seed: int
    ) -> None:
        super().__init__()
        self.choices, self.slots, self.budget, self.seed = tuple(choices), tuple(slots), budget, seed
        self.costs = SubsetCosts.of(table)
        self.logits = nn.Parameter(torch.zeros(self.costs.values.shape))
        self._rows = {choice.name: row for row, choice in enumerate(self.choices)}

    def noise(self, step: int) -> Tensor:
        """Difference of two Gumbel draws for every branch, (choices, options)."""
        rows, width = self.logits.shape
        words = random_words(Domain.GUMBEL, self.seed, step, torch.arange(2), width, rows)  # (2, options, choices)
        first, second = gumbel(words)
        difference: Tensor = (first - second).T.to(self.logits)
        return difference

    def draw(self, step: int) -> BranchDraw:
        """Gates with noise, as in training."""
        return self._gated(self.logits + self.noise(step))

    def best(self) -> Tensor:
        """Which branches have the largest logits, without noise, bool, (choices, options)."""
        return self.costs.fill(self.logits, self.budget)

    def fixed(self, taken: Tensor) -> BranchDraw:
        """Gates of chosen branches, without gradient."""
        return self._draw(taken.to(self.logits), taken)

    def _gated(self, r: Tensor) -> BranchDraw:
        taken = self.costs.fill(r, self.budget)
        soft = r.sigmoid()
        # In this order the value is exactly 0 or 1: the bracket is zero to the last bit.
        return self._draw(taken.to(r) + (soft - soft.detach()), taken)

    def _draw(self, values: Tensor, taken: Tensor) -> BranchDraw:
        gates = {}
        rows = taken.tolist()
        for slot in self.slots:
            row = self._rows[slot.choice.name]
            run = tuple(index for index in range(len(slot.choice.options)) if rows[row][index])
            gates[slot.name] = Gates(values[row, : len(slot.choice.options)], run, run)
        return BranchDraw(gates, taken, sum(not any(row) for row in rows))
