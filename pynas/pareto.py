"""Several objectives at once: dominance, fronts, crowding and hypervolume, over pymoo.

A `Goal` is one objective of such a search, with the direction that is better. Values come as arrays of shape
(networks, goals) in the goals' own units and directions; what pymoo minimises is made here and nowhere else.
pymoo loads when a function is called, not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.names import unknown

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Goal:
    """One objective of a multi-objective search, or a mere constraint.

    Args:
        name: What it is called where values are given by name: "accuracy", "macs", "latency_ms".
        direction: Whether more ("max") or less ("min") is better.
        limit: The worst value that is allowed, itself included; None for any. A network beyond it is infeasible.
        pursued: Whether it is optimised. Otherwise only its limit counts.

    Raises:
        ValueError: If the direction is no such word, the limit is not finite, or nothing is asked of the goal.
    """

    name: str
    direction: Literal["max", "min"]
    limit: float | None = None
    pursued: bool = True

    def __post_init__(self) -> None:
        if self.direction not in ("max", "min"):
            raise unknown(f"direction of {self.name}", self.direction, ("max", "min"))
        if self.limit is not None and not np.isfinite(self.limit):
            raise ValueError(f"The limit of {self.name} must be a finite number, not {self.limit!r}.")
        if self.limit is None and not self.pursued:
            raise ValueError(f"{self.name} is not pursued and has no limit: leave it out, or give it a limit.")

    @property
    def sign(self) -> float:
        """What turns a value into one to be minimised."""
        return 1.0 if self.direction == "min" else -1.0

    @property
    def bound(self) -> str:
        """The limit as it reads in a sentence: "accuracy >= 0.88"."""
        return f"{self.name} {'<=' if self.direction == 'min' else '>='} {self.limit:g}"


# Whether more parameters are better is an open matter among the authors of FairNAS: MoreMNAS minimises them, MoGA
# argues for more. `goals` changes a direction on request.
GOALS = {
    goal.name: goal
    for goal in (Goal("accuracy", "max"), Goal("macs", "min"), Goal("params", "min"), Goal("latency_ms", "min"))
}
SHORT = {"latency": "latency_ms"}


def goals(
    names: str | Iterable[str],
    limits: Mapping[str, float] | None = None,
    directions: Mapping[str, Literal["max", "min"]] | None = None,
) -> tuple[Goal, ...]:
    """Goals by name: any subset of accuracy, macs, params and latency_ms ("latency" for short).

    Args:
        names: The goals that are pursued, in order; a string is split at commas.
        limits: Worst allowed values. A goal that is limited without being pursued is a constraint only.
        directions: Where the usual one (more accuracy, less of the others) is not wanted.

    Raises:
        ValueError: For a name that is no goal, one that comes twice, none at all, or a direction of what is neither
            pursued nor limited.

    >>> [goal.bound for goal in goals("accuracy,macs", limits={"latency": 20}) if goal.limit is not None]
    ['latency_ms <= 20']
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    pursued = [_known(name) for name in listed if name.strip()]
    if not pursued:
        raise ValueError(f"Name at least one objective of {', '.join(GOALS)}.")
    twice = sorted({name for name in pursued if pursued.count(name) > 1})
    if twice:
        raise ValueError(f"The objective {twice[0]!r} is named twice.")
    bounds = {_known(name): float(limit) for name, limit in (limits or {}).items()}
    turned = {_known(name): direction for name, direction in (directions or {}).items()}
    for name in turned:
        if name not in (*pursued, *bounds):
            raise ValueError(
                f"There is a direction of {name}, which is neither an objective nor limited. Add it to the objectives, "
                "or leave the direction out."
            )
    made = []
    for name in [*pursued, *(name for name in bounds if name not in pursued)]:
        direction = turned.get(name, GOALS[name].direction)
        made.append(Goal(name, direction, bounds.get(name), name in pursued))
    return tuple(made)


def _known(name: str) -> str:
    word = SHORT.get(name.strip(), name.strip())
    if word not in GOALS:
        raise unknown("objective", word, GOALS)
    return word


def check_values(values: Any, goals: Sequence[Goal]) -> Floats:
    """The values as an array (networks, goals). Raises ValueError for another shape or a value that is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(goals):
        raise ValueError(
            f"Values must have the shape (networks, {len(goals)}), a column each for "
            f"{', '.join(goal.name for goal in goals)}, not {array.shape}."
        )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"{goals[column].name} of network {row} is {array[row, column]}; values must be finite.")
    return array


def minimised(values: Any, goals: Sequence[Goal]) -> Floats:
    """The pursued goals' columns, turned so that less is better, shape (networks, pursued goals)."""
    array = check_values(values, goals)
    kept = [index for index, goal in enumerate(goals) if goal.pursued]
    if not kept:
        raise ValueError("None of the goals is pursued: there is nothing to optimise.")
    signs = np.array([goals[index].sign for index in kept])
    out: Floats = array[:, kept] * signs
    return out


def violations(values: Any, goals: Sequence[Goal]) -> Floats:
    """By how much each limit is broken, as a share of the limit (of 1 where it is 0); shape (networks, limits).

    Nothing is negative, and a network is feasible when its row is zero. Shares let limits of different units be added.
    """
    array = check_values(values, goals)
    columns = [
        np.maximum(goal.sign * (array[:, index] - goal.limit), 0.0) / (abs(goal.limit) or 1.0)
        for index, goal in enumerate(goals)
        if goal.limit is not None
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(array), 0))


def ranks(values: Any, goals: Sequence[Goal]) -> Indices:
    """Number of the front that each network is in, 0 for the best, shape (networks,).

    Feasible networks are sorted by dominance; infeasible ones follow, one front for each total violation (constrained
    domination, Deb et al. 2002, section VI).
    """
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    costs, broken = minimised(values, goals), violations(values, goals).sum(1)
    out = np.zeros(len(costs), dtype=np.int64)
    fine = np.flatnonzero(broken == 0)
    fronts = NonDominatedSorting().do(costs[fine])
    for number, members in enumerate(fronts):
        out[fine[members]] = number
    bad = np.flatnonzero(broken > 0)
    out[bad] = len(fronts) + np.unique(broken[bad], return_inverse=True)[1]
    return out


def front(values: Any, goals: Sequence[Goal]) -> Indices:
    """Indices of the feasible networks that no feasible one dominates, by the first pursued goal, best first.

    Equal networks do not dominate each other, so all of them are in. Empty where nothing is feasible.
    """
    costs, broken = minimised(values, goals), violations(values, goals).sum(1)
    members = np.flatnonzero((ranks(values, goals) == 0) & (broken == 0))
    order = np.argsort(costs[members, 0], kind="stable")
    return np.asarray(members[order], dtype=np.int64)


def dominators(values: Any, others: Any, goals: Sequence[Goal]) -> Indices:
    """How many of `others` dominate each network, limits first (constrained domination); shape (networks,)."""
    ours, theirs = minimised(values, goals), minimised(others, goals)
    broken, broken_others = violations(values, goals).sum(1), violations(others, goals).sum(1)
    no_worse = (theirs[None] <= ours[:, None]).all(-1) & (theirs[None] < ours[:, None]).any(-1)
    both_fine = (broken[:, None] == 0) & (broken_others[None] == 0)
    beaten = np.where(both_fine, no_worse, broken_others[None] < broken[:, None])
    return np.asarray(beaten.sum(1), dtype=np.int64)


def hypervolume(values: Any, goals: Sequence[Goal], reference: Mapping[str, float]) -> float:
    """Volume that the feasible networks dominate, up to a reference point; in the product of the goals' units.

    Args:
        values: Shape (networks, goals).
        goals: What the columns are; only pursued ones span the volume.
        reference: The worst value of every pursued goal that counts. Networks not better than it in all add nothing.

    Raises:
        ValueError: If a pursued goal has no reference.
    """
    pursued = [goal for goal in goals if goal.pursued]
    for goal in pursued:
        if goal.name not in reference:
            raise ValueError(f"The reference point lacks {goal.name!r}; it needs {', '.join(g.name for g in pursued)}.")
    point = np.array([goal.sign * reference[goal.name] for goal in pursued])
    costs = minimised(values, goals)
    costs = costs[(violations(values, goals).sum(1) == 0) & (costs < point).all(1)]
    if not len(costs):
        return 0.0
    if len(pursued) == 1:
        return float(point[0] - costs.min())
    from pymoo.indicators.hv import Hypervolume

    return float(Hypervolume(ref_point=point, norm_ref_point=False).do(costs))


class Selection:
    """NSGA-II's choice of who survives and who has children: pymoo's rank-and-crowding survival and tournament.

    Args:
        values: Of all networks that compete, shape (networks, goals).
        goals: What the columns are.
        keep: How many survive.
        random: Breaks ties.
    """

    def __init__(self, values: Any, goals: Sequence[Goal], keep: int, random: np.random.Generator) -> None:
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        costs, broken = minimised(values, goals), violations(values, goals)
        self._random = random
        problem = Problem(n_var=1, n_obj=costs.shape[1], n_ieq_constr=broken.shape[1])
        everyone = Population.new("X", np.arange(len(costs))[:, None], "F", costs, "G", broken)
        for member in everyone:
            member.set("rank", len(costs))  # pymoo ranks only feasible survivors, and its tournament reads all ranks
            member.set("crowding", 0.0)
        self._population = RankAndCrowding().do(problem, everyone, n_survive=keep, random_state=random)

    @property
    def survivors(self) -> Indices:
        """Indices into the values, shape (min(keep, networks),)."""
        return np.asarray(self._population.get("X")[:, 0], dtype=np.int64)

    def parents(self, pairs: int, entrants: int = 2) -> Indices:
        """Pairs of parents by tournaments on violation, rank and crowding; indices into the values, (pairs, 2).

        Args:
            pairs: How many.
            entrants: Of a tournament; the best of them becomes a parent.
        """
        from pymoo.operators.selection.tournament import TournamentSelection

        tournament = TournamentSelection(func_comp=self._winners, pressure=entrants)
        chosen = tournament.do(None, self._population, pairs, 2, to_pop=False, random_state=self._random)
        return self.survivors[np.asarray(chosen, dtype=np.int64)]

    def _winners(self, population: Any, entrants: Any, **_: Any) -> Any:
        """Of each row of entrants the one that comes first; equals in random order."""
        broken, rank, crowding = (population.get(name).ravel() for name in ("CV", "rank", "crowding"))
        shuffled = self._random.permutation(len(population))
        order = shuffled[np.lexsort((-crowding[shuffled], rank[shuffled], broken[shuffled]))]
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return entrants[np.arange(len(entrants)), place[entrants].argmin(1)]
