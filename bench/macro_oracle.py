"""How fast the evolution finds the true front of a table of trained networks, against random sampling.

    python bench/macro_oracle.py NAS_BENCH_MACRO.json

The full table of NAS-Bench-Macro (Su et al., CVPR 2021; 6,561 networks of CIFAR-10) answers in place of training.
Objectives are mean accuracy over the table's three seeds and MACs; the score is the share of the hypervolume of the
table's true front, reference point 88 % and the largest MACs, after so many distinct evaluations. The evolution is told
the reference point as the limit accuracy >= 0.88 (but for one contestant), and computes MACs itself.

Keys that denote one network count once ("networks", 3,969 of them) or apart ("keys"), for every contestant. Seeds from
1000 on were used to choose the evolution's design; the README reports 0 to 9.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pynas.choices import Choice
from pynas.evolution import Costs, Evolution, EvolutionSettings, Genome
from pynas.pareto import Goal, hypervolume
from pynas.truth import Truth, read_truth

OPTIONS = ("identity", "k3_e3", "k5_e6")
CELLS = ((0, 1), (2, 3, 4), (5, 6, 7))  # the stages
GOALS = (Goal("accuracy", "max", limit=0.88), Goal("macs", "min"))
UNTOLD = (Goal("accuracy", "max"), Goal("macs", "min"))
MARKS = (300, 655)
Canonical = Callable[[Genome], Genome] | None
NO_REINFORCED = {"p_random": 0.85, "p_reinforced": 0.0}


def one_network(genome: Genome) -> Genome:
    """Behind a stage's first layer identities may stand anywhere; here they stand last."""
    out: list[int] = []
    for cell in CELLS:
        rest = [genome[place] for place in cell[1:] if genome[place]]
        out += [genome[cell[0]], *rest, *[0] * (len(cell) - 1 - len(rest))]
    return tuple(out)


def key(genome: Genome) -> str:
    return "".join(map(str, genome))


class Oracle:
    """The table as an evaluator."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.genomes = [tuple(map(int, word)) for word in sorted(truth.accuracy)]
        self.reference = {"accuracy": 0.88, "macs": float(max(truth.macs.values()))}
        self.costs = self._costs()
        self.best = self.volume(self.genomes)

    def _costs(self) -> Costs:
        """MACs as a sum over layers, read off networks that differ in one layer; checked on the whole table."""
        macs, base = self.truth.macs, "0" * len(self.genomes[0])
        values = [
            [macs[base[:place] + str(option) + base[place + 1 :]] - macs[base] for option in range(len(OPTIONS))]
            for place in range(len(base))
        ]
        costs = Costs(np.array(values, dtype=np.float64), float(macs[base]))
        assert all(costs.cost(genome) == macs[key(genome)] for genome in self.genomes)
        return costs

    def volume(self, genomes: Sequence[Genome]) -> float:
        rows = [(self.truth.accuracy[key(genome)], self.truth.macs[key(genome)]) for genome in genomes]
        return hypervolume(rows, GOALS, self.reference)

    def shares(self, order: Sequence[Genome]) -> list[float]:
        """Share of the true hypervolume after so many evaluations."""
        return [self.volume(order[:mark]) / self.best for mark in MARKS]

    def evolve(
        self, seed: int, canonical: Canonical, settings: EvolutionSettings, goals: tuple[Goal, ...] = GOALS
    ) -> list[float]:
        choices = [Choice(f"layer{place + 1}", OPTIONS) for place in range(len(self.genomes[0]))]
        evolution = Evolution(
            choices,
            goals,
            settings,
            seed=seed,
            costs={"macs": self.costs},
            cells=CELLS,
            canonical=canonical,
            reference=self.reference,
        )
        while evolution.evaluations < max(MARKS):
            asked = evolution.ask()
            evolution.tell([{"accuracy": self.truth.accuracy[key(genome)]} for genome in asked])
        return self.shares([each.genome for each in evolution.evaluated])

    def sample(self, seed: int, canonical: Canonical) -> list[float]:
        pool = list(dict.fromkeys(map(canonical, self.genomes))) if canonical else self.genomes
        chosen = np.random.default_rng(seed).permutation(len(pool))[: max(MARKS)]
        return self.shares([pool[index] for index in chosen])


def contestants(oracle: Oracle, changes: dict[str, float | int | str]) -> dict[str, Callable[..., list[float]]]:
    whole = EvolutionSettings(**changes)  # type: ignore[arg-type]
    without = EvolutionSettings(**{**changes, **NO_REINFORCED})  # type: ignore[arg-type]
    return {
        "evolution": lambda seed, canonical: oracle.evolve(seed, canonical, whole),
        "evolution, no reinforced mutation": lambda seed, canonical: oracle.evolve(seed, canonical, without),
        "evolution, limit not told": lambda seed, canonical: oracle.evolve(seed, canonical, whole, UNTOLD),
        "random sampling": oracle.sample,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--counted", choices=("networks", "keys"), nargs="+", default=("networks", "keys"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change evolution settings")
    arguments = parser.parse_args()
    oracle = Oracle(read_truth(arguments.table))
    changes = {name: _value(value) for name, value in (pair.split("=") for pair in arguments.set)}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(
        f"| counted | contestant | {' | '.join(f'after {mark}: median (least to most)' for mark in MARKS)} | seconds |"
    )
    print("| --- | --- |" + " --- |" * (len(MARKS) + 1))
    for counted in arguments.counted:
        canonical = one_network if counted == "networks" else None
        for name, run in contestants(oracle, changes).items():
            began = time.perf_counter()
            found = np.array([run(seed, canonical) for seed in seeds])
            took = (time.perf_counter() - began) / len(found)
            cells = [f"{np.median(c):.2%} ({c.min():.2%} to {c.max():.2%})" for c in found.T]
            print(f"| {counted} | {name} | {' | '.join(cells)} | {took:.1f} |", flush=True)


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
