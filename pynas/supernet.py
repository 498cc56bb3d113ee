"""All networks of a space at once, with shared weights: gates in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cost_models.analytic import Macs
from cost_models.base import CostModel
from cost_models.spec import OpSpec
from pynas.architecture import Architecture
from pynas.choices import Choice, Gates, Slot
from pynas.registry import FAMILIES, SearchSpace, Vanishing


class GatedSlot(nn.Module):
    """Feeds a slot's mixed module the gates of the running forward pass, so that a space's `forward` needs none."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot
        self.mixed = FAMILIES.get(slot.family).mixed(slot)
        self.gates: Gates | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        if self.gates is None:
            raise RuntimeError(f"Slot {self.slot.name!r} has no gates; call the Supernet, not the network inside it.")
        out: Tensor | None = self.mixed(x, self.gates)  # None from families whose options include that there is none
        return out


@dataclass(frozen=True)
class CostTable:
    """What every option costs, asked once from one cost model: search, report and deploy check use the same sum.

    Args:
        slots: Names of the slots, in order.
        choices: Choices of the space, in order.
        choice_of: For every slot the index of its choice.
        values: Cost of each option, float64, shape (slots, options); zero where a slot has fewer options.
        mask: Which entries of `values` are options, bool, same shape.
        fixed: Cost of everything outside the slots.
        unit: Of all costs.
        sources: How many specs have which source ("measured", "fitted", "modelled", "analytic").
        whole: Cost of the network that takes the given choices, where some options let more vanish than themselves, so
            that sums are upper bounds; None where sums are exact.
        empty: Cost of each slot where no option is chosen, float64, shape (slots,); none where that cannot be.
    """

    slots: tuple[str, ...]
    choices: tuple[Choice, ...]
    choice_of: tuple[int, ...]
    values: Tensor
    mask: Tensor
    fixed: float
    unit: str
    sources: Mapping[str, int]
    whole: Callable[[Mapping[str, tuple[str, ...]]], float] | None = None
    empty: Tensor | None = None

    def by_choice(self) -> Tensor:
        """Cost of an option summed over the slots of its choice, float64, shape (choices, options)."""
        total = torch.zeros(len(self.choices), self.values.shape[1], dtype=torch.float64)
        return total.index_add_(0, torch.tensor(self.choice_of), self.values)

    def choice_mask(self) -> Tensor:
        """Which options each choice has, bool, shape (choices, options)."""
        first = [self.choice_of.index(index) for index in range(len(self.choices))]
        return self.mask[first]

    def cost(self, architecture: Architecture) -> float:
        """Predicted cost of a whole network: the fixed part plus the rows of what it chose, less what vanishes."""
        if self.whole is not None:
            return self.whole(architecture.choices)
        total = self.fixed
        for slot, index in enumerate(self.choice_of):
            choice = self.choices[index]
            chosen = architecture.choices[choice.name]
            for name in chosen:
                total += float(self.values[slot, choice.options.index(name)])
            if not chosen and self.empty is not None:
                total += float(self.empty[slot])
        return total


def cost_table(space: SearchSpace, model: CostModel) -> CostTable:
    """Asks a cost model for every option of every slot and for the fixed part of a space.

    Raises:
        ValueError: From the model, when it cannot tell the cost of a spec.
    """
    slots, choices = space.slots(), space.choices()
    width = max(len(choice.options) for choice in choices)
    values = torch.zeros(len(slots), width, dtype=torch.float64)
    mask = torch.zeros(len(slots), width, dtype=torch.bool)
    empty = torch.zeros(len(slots), dtype=torch.float64)
    sources: dict[str, int] = {}
    specs = list(space.fixed_specs())
    for slot in slots:
        always = getattr(FAMILIES.get(slot.family), "always", None)
        specs += [] if always is None else always(slot)
    fixed = model.net_cost + sum(model.cost(spec) for spec in specs)
    for row, slot in enumerate(slots):
        for column, name in enumerate(slot.choice.options):
            spec = FAMILIES.get(slot.family).spec(slot, name)
            values[row, column] = model.cost(spec)
            mask[row, column] = True
            specs.append(spec)
        fallback = getattr(FAMILIES.get(slot.family), "fallback", None)
        if slot.choice.pick == "any" and fallback is not None:
            empty[row] = model.cost(FAMILIES.get(slot.family).spec(slot, fallback))
    if isinstance(space, Vanishing):
        specs += space.sliced_specs()
        for spec in space.sliced_specs():
            model.cost(spec)  # found networks may have it: whether it has a price must show before a search
    for spec in set(specs):
        source = model.source(spec)
        sources[source] = sources.get(source, 0) + 1
    order = {choice.name: index for index, choice in enumerate(choices)}
    choice_of = tuple(order[slot.choice.name] for slot in slots)
    names = tuple(slot.name for slot in slots)
    return CostTable(names, choices, choice_of, values, mask, fixed, model.unit, sources, _whole(space, model), empty)


def _whole(space: SearchSpace, model: CostModel) -> Callable[[Mapping[str, tuple[str, ...]]], float] | None:
    if not isinstance(space, Vanishing):
        return None
    specs = space.net_specs
    return lambda choices: model.net_cost + sum(model.cost(spec) for spec in specs(choices))


def deployed_specs(slot: Slot, names: tuple[str, ...]) -> tuple[OpSpec, ...]:
    """Ops that chosen options of a slot are when they are deployed."""
    family = FAMILIES.get(slot.family)
    folded = getattr(family, "deployed", None)
    if folded is not None:
        found: tuple[OpSpec, ...] = folded(slot, names)
        return found
    return tuple(family.spec(slot, name) for name in names)


def mean_macs(space: SearchSpace, paths: int | None = None) -> float:
    """Multiply-adds of a forward pass per image, averaged over uniform paths.

    Args:
        space: Of the supernet.
        paths: Options computed in every slot; all of them by default.
    """
    table = cost_table(space, Macs())
    widths = table.mask.sum(1)
    computed = widths if paths is None else torch.full_like(widths, paths)
    return float((table.values.sum(1) / widths * computed).sum()) + table.fixed


class Supernet(nn.Module):
    """A space with all options at every slot.

    Args:
        space: Whose `build` lays the network out; the same code builds the found net.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.slots = space.slots()
        self.choices = space.choices()
        self.net = space.build(GatedSlot)
        self._gated = {path: module for path, module in self.net.named_modules() if isinstance(module, GatedSlot)}

    def gated(self) -> dict[str, GatedSlot]:
        """The gated modules by the path that they have in the network."""
        return self._gated

    def forward(self, x: Tensor, gates: Mapping[str, Gates]) -> Tensor:
        """(B, 3, S, S) and the gates of every slot, by slot name -> logits (B, classes)."""
        for module in self._gated.values():
            module.gates = gates[module.slot.name]
        try:
            logits: Tensor = self.net(x)
        finally:
            for module in self._gated.values():
                module.gates = None
        return logits

    @property
    def device(self) -> torch.device:
        """Where its weights are, and gates must be."""
        return next(self.parameters()).device

    def one_hot(self, architecture: Architecture) -> dict[str, Gates]:
        """Gates that run exactly the chosen options, where the weights are."""
        gates, device = {}, self.device
        for slot in self.slots:
            options = slot.choice.options
            run = tuple(options.index(name) for name in architecture.choices[slot.choice.name])
            if len(run) == 1:
                gates[slot.name] = Gates.one_hot(len(options), run[0], device)
                continue
            values = torch.tensor([float(index in run) for index in range(len(options))], device=device)
            gates[slot.name] = Gates(values, run, run)
        return gates

    def inherit(self, architecture: Architecture) -> nn.Module:
        """The found net with copies of this supernet's weights, on the CPU wherever these are.

        It equals the supernet under the same one-hot gates.
        """
        net = architecture.build()
        state: dict[str, Tensor] = {}
        gated = self.gated()
        inside = tuple(f"{path}." for path in gated)
        for name, tensor in self.net.state_dict().items():
            if not name.startswith(inside):
                state[name] = tensor
        for path, module in gated.items():
            names = architecture.choices[module.slot.choice.name]
            chosen: dict[str, Tensor] = module.mixed.single_state(names)  # type: ignore[operator]
            state |= {f"{path}.{name}": tensor for name, tensor in chosen.items()}
        if isinstance(self.space, Vanishing):
            state = net.inherited(state)  # type: ignore[operator]
        net.load_state_dict(state)
        return net.train(self.training)
