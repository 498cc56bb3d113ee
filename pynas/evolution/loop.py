"""The evolution itself: ask for genomes, be told their values, select, learn, breed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pynas.choices import Choice
from pynas.evolution.breeding import Breeder, Child, Parents
from pynas.evolution.figures import Figures
from pynas.evolution.genomes import Costs, Genome, Genomes
from pynas.evolution.policy import Policy
from pynas.evolution.settings import EvolutionSettings
from pynas.evolution.start import STARTS, remaining
from pynas.evolution.variation import Variation
from pynas.pareto import Floats, Goal, Selection, dominators, front, hypervolume


@dataclass(frozen=True)
class Evaluated:
    """A network that was evaluated.

    Args:
        genome: Canonical.
        values: Of every goal by name, in its own unit.
        origin: What made it: "start", "crossover", "natural", "reinforced", "prior" or "random".
        generation: When, from 0.
    """

    genome: Genome
    values: Mapping[str, float]
    origin: str
    generation: int


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Args:
        number: From 0, the starting population.
        evaluations: Networks evaluated up to its end.
        hypervolume: Dominated by all of them, see `Evolution`.
        members: Networks evaluated in it.
    """

    number: int
    evaluations: int
    hypervolume: float
    members: tuple[Evaluated, ...]


class Evolution:
    """Multi-objective reinforced evolution (MoreMNAS, arXiv 1901.01074; FairNAS, arXiv 1907.01845, its search stage).

    NSGA-II (Deb et al., 2002) over genomes: rank-and-crowding survival among all parents and children,
    tournaments, crossover of cells, and mutations that are natural, reinforced (by a policy that REINFORCE trains on
    how few networks dominate the children it made) or led by a prior. Use:

        evolution = Evolution(space.choices(), goals("accuracy,macs"), costs={"macs": Costs.of(table)}, seed=0)
        while evolution.evaluations < 600 and (genomes := evolution.ask(8)):
            evolution.tell([{"accuracy": evaluate(genome)} for genome in genomes])

    How many are asked for at a time changes nothing but the order of work: a generation closes when all its networks
    are told. No network is asked for twice. Values of known goals (`costs`) are not told; children that would break
    their limits are never asked for. Limits of other goals are handled by constrained domination.

    Args:
        choices: Of the space.
        goals: What to optimise, and limits.
        settings: Hyper-parameters.
        seed: Of all random numbers.
        costs: Goals that are known from the genome, as sums over choices.
        cells: Groups of choices that crossover keeps together, see `Genomes`.
        canonical: Maps a genome to the one that stands for its network, where several genomes are one network.
        prior: Weights for prior mutation, see `Variation`.
        reference: Worst values that count in the hypervolume. Where a goal is left out: its limit, else (for known
            goals) the worst possible value, else the worst of the starting population.

    Raises:
        ValueError: If anything does not fit together, or no genome meets the known limits; then with the nearest value.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        goals: Sequence[Goal],
        settings: EvolutionSettings | None = None,
        *,
        seed: int = 0,
        costs: Mapping[str, Costs] | None = None,
        cells: Sequence[Sequence[int]] | None = None,
        canonical: Callable[[Genome], Genome] | None = None,
        prior: Any = None,
        reference: Mapping[str, float] | None = None,
    ) -> None:
        self.genomes = Genomes(choices, cells, canonical)
        self.goals = tuple(goals)
        self.settings = settings or EvolutionSettings()
        self.seed = seed
        self._figures = Figures(self.genomes, self.goals, costs or {})
        leads = self._figures.leads
        self._policy = Policy(self.genomes.sizes, len(leads) + 2, self.settings, seed)
        self._variation = Variation(self.genomes, self.settings, self._policy, prior, self.goals, costs or {})
        self._breeder = Breeder(self.genomes, self.settings, self._variation)
        self._reference = self._figures.first_reference(reference or {})
        self._generation = 0
        self._seen: dict[Genome, int] = {}
        self._values: list[list[float]] = []
        self._about: list[tuple[str, int]] = []
        self._population: list[int] = []
        self._hypervolumes: list[tuple[int, float]] = []
        self._children = [Child(genome, "start") for genome in self._start()]
        self._done = 0  # children of this generation that were told

    # What a caller does

    def ask(self, most: int | None = None) -> list[Genome]:
        """Genomes to be evaluated next, at most `most` of them; the same ones until they are told.

        Empty when every network of the space that meets the known limits has been evaluated.
        """
        if most is not None and most < 1:
            raise ValueError(f"Ask for at least one genome, not {most}.")
        waiting = [child.genome for child in self._children[self._done :]]
        return waiting if most is None else waiting[:most]

    def tell(self, values: Sequence[Mapping[str, float]]) -> None:
        """Takes the values of the first `len(values)` genomes of `ask`, in its order.

        Args:
            values: For each genome the value of every goal that is not among the known costs, by name.

        Raises:
            ValueError: If there are more values than genomes, one lacks a goal or is not finite; nothing is taken then.
        """
        waiting = self.ask()
        if len(values) > len(waiting):
            raise ValueError(f"{len(values)} values were told for {len(waiting)} genomes asked for.")
        rows = [self._figures.row(genome, told) for genome, told in zip(waiting, values, strict=False)]
        for row in rows:
            child = self._children[self._done]
            self._seen[child.genome] = len(self._values)
            self._values.append(row)
            self._about.append((child.origin, self._generation))
            self._done += 1
        if rows and self._done == len(self._children):
            self._close()

    @property
    def evaluations(self) -> int:
        """Different networks evaluated so far."""
        return len(self._values)

    @property
    def evaluated(self) -> tuple[Evaluated, ...]:
        """All of them, in order."""
        names = [goal.name for goal in self.goals]
        return tuple(
            Evaluated(genome, dict(zip(names, row, strict=True)), origin, generation)
            for genome, row, (origin, generation) in zip(self._seen, self._values, self._about, strict=True)
        )

    @property
    def history(self) -> tuple[Generation, ...]:
        """Finished generations with their hypervolume."""
        everyone = self.evaluated
        out, start = [], 0
        for number, (end, volume) in enumerate(self._hypervolumes):
            out.append(Generation(number, end, volume, everyone[start:end]))
            start = end
        return tuple(out)

    @property
    def reference(self) -> Mapping[str, float]:
        """The reference point of the hypervolume; without goals whose reference the first generation sets."""
        return dict(self._reference)

    def front(self) -> list[Evaluated]:
        """The networks that none dominates, by the first pursued goal, best first.

        Raises:
            ValueError: If none of the networks evaluated meets the limits, naming the nearest value.
        """
        everyone = self.evaluated
        if not everyone:
            return []
        found = [everyone[index] for index in front(self._array(), self.goals)]
        if not found:
            raise ValueError(self._figures.nearest(self._array()))
        return found

    # State

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that changes."""
        return {
            "about": self._identity(),
            "generation": self._generation,
            "genomes": [list(genome) for genome in self._seen],
            "values": [list(row) for row in self._values],
            "origins": [list(about) for about in self._about],
            "population": list(self._population),
            "hypervolumes": [list(entry) for entry in self._hypervolumes],
            "reference": dict(self._reference),
            "children": [child.plain() for child in self._children],
            "done": self._done,
            "policy": self._policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, to the same result bit for bit.

        Raises:
            ValueError: If the state is of an evolution with other choices, goals or seed.
        """
        own = self._identity()
        differing = [name for name in own if state.get("about", {}).get(name) != own[name]]
        if differing:
            raise ValueError(
                f"The state is of an evolution with other {', '.join(differing)}. Resume with what it was begun with, "
                "or begin anew."
            )
        self._generation = state["generation"]
        self._seen = {tuple(genome): index for index, genome in enumerate(state["genomes"])}
        self._values = [list(row) for row in state["values"]]
        self._about = [(origin, generation) for origin, generation in state["origins"]]
        self._population = list(state["population"])
        self._hypervolumes = [(end, volume) for end, volume in state["hypervolumes"]]
        self._reference = dict(state["reference"])
        self._children = [Child.of(entry) for entry in state["children"]]
        self._done = state["done"]
        self._policy.load_state_dict(state["policy"])

    def _identity(self) -> dict[str, Any]:
        return {
            "choices": [[choice.name, list(choice.options)] for choice in self.genomes.choices],
            "cells": [list(cell) for cell in self.genomes.cells],
            "goals": [[goal.name, goal.direction, goal.limit, goal.pursued] for goal in self.goals],
            "costs": {name: list(known.range(self.genomes)) for name, known in self._figures.costs.items()},
            "settings": dataclasses.asdict(self.settings),
            "seed": self.seed,
        }

    # A generation

    def _start(self) -> list[Genome]:
        random = np.random.default_rng([self.seed, 0])
        make, count = STARTS[self.settings.start], min(self.settings.population, self.genomes.count)
        allowed = self._figures.allowed
        found = make(self.genomes, count, self._figures.pursued_costs, self._figures.windows(), allowed, random)
        if len(found) < count:
            taken = dict.fromkeys(found, 0)
            found += remaining(self.genomes, taken, allowed)[: count - len(found)]
        if not found:
            raise ValueError(
                f"No genome was found that meets all of {self._figures.known_bounds()} at once, though each can be "
                "met alone. Loosen one of them."
            )
        return found

    def _close(self) -> None:
        """Ends a generation: hypervolume, REINFORCE, survival, and the children of the next."""
        values = self._array()
        if self._generation == 0:
            self._reference = self._figures.worst(values) | self._reference
        self._hypervolumes.append((len(values), hypervolume(values, self.goals, self._reference)))
        rivals = np.array([*self._population, *range(len(values) - len(self._children), len(values))])
        if self._generation > 0 and self.settings.p_reinforced > 0:
            self._learn(values, rivals)
        self._generation += 1
        random = np.random.default_rng([self.seed, self._generation])
        selection = Selection(values[rivals], self.goals, self.settings.population, random)
        self._population = [int(index) for index in rivals[selection.survivors]]
        self._done = 0
        self._children = self._breed(values, rivals, selection, random)

    def _learn(self, values: Floats, rivals: Any) -> None:
        """Rewards every mutation of the generation by 1 / (1 + networks that dominate the child).

        A child that betters the mean of its parents in none of the goals that led the mutation earns nothing.
        """
        first, standing = len(values) - len(self._children), self._figures.standing(values)
        known = np.array(self._figures.leads)
        beaten = dominators(values[first:], values[rivals], self.goals)
        rewards = []
        for index, child in enumerate(self._children):
            for change in child.changes:
                parents, lead = change.context[: len(known)], change.context[len(known) :]
                better = (standing[first + index] < parents)[known == (lead[1] > 0)].any()
                rewards.append(float(better) / (1.0 + float(beaten[index])))
                self._policy.remember(change, rewards[-1])
        self._policy.learn(rewards)

    def _breed(self, values: Floats, rivals: Any, selection: Selection, random: np.random.Generator) -> list[Child]:
        genomes, allowed = list(self._seen), self._figures.allowed
        standing = self._figures.standing(values)

        def parents(pairs: int) -> list[Parents]:
            drawn = rivals[selection.parents(pairs, self.settings.entrants)].tolist()
            return [(genomes[a], genomes[b], tuple(((standing[a] + standing[b]) / 2).tolist())) for a, b in drawn]

        def refused(genome: Genome) -> bool:
            return genome in self._seen or not allowed(genome)

        children = self._breeder.breed(parents, refused, random)
        if len(children) < self.settings.children:
            taken = self._seen | dict.fromkeys((child.genome for child in children), 0)
            left = remaining(self.genomes, taken, allowed)
            few = random.permutation(len(left))[: self.settings.children - len(children)]
            children += [Child(left[index], "random") for index in few.tolist()]
        return children

    def _array(self) -> Floats:
        return np.array(self._values, dtype=np.float64).reshape(-1, len(self.goals))
