"""What is known of goals before, and told after, a network is evaluated: values, limits, reference points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pynas.evolution.genomes import Costs, Genome, Genomes
from pynas.evolution.start import Windows
from pynas.pareto import Floats, Goal, violations


class Figures:
    """Goals of an evolution together with the costs that tell some of them from the genome.

    Args:
        genomes: Of the space.
        goals: All of them.
        costs: Of the known goals.

    Raises:
        ValueError: If names repeat, nothing is pursued, costs do not fit goals or choices, or no genome meets a known
            limit; then with the nearest value.
    """

    def __init__(self, genomes: Genomes, goals: Sequence[Goal], costs: Mapping[str, Costs]) -> None:
        names = [goal.name for goal in goals]
        if len(set(names)) != len(names):
            raise ValueError(f"Goals must have different names, not {names}.")
        if not any(goal.pursued for goal in goals):
            raise ValueError("None of the goals is pursued: there is nothing to optimise.")
        self.genomes, self.goals, self.costs = genomes, tuple(goals), dict(costs)
        self._check_costs()
        self._columns = [index for index, goal in enumerate(goals) if goal.pursued]
        self._pursued = [goals[index] for index in self._columns]

    def _check_costs(self) -> None:
        by_name = {goal.name: goal for goal in self.goals}
        mask = self.genomes.mask()
        for name, known in self.costs.items():
            if name not in by_name:
                raise ValueError(f"There are costs for {name!r}, which is no goal; the goals are {', '.join(by_name)}.")
            if known.values.shape != mask.shape or not np.isfinite(known.values[mask]).all():
                raise ValueError(
                    f"The costs of {name} must be finite numbers of shape {mask.shape} (choices, options), not "
                    f"{known.values.shape}."
                )
            goal, (low, high) = by_name[name], known.range(self.genomes)
            nearest = low if goal.direction == "min" else high
            if goal.limit is not None and goal.sign * nearest > goal.sign * goal.limit:
                raise ValueError(f"No network of this space has {goal.bound}: the nearest has {_exact(nearest)}.")

    @property
    def leads(self) -> list[bool]:
        """For every pursued goal whether it is known before evaluation."""
        return [goal.name in self.costs for goal in self._pursued]

    @property
    def pursued_costs(self) -> dict[str, Costs]:
        """Costs of the known goals that are pursued; where none is, of those that are limited."""
        pursued = {goal.name: self.costs[goal.name] for goal in self._pursued if goal.name in self.costs}
        return pursued or self.costs

    def row(self, genome: Genome, told: Mapping[str, float]) -> list[float]:
        """Values of all goals of a network. Raises ValueError when one is missing or not finite."""
        row = []
        for goal in self.goals:
            if goal.name in self.costs:
                row.append(self.costs[goal.name].cost(genome))
                continue
            if goal.name not in told:
                wanted = ", ".join(each.name for each in self.goals if each.name not in self.costs)
                raise ValueError(f"The values of genome {genome} lack {goal.name!r}; told must be: {wanted}.")
            value = float(told[goal.name])
            if not math.isfinite(value):
                raise ValueError(f"{goal.name} of genome {genome} is {value}; values must be finite numbers.")
            row.append(value)
        return row

    def allowed(self, genome: Genome) -> bool:
        """Whether a genome meets the limits that are known before evaluation."""
        return all(
            goal.limit is None or goal.sign * self.costs[goal.name].cost(genome) <= goal.sign * goal.limit
            for goal in self.goals
            if goal.name in self.costs
        )

    def windows(self) -> Windows:
        """Costs that the known limits leave, for each known goal."""
        out = {}
        for goal in self.goals:
            if goal.name in self.costs:
                low, high = self.costs[goal.name].range(self.genomes)
                if goal.limit is not None:
                    low, high = (low, min(high, goal.limit)) if goal.sign > 0 else (max(low, goal.limit), high)
                out[goal.name] = (low, high)
        return out

    def standing(self, values: Floats) -> Floats:
        """Where each network stands in every pursued goal, from 0 (best of all) to 1 (worst of all)."""
        turned = values[:, self._columns] * np.array([goal.sign for goal in self._pursued])
        low, high = turned.min(0), turned.max(0)
        out: Floats = (turned - low) / np.where(high > low, high - low, 1.0)
        return out

    # Reference points and errors

    def first_reference(self, given: Mapping[str, float]) -> dict[str, float]:
        """The reference point as far as it is known before any evaluation: given, else a limit, else the worst cost.

        Raises:
            ValueError: If a name is no pursued goal or a value is not finite.
        """
        names = [goal.name for goal in self._pursued]
        for name, value in given.items():
            if name not in names or not math.isfinite(value):
                raise ValueError(f"The reference must be a finite value of {', '.join(names)}, not {name} = {value}.")
        out: dict[str, float] = {}
        for goal in self._pursued:
            if goal.name in given:
                out[goal.name] = float(given[goal.name])
            elif goal.limit is not None:
                out[goal.name] = float(goal.limit)
            elif goal.name in self.costs:
                low, high = self.costs[goal.name].range(self.genomes)
                out[goal.name] = high if goal.direction == "min" else low
        return out

    def worst(self, values: Floats) -> dict[str, float]:
        """The worst value of every pursued goal."""
        turned = [goal.sign * values[:, index] for index, goal in zip(self._columns, self._pursued, strict=True)]
        return {goal.name: float(goal.sign * worst.max()) for goal, worst in zip(self._pursued, turned, strict=True)}

    def known_bounds(self) -> str:
        """The known limits, as they read in a sentence."""
        return ", ".join(goal.bound for goal in self.goals if goal.limit is not None and goal.name in self.costs)

    def nearest(self, values: Floats) -> str:
        """What to say where no network meets the limits: which comes nearest."""
        limited = [(index, goal) for index, goal in enumerate(self.goals) if goal.limit is not None]
        closest = int(violations(values, self.goals).sum(1).argmin())
        reached = ", ".join(f"{goal.name} {values[closest, index]:.6g}" for index, goal in limited)
        return (
            f"None of {len(values)} evaluated networks meets {', '.join(goal.bound for _, goal in limited)}; the "
            f"nearest has {reached}. Loosen the limit, or evaluate more networks."
        )


def _exact(value: float) -> str:
    """A value that, typed again as a limit, is met: counts to the unit."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.9g}"
