"""Architectures under a budget: the cheapest and dearest, the most probable, and fair draws from those that fit.

The cost of a network is a sum over choices, so everything about "networks whose cost lies in a window" is answered by
dynamic programming over choices and cost, however rare a fit is. Costs are rounded up to bins of 1/4096 of the room
above the cheapest network: none exceeds the budget, and only those within a bin for each choice of it can be missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pynas.architecture import Architecture
from pynas.choices import Choice
from pynas.registry import SearchSpace
from pynas.subsets import SubsetCosts, picks_any
from pynas.supernet import CostTable

BINS = 4096
Floats = NDArray[np.float64]
Paths = NDArray[np.int64]


@dataclass(frozen=True)
class CostRange:
    """Costs of the cheapest and the dearest network of a space, in the table's unit."""

    low: float
    high: float


def cost_range(table: CostTable) -> CostRange:
    """What the cheapest and the dearest network of a space cost."""
    if picks_any(table.choices):
        subsets = SubsetCosts.of(table)
        return CostRange(subsets.low, subsets.high)
    costs, mask = table.by_choice().numpy(), table.choice_mask().numpy()
    low = np.where(mask, costs, np.inf).min(1).sum()
    high = np.where(mask, costs, -np.inf).max(1).sum()
    return CostRange(float(low) + table.fixed, float(high) + table.fixed)


def check_budget(table: CostTable, budget: float) -> None:
    """Refuses a budget that no network of the space meets.

    Raises:
        ValueError: Naming the cheapest network's cost.
    """
    bounds = cost_range(table)
    unit = table.unit
    if not np.isfinite(budget) or budget <= 0:
        raise ValueError(f"The budget must be a positive number of {unit}, not {budget!r}.")
    if budget < bounds.low:
        raise ValueError(
            f"No network of this space meets {budget:g} {unit}: the cheapest costs {bounds.low:.4g} {unit}, "
            f"the dearest {bounds.high:.4g} {unit}. Ask for at least {np.ceil(bounds.low * 1000) / 1000:g} {unit}."
        )


class BudgetedPaths:
    """The distribution of architectures given that their cost lies in a window.

    Args:
        table: Costs.
        log_probabilities: Of every option of every choice, shape (choices, options), minus infinity where there is
            none.
        budget: Upper end of the window; every returned path costs at most this.
        slack: The window reaches down to (1 - slack) * budget. Where no network lies in it, it is the dearest networks
            below it; where the budget does not bind, every network.

    Raises:
        ValueError: If no network meets the budget.
    """

    def __init__(self, table: CostTable, log_probabilities: Floats, budget: float, slack: float = 0.1) -> None:
        check_budget(table, budget)
        self.table = table
        self.budget = budget
        self.mask = table.choice_mask().numpy() & np.isfinite(log_probabilities)
        self.costs = np.where(self.mask, table.by_choice().numpy(), np.inf)
        self.log_p = np.where(self.mask, log_probabilities, -np.inf)
        cheapest = self.costs.min(1, keepdims=True)
        self._base = float(cheapest.sum()) + table.fixed
        dearest = cost_range(table).high
        room = min(budget, dearest) - self._base
        if room < 0:
            raise ValueError(f"None of the allowed options meets {budget:g} {table.unit}: {self._base:.4g} at least.")
        # A budget that does not bind must not lose paths to rounding, which adds up to one bin for each choice.
        bins = BINS if budget < dearest else BINS - len(self.costs)
        self._bin = max(room, 1e-12 * budget) / bins
        # Rounding up keeps every path within the budget; the cheapest option of a choice has no excess to round.
        steps = np.ceil((self.costs - cheapest) / self._bin - 1e-9)
        self._steps = np.where(steps <= BINS, steps, BINS + 1).astype(np.int64)
        self.low = (1 - slack) * budget if budget < dearest else 0.0

    def _tables(self, best: bool) -> list[Floats]:
        """Row l, bin b: log-sum (or maximum) of the probabilities of all prefixes of length l that use b bins."""
        rows = [np.full(BINS + 1, -np.inf)]
        rows[0][0] = 0.0
        for log_p, steps in zip(self.log_p, self._steps, strict=True):
            shifted = np.full((len(log_p), BINS + 1), -np.inf)
            for option, step in enumerate(steps):
                if step <= BINS and np.isfinite(log_p[option]):
                    shifted[option, step:] = rows[-1][: BINS + 1 - step] + log_p[option]
            rows.append(shifted.max(0) if best else np.logaddexp.reduce(shifted, axis=0))
        return rows

    def _window(self, last: Floats, low: float) -> Paths:
        reachable = np.flatnonzero(np.isfinite(last))
        inside = reachable[reachable * self._bin + self._base >= low]
        return inside if len(inside) else reachable[-1:]

    def _walk(self, tables: list[Floats], bin_: int, pick: np.random.Generator | None) -> list[int]:
        path: list[int] = []
        for row in range(len(self.log_p) - 1, -1, -1):
            before = bin_ - self._steps[row]
            score = np.where(before >= 0, tables[row][np.maximum(before, 0)] + self.log_p[row], -np.inf)
            if pick is None:
                option = int(score.argmax())
            else:
                weights = np.exp(score - score.max())
                option = int(pick.choice(len(score), p=weights / weights.sum()))
            path.append(option)
            bin_ = int(before[option])
        return path[::-1]

    def cost(self, path: list[int]) -> float:
        """Exact cost of a path of option indices, fixed part included."""
        return float(self.costs[np.arange(len(path)), path].sum()) + self.table.fixed

    def most_likely(self) -> list[int]:
        """The most probable path whose cost lies in the window."""
        tables = self._tables(best=True)
        window = self._window(tables[-1], self.low)
        ranked = window[np.argsort(-tables[-1][window], kind="stable")]
        for bin_ in ranked:
            path = self._walk(tables, int(bin_), None)
            if self.cost(path) >= self.low:
                return path
        return self._walk(tables, int(window[-1]), None)

    def sample(self, count: int, seed: int) -> list[list[int]]:
        """`count` independent paths from the distribution given the window, as lists of option indices."""
        tables = self._tables(best=False)
        window = self._window(tables[-1], self.low)
        weights = np.exp(tables[-1][window] - tables[-1][window].max())
        random = np.random.default_rng(seed)
        paths: list[list[int]] = []
        for _ in range(20 * count):
            bin_ = int(random.choice(window, p=weights / weights.sum()))
            path = self._walk(tables, bin_, random)
            # A bin that straddles the window's lower end holds paths on both sides of it.
            if self.cost(path) >= self.low or len(window) == 1:
                paths.append(path)
            if len(paths) == count:
                break
        return paths or [self.most_likely()]


def to_architecture(space: SearchSpace, choices: tuple[Choice, ...], path: list[int]) -> Architecture:
    """The architecture that takes option `path[l]` at choice l."""
    chosen = {choice.name: (choice.options[index],) for choice, index in zip(choices, path, strict=True)}
    return Architecture(space.name, chosen, space.options())
