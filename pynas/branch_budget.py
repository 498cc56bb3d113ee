"""Budgets of a branch search: so many branches, a share of them, or what a training step may take."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

import cost_models
from cost_models.plan import Report
from cost_models.spec import OpSpec
from pynas.ops.layers import build
from pynas.registry import FAMILIES, SearchSpace
from pynas.subsets import SubsetCosts
from pynas.supernet import CostTable, cost_table

KEPT_RATIO = 0.34  # of the branches, in the released code
TEXT = re.compile(r"\s*([0-9.eE+-]+)\s*(ms|mb|%)?\s*", re.IGNORECASE)
ALLOWED = "a number of branches such as 44, a share of them such as 0.34, or a training step's '250 ms' or '400 MB'"

Kind = Literal["count", "ratio", "ms", "MB"]


@dataclass(frozen=True)
class BranchBudget:
    """What was asked for.

    Args:
        kind: "count" of branches, "ratio" of all of them, "ms" or "MB" of a training step.
        amount: In these units.
    """

    kind: Kind
    amount: float

    def __str__(self) -> str:
        texts = {"count": f"{self.amount:g} branches", "ratio": f"{self.amount:.3g} of the branches"}
        return texts.get(self.kind, f"{self.amount:g} {self.kind} a training step")


def read_budget(value: int | float | str | None) -> BranchBudget:
    """A budget as users write it: 44, 0.34, "34%", "250 ms", "400 MB"; a number above 1 must be whole.

    1 is one branch and 1.0 all of them. None is the released code's share, 0.34.

    Raises:
        ValueError: If it is none of these.

    >>> read_budget("400MB")
    BranchBudget(kind='MB', amount=400.0)
    """
    if value is None:
        return BranchBudget("ratio", KEPT_RATIO)
    text = str(value)
    found = None if isinstance(value, bool) else TEXT.fullmatch(text)
    try:
        amount = float(found[1]) if found else -1.0
    except ValueError:
        amount = -1.0
    unit = (found[2] or "").lower() if found else ""
    if not 0 < amount < float("inf"):
        raise ValueError(f"budget must be {ALLOWED}, not {value!r}.")
    if unit in ("ms", "mb"):
        return BranchBudget("ms" if unit == "ms" else "MB", amount)
    ratio = unit == "%" or amount < 1 or (amount == 1 and (isinstance(value, float) or "." in text))
    share = amount / 100 if unit == "%" else amount
    if (ratio and share > 1) or (not ratio and amount != int(amount)):
        raise ValueError(f"budget must be {ALLOWED}, not {value!r}.")
    return BranchBudget("ratio", share) if ratio else BranchBudget("count", amount)


@dataclass
class BranchCount:
    """Every branch costs 1, and everything else nothing."""

    name: str = "branches"
    unit: str = "branches"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        return 1.0

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "branches counted"


def branch_table(
    space: SearchSpace, budget: BranchBudget, *, batch_size: int, timed: cost_models.LatencyTable | None = None
) -> tuple[CostTable, float]:
    """What every branch of a space counts against a budget, and the budget in the same unit.

    A block that is left without a branch counts nothing where branches are counted, and as its fallback where a
    training step is priced.

    Args:
        space: Of subsets.
        budget: What was asked for.
        batch_size: Images of a training step.
        timed: What training steps take, from `step_table`; needed for a budget in ms.

    Raises:
        ValueError: If the budget leaves no room for a branch, naming the least that does.
    """
    if budget.kind in ("count", "ratio"):
        counted = _counted(cost_table(space, BranchCount()))
        total = int(counted.mask.sum())
        limit = float(int(budget.amount * total + 1e-9)) if budget.kind == "ratio" else budget.amount
        if budget.kind == "count" and limit > total:
            raise ValueError(f"The space has {total} branches; a budget of {limit:g} is more than all of them.")
        SubsetCosts.of(counted).check(limit)
        return counted, limit
    model: cost_models.CostModel = cost_models.TrainingMemory(batch_size)
    if budget.kind == "ms":
        if timed is None:
            raise ValueError("A budget in ms of a training step needs a table of such steps: step_table(space, ...).")
        model = timed
    table = replace(cost_table(space, model), unit=f"{budget.kind} a step")
    SubsetCosts.of(table).check(budget.amount)
    return table, budget.amount


def step_table(
    space: SearchSpace, *, batch_size: int, threads: int = 1, report: Report | None = None
) -> cost_models.LatencyTable:
    """What every op of a training step takes on this machine; timed now, once, where it is not known yet.

    Args:
        space: Of subsets.
        batch_size: Images of a step.
        threads: Of torch.
        report: Told after each timing: done, in all, seconds left.
    """
    specs = step_specs(space)
    return cost_models.training_table(specs, build=training, batch=batch_size, threads=threads, report=report)


def step_specs(space: SearchSpace) -> list[OpSpec]:
    """Every distinct op of a training step."""
    options = [FAMILIES.get(slot.family).spec(slot, name) for slot in space.slots() for name in slot.choice.options]
    families = [(slot, FAMILIES.get(slot.family)) for slot in space.slots()]
    fallbacks = [family.spec(slot, family.fallback) for slot, family in families if hasattr(family, "fallback")]
    always = [spec for slot, family in families if hasattr(family, "always") for spec in family.always(slot)]
    return sorted({*space.fixed_specs(), *options, *fallbacks, *always})


def training(spec: OpSpec) -> nn.Module:
    """The module of an op as it trains."""
    return build(spec).train()


def _counted(table: CostTable) -> CostTable:
    """A table in which only options count."""
    empty = torch.zeros(len(table.slots), dtype=torch.float64)
    values = (table.slots, table.choices, table.choice_of, table.values, table.mask)
    return CostTable(*values, 0.0, table.unit, table.sources, empty=empty)
