"""What a search needs, checked before anything is written: space, strategy, images, device, budget, goals."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cost_models
from pynas import kernels
from pynas.architecture import Architecture
from pynas.branch_plan import Branches, check_latency, folded_ms, open_branches
from pynas.budget import check_budget, cost_range
from pynas.console import Show
from pynas.evolution import EvolutionSettings
from pynas.fuse import fuse
from pynas.kernels import cuda, cuda_verdicts, setting
from pynas.ops import build
from pynas.pareto import Goal, goals
from pynas.registry import FAMILIES, SPACES, STRATEGIES, SearchSpace, Vanishing
from pynas.strategies import Problem, Strategy
from pynas.subsets import picks_any
from pynas.supernet import CostTable, cost_table, deployed_specs
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed, Pool
from pynas.training.loop import Interrupted
from pynas.training.run import RunFolder
from pynas.training.train import Recipe

CLASS_COUNTS = (2, 5, 10, 30, 100, 300, 1000)
ELSEWHERE = ("cortex-a72",)  # devices that every result is priced on as well


@dataclass(frozen=True)
class Plan:
    """Everything that a search needs, checked before anything is written.

    Args:
        config: What was asked, as plain values.
        space: Where to search.
        strategy: How.
        data: On which images.
        device: Latency table.
        table: Its costs of the space's options; where subsets are chosen, what branches count.
        budget: In the table's unit, milliseconds but for branches; or None.
        recipe: How found networks are trained.
        elsewhere: Other devices that the result is priced on.
        goals: What to pursue and to limit, the budget among them; none where one network within the budget is wanted.
        branches: Where subsets are chosen, their budget.
    """

    config: Mapping[str, Any]
    space: SearchSpace
    strategy: Strategy
    data: Data
    device: cost_models.LatencyTable
    table: CostTable
    budget: float | None
    recipe: Recipe
    elsewhere: tuple[cost_models.LatencyTable, ...] = ()
    goals: tuple[Goal, ...] = ()
    branches: Branches | None = None

    @property
    def latency_ms(self) -> float | None:
        """Limit on the latency of what is deployed."""
        return self.budget if self.branches is None else self.branches.latency_ms

    def predicted_ms(self, architecture: Architecture) -> float:
        """Latency of a network as it is deployed."""
        if self.branches is None:
            return self.table.cost(architecture)
        return folded_ms(self.space, architecture, self.device)

    def feed(self, batch_size: int) -> Feed:
        """Batches of the search."""
        pool: Pool = "train" if self.strategy.TRAINS else "split"
        return Feed(
            self.data, batch_size=batch_size, seed=self.config["seed"], pool=pool, device=self.config["train_on"]
        )

    def problem(self) -> Problem:
        """What the strategy is asked to solve."""
        config, evolution = self.config, self.config["evolution"]
        return Problem(
            self.space,
            self.table,
            self.budget,
            config["slack"],
            config["seed"],
            config["amp"],
            self.goals,
            None if evolution is None else EvolutionSettings(**evolution),
            config["train_on"],
        )


def make_plan(config: Mapping[str, Any], show: Show, folder: RunFolder | None = None) -> Plan:
    """Resolves names, opens data and table, and checks budget and limits. Writes nothing, but may measure the host.

    Args:
        config: Parameters of `pynas.search` by name.
        show: Where progress is shown.
        folder: The run to resume: its copies of the tables are used, so that a resumed search does not change.

    Raises:
        ValueError: For whatever cannot work, in one sentence.
        OSError: For files that cannot be read or written.
    """
    strategy = make_strategy(config["strategy"])
    if config["objectives"]:
        strategy.check_pursues()
    try:
        recipe = Recipe(**config["recipe"])
    except TypeError as error:
        raise ValueError(f"The recipe does not fit: {error}.") from None
    unsized = make_space(config["space"], config["space_options"])
    strategy.check_space(unsized)
    if folder is None:
        check_writable(Path(config["out"]))
    data = open_data(
        config["data"],
        size=unsized.input_size,
        seed=config["seed"],
        limit=config["limit"],
        on_corrupt=config["on_corrupt"],
        augment=config["augment"],
    )
    space = make_space(config["space"], {**config["space_options"], "classes": len(data.classes)})
    strategy.suit(space)
    branches: Branches | None = None
    budget: float | None
    if picks_any(space.choices()):  # before the device, which may take long to measure
        branches = open_branches(space, config, strategy.batch_size, show, folder)
    device = open_device(config["device"], space, config["strict_table"], show, folder)
    if branches is not None:
        check_latency(branches, space, device)
        table = branches.table
        budget = branches.limit
    else:
        table = cost_table(space, device)
        budget = _budget(config, table)
    elsewhere = open_elsewhere(space, device.name, show, folder)
    wanted = goals_of(config, budget)
    plan = Plan(config, space, strategy, data, device, table, budget, recipe, elsewhere, wanted, branches)
    strategy.check(plan.problem())
    return plan


def _budget(config: Mapping[str, Any], table: CostTable) -> float | None:
    """The budget in ms, after a check; "auto" is the middle of what networks cost."""
    asked = config["latency_ms"]
    if asked is None or (asked == "auto" and config["objectives"]):
        return None  # a Pareto set spans the whole space unless a limit is asked for
    bounds = cost_range(table)
    budget = float(f"{(bounds.low + bounds.high) / 2:.3g}" if asked == "auto" else asked)
    check_budget(table, budget)
    return budget


def goals_of(config: Mapping[str, Any], budget: float | None) -> tuple[Goal, ...]:
    """The goals of a run, the budget as a limit on latency among them; none without objectives."""
    if not config["objectives"]:
        return ()
    limits = dict(config["limits"]) | ({} if budget is None else {"latency_ms": budget})
    return goals(config["objectives"], limits, config["directions"])


def make_space(name: str, options: Mapping[str, Any]) -> SearchSpace:
    """A space by name. Raises ValueError for an unknown name or option."""
    make = SPACES.get(name)
    known = sorted(make().options())
    strange = sorted(set(options) - set(known))
    if strange:
        raise ValueError(f"Space {name!r} has no option {', '.join(map(repr, strange))}. Allowed: {', '.join(known)}.")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"The options {dict(options)} do not fit space {name!r}: {error}.") from None


def make_strategy(settings: Mapping[str, Any]) -> Strategy:
    """A strategy from its name and hyper-parameters. Raises ValueError when they do not fit."""
    try:
        strategy: Strategy = STRATEGIES.get(settings["name"])(**settings["settings"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"The strategy's settings do not fit: {error}.") from None
    return strategy


def check_writable(out: Path) -> None:
    """Raises OSError unless runs can be written to this folder, without leaving anything behind."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".pynas-", dir=existing):
            pass
    except OSError as error:
        raise OSError(f"Cannot write runs to {out}: {error.strerror}. Choose another folder with --out.") from None


def space_specs(space: SearchSpace) -> list[cost_models.OpSpec]:
    """Every distinct op that a network of a space can have when it is deployed: fixed ones and those that are sliced
    where something vanishes included."""
    sliced = space.sliced_specs() if isinstance(space, Vanishing) else ()
    options = [spec for slot in space.slots() for name in slot.choice.options for spec in deployed_specs(slot, (name,))]
    return sorted({*space.fixed_specs(), *sliced, *options})


def kernels_used(space: SearchSpace, amp: str = "off", images: int = 16, train_on: str = "cpu") -> str:
    """In how many layers of a space's supernet training on so many images runs in fused kernels, as it is set."""
    slots, facts = space.slots(), kernels.facts()
    if amp != "off":
        return f"plain PyTorch in all {len(slots)} layers (mixed precision)"
    if train_on != "cpu":
        return _kernels_on_gpu(len(slots))
    if facts["isa"] == "none":
        return f"plain PyTorch in all {len(slots)} layers (the C++ kernels are missing; see: pynas info)"
    fused = sum(getattr(FAMILIES.get(slot.family), "fused", lambda *_: False)(slot, images) for slot in slots)
    asked = "" if setting.current() == "auto" else f" (kernels={setting.current()!r})"
    if not fused:
        return f"plain PyTorch in all {len(slots)} layers{asked}"
    return f"fused C++ ({facts['isa']}) in {fused} of {len(slots)} layers{asked}"


def _kernels_on_gpu(layers: int) -> str:
    asked = setting.current()
    if asked == "reference" or not cuda.built() or not torch.cuda.is_available():
        return f"plain PyTorch in all {layers} layers (on the GPU)"
    if asked == "fused":
        return "CUDA in layers of inverted bottlenecks (kernels='fused')"
    if not cuda_verdicts.read(torch.device("cuda", torch.cuda.current_device())):
        return f"plain PyTorch in all {layers} layers (on the GPU; to change that: pynas kernels tune)"
    return "CUDA in layers that pynas kernels tune has found faster"


def classifier_specs(space: SearchSpace) -> list[cost_models.OpSpec]:
    """The classifier for other numbers of classes, so that a table which has them can price any data set."""
    linear = [spec for spec in space.fixed_specs() if spec.kind == "linear"]
    return [dataclasses.replace(spec, out_channels=classes) for spec in linear for classes in CLASS_COUNTS]


def deployed(spec: cost_models.OpSpec) -> nn.Module:
    """The module of an op as it is deployed: eval mode, batch norm folded."""
    return fuse(build(spec))


def open_device(
    name: str, space: SearchSpace, strict: bool, show: Show, folder: RunFolder | None = None
) -> cost_models.LatencyTable:
    """The table of a device. The host is measured where rows are missing; no other device ever is.

    Raises:
        ValueError: If the device is unknown or its table does not cover the space; names the measuring command.
    """
    if folder is not None and (folder.path / "device").is_dir():
        return cost_models.load_folder(folder.path / "device", strict=strict)
    if name != "host":
        return cost_models.load(name, strict=strict)
    specs = space_specs(space)
    with show.bar("measuring this host", len(specs)) as bar:
        try:
            return cost_models.host_table(specs, build=deployed, report=bar.report)
        except KeyboardInterrupt:
            told = "Stopped while this host was measured; what was timed is kept. Go on with: the same command"
            raise Interrupted(told) from None


def open_elsewhere(
    space: SearchSpace, here: str, show: Show, folder: RunFolder | None = None
) -> tuple[cost_models.LatencyTable, ...]:
    """Tables of `ELSEWHERE` but for `here`, where there are any that can price every op of the space.

    For a run to resume those that it began with, from its folder.
    """
    kept = folder is not None and (folder.path / "device").is_dir() and (folder.path / "elsewhere").is_dir()
    found = []
    for name in ELSEWHERE:
        try:
            if folder is not None and kept:
                copy = folder.path / "elsewhere" / name
                table = cost_models.load_folder(copy) if copy.is_dir() else None
            else:
                table = cost_models.find(name) if name != here else None
        except (ValueError, OSError) as error:  # a further price is no reason to stop
            show.line(f"{name} is left out of the result: {error}")
            continue
        if table is not None and table.covers(space_specs(space)):
            found.append(table)
    return tuple(found)
