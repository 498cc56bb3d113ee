"""Multi-objective reinforced evolution: NSGA-II with crossover of cells and a mutation that learns what pays.

`Evolution` asks for genomes to be evaluated and is told their values; what evaluates them is not its business. Survival
and tournament are pymoo's (`pynas.pareto`), the operators are here.

To add a way to mutate: its name in `variation.Operator`, its share in `EvolutionSettings` and `Variation.operator`, and
its weights of all possible changes in `Variation.mutate`. To add a way to begin: one function in `start.py` and its
entry in `STARTS`.
"""

from pynas.evolution.genomes import Costs, Genome, Genomes, cells_of, to_genome
from pynas.evolution.loop import Evaluated, Evolution, Generation
from pynas.evolution.settings import EvolutionSettings

__all__ = [
    "Costs",
    "Evaluated",
    "Evolution",
    "EvolutionSettings",
    "Generation",
    "Genome",
    "Genomes",
    "cells_of",
    "to_genome",
]
