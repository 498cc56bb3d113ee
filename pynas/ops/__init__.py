"""Candidate operations, grouped in families that own the options of a slot.

To add an option: one entry in its family's file, for instance `OPTIONS.add("k7_e6", Expand(7, 6))` in `mbconv.py`. Its
spec says everything: module, parameters, MACs and latency are all found from it, and the contract tests pick it up.

To add a family: one file here with a class that has `mixed`, `single` and `spec` (`pynas.registry.Family`), registered
in `FAMILIES`, and its import line below. An op of a new kind also needs its entry in `cost_models/spec.py` (what it is
made of, so that it can be counted) and its module, registered in `MODULES`.

The family "rep" is of parallel linear branches, any subset of which can be chosen; to add a branch, see `branches.py`.
A family may have three members more: `fallback`, the option that is computed where none is chosen; `always(slot)`,
specs of what is there whatever is chosen; `deployed(slot, names)`, the specs of what remains of them after folding.
"""

from pynas.ops import branches, cell, mbconv, rep
from pynas.ops.layers import MODULES, ConvBN, GlobalPool, build
from pynas.ops.mixed import Mixed
from pynas.registry import FAMILIES

__all__ = ["FAMILIES", "MODULES", "ConvBN", "GlobalPool", "Mixed", "branches", "build", "cell", "mbconv", "rep"]
