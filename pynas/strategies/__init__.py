"""Search strategies: one file a paper, each reading like it.

To add a strategy: one file here with a dataclass that derives from `base.Strategy` (its fields are the hyper-parameters
and become flags; defaults are the paper's, `PRESETS` names others), registered in `STRATEGIES`, and its import line
below. Data, checkpoints, logs, budgets and the command line are not its business. The contract tests in
`tests/test_strategies.py` pick it up.
"""

from pynas.registry import STRATEGIES
from pynas.strategies import fbnet, random
from pynas.strategies.base import Candidate, Problem, Strategy

__all__ = ["STRATEGIES", "Candidate", "Problem", "Strategy", "fbnet", "random"]
