"""Networks to machine code for a CPU by TVM: read the graph, write every kernel, link, and check against torch.

To add
- a target: one entry in `targets.TARGETS`.
- a kind of layer: a record in `layers.py`, its kernel in `kernels/`, and the operators that become it in
  `nodes.py` and `graph.py`. The contract test takes it from there.

Whoever changes what code comes out changes `SCHEDULE`: tables of different versions never mix.
"""

from __future__ import annotations

from .build import Built, Call, build, compile_graph
from .check import can_check, check, why_not
from .graph import Graph, Step, read_graph
from .targets import TARGETS, Target, target

__all__ = [
    "SCHEDULE",
    "TARGETS",
    "Built",
    "Call",
    "Graph",
    "Step",
    "Target",
    "build",
    "can_check",
    "check",
    "compile_graph",
    "read_graph",
    "target",
    "why_not",
]

SCHEDULE = "tvm-1"
