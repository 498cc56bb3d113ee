"""What a run of subsets needs beside others: its branch budget, with what training steps take, and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cost_models
from cost_models.analytic import Params
from pynas.architecture import Architecture
from pynas.branch_budget import BranchBudget, branch_table, read_budget, step_specs, step_table
from pynas.console import Show
from pynas.registry import SearchSpace
from pynas.subsets import log10_networks
from pynas.supernet import CostTable, cost_table
from pynas.timed_nets import net_specs
from pynas.training.loop import Interrupted
from pynas.training.run import RunFolder

STEPS = "training-steps"  # folder in a run with the copied table


@dataclass(frozen=True)
class Branches:
    """The branch budget of a run.

    Args:
        asked: As the user wrote it.
        table: What every branch counts.
        limit: The budget in the table's unit.
        steps: What training steps take, where the budget is in ms.
        latency_ms: Limit on the folded network, or None.
    """

    asked: BranchBudget
    table: CostTable
    limit: float
    steps: cost_models.LatencyTable | None = None
    latency_ms: float | None = None

    @property
    def total(self) -> int:
        """Branches of the space."""
        return int(self.table.mask.sum())

    def describe(self) -> str:
        """The budget in words."""
        if self.table.unit == "branches":
            return f"{self.limit:g} of {self.total} branches"
        return f"{self.limit:g} {self.table.unit}, of {self.table_high:.4g} for all {self.total} branches"

    @property
    def table_high(self) -> float:
        """What all branches take."""
        return self.table.fixed + float(self.table.values[self.table.mask].sum())


def open_branches(
    space: SearchSpace, config: Mapping[str, Any], batch_size: int, show: Show, folder: RunFolder | None
) -> Branches:
    """The branch budget of a run; training steps are timed where it is in ms and they were not yet.

    Args:
        space: Of subsets.
        config: Parameters of `pynas.search`.
        batch_size: Images of a training step.
        show: Where progress is shown.
        folder: The run to resume, whose copy of the table is used.

    Raises:
        ValueError: If the budget cannot be.
    """
    asked = read_budget(config["budget"])
    steps = None
    if asked.kind == "ms":
        kept = None if folder is None else folder.path / STEPS
        steps = (
            cost_models.load_folder(kept)
            if kept is not None and kept.is_dir()
            else _timed(space, batch_size, config["threads"], show)
        )
    table, limit = branch_table(space, asked, batch_size=batch_size, timed=steps)
    latency = config["latency_ms"]
    return Branches(asked, table, limit, steps, None if latency == "auto" else latency)


def _timed(space: SearchSpace, batch_size: int, threads: int, show: Show) -> cost_models.LatencyTable:
    with show.bar("timing training steps", len(step_specs(space))) as bar:
        try:
            return step_table(space, batch_size=batch_size, threads=threads, report=bar.report)
        except KeyboardInterrupt:
            told = "Stopped while training steps were timed; what was timed is kept. Go on with: the same command"
            raise Interrupted(told) from None


def folded_ms(space: SearchSpace, architecture: Architecture, device: cost_models.LatencyTable) -> float:
    """Predicted latency of a network as it is deployed."""
    return device.net_cost + sum(device.cost(spec) for spec in net_specs(space, architecture))


def check_latency(branches: Branches, space: SearchSpace, device: cost_models.LatencyTable) -> None:
    """Raises ValueError where the folded network, which costs the same whatever is chosen, misses the limit."""
    nothing = Architecture(space.name, {choice.name: () for choice in space.choices()}, space.options())
    cost = folded_ms(space, nothing, device)
    if branches.latency_ms is not None and cost > branches.latency_ms:
        raise ValueError(
            f"The folded network is predicted to take {cost:.4g} ms whatever is chosen, more than the "
            f"{branches.latency_ms:g} ms of latency_ms. Take a smaller host, a smaller width or image, or no limit."
        )


def space_text(space: SearchSpace, branches: Branches, cost_ms: float) -> str:
    """A line on what is searched."""
    size = log10_networks(space.choices())
    many = f"{10**size:.3g}" if size < 300 else f"10^{size:.0f}"
    host = space.options().get("host", "a host")
    return (
        f"space: {space.name} on {host}, {branches.total} branches in {len(space.choices())} blocks, {many} networks, "
        f"all folded to the same: predicted {cost_ms:.3g} ms"
    )


def branch_figures(space: SearchSpace, branches: Branches, architecture: Architecture) -> dict[str, Any]:
    """What a result says of the branches of a network."""
    kinds = Counter(name for names in architecture.choices.values() for name in names)
    return {
        "budget": branches.describe(),
        "used": branches.table.cost(architecture),
        "unit": branches.table.unit,
        "kept": sum(kinds.values()),
        "of": branches.total,
        "by_kind": dict(kinds.most_common()),
        "empty_blocks": sum(not names for names in architecture.choices.values()),
        "host": space.options().get("host", ""),
        "training_params": round(cost_table(space, Params()).cost(architecture)),
    }


def branch_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the closing table on branches; none for other runs."""
    found = figures.get("branches")
    if not found:
        return []
    kinds = ", ".join(f"{name} {count}" for name, count in found["by_kind"].items())
    empty = f"; {found['empty_blocks']} blocks without one run their KxK" if found["empty_blocks"] else ""
    return [
        ("branches", f"{found['kept']} of {found['of']}: {kinds}{empty}"),
        ("branch budget", f"{found['budget']}; used {found['used']:.4g} {found['unit']}"),
        ("training form", f"{found['training_params']:,} params, folded exactly into one convolution a block"),
    ]
