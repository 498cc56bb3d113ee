"""Search strategies: one file a paper, each reading like it.

To add a strategy: one file here with a dataclass that derives from `base.Strategy` (its fields are the hyper-parameters
and become flags; defaults are the paper's, `PRESETS` names others), registered in `STRATEGIES`, and its import line
below. One that trains a supernet on paths finds its descent, its counts and its length in `shared_weights`, and its
networks in `derive`; one that trains weights beside a distribution finds its parts in `relaxed` and its child in
`children`. Tensors that meet the supernet's live where it does, `problem.train_on`; counts, costs and what is kept of
epochs on the CPU. `PICKS` says whether it chooses one option or any subset of them, `TRAINS` whether its search leaves
a network that is trained to the end. Data, checkpoints, logs, budgets and the command line are not its business. The
contract tests in `tests/test_strategies.py` and `tests/test_gpu.py` pick it up.
"""

from pynas.registry import STRATEGIES
from pynas.strategies import darts, ef, enas, fairnas, fbnet, one_shot, random, repnas, snas, spos, uniform
from pynas.strategies.base import Candidate, Problem, Strategy

__all__ = [
    "STRATEGIES",
    "Candidate",
    "Problem",
    "Strategy",
    "darts",
    "ef",
    "enas",
    "fairnas",
    "fbnet",
    "one_shot",
    "random",
    "repnas",
    "snas",
    "spos",
    "uniform",
]
