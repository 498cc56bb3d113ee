"""The block of RepNAS (arXiv 2109.03508): parallel linear branches in training, one convolution afterwards."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.spec import OpSpec
from pynas.choices import Gates, Slot
from pynas.fuse import relative_difference
from pynas.ops.branches import BRANCHES, FALLBACK, Branch, BranchShape
from pynas.ops.fast_merge import fast_sum, merges
from pynas.ops.moments import merged_sum
from pynas.registry import FAMILIES

EXACT = 1e-10  # of the largest output: what a fold may differ by in float64


@dataclass(frozen=True)
class RepSlot(Slot):
    """A place for a block of branches.

    Args:
        kernel: K: 3, 5 or 7; odd.
        groups: Of the convolution; as many as channels for a depthwise one.
        always: Branches that run beside those that are chosen.
        sharing: Whether all branches of a supernet slice one kernel. A found block has weights of its own.
        middle: Channels in the middle of 1x1-KxK, as a multiple of `in_channels`.
        strided_pointwise: Whether 1x1-KxK keeps its 1x1 convolution where the stride is not 1.
        merged: Whether training runs the branches as one convolution (`pynas.ops.moments`).
    """

    kernel: int = 3
    groups: int = 1
    always: tuple[str, ...] = ()
    sharing: bool = False
    middle: int = 1
    strided_pointwise: bool = True
    merged: bool = False

    @property
    def shape(self) -> BranchShape:
        """What branches need to know."""
        return BranchShape(
            self.in_channels,
            self.out_channels,
            self.size,
            self.kernel,
            self.stride,
            self.groups,
            self.middle,
            self.strided_pointwise,
        )


def searched(shape: BranchShape, names: Sequence[str] = (), without: Sequence[str] = ()) -> tuple[str, ...]:
    """Those of some branches (all by default) that can stand at a place, in their order."""
    wanted = names or BRANCHES.names()
    return tuple(name for name in wanted if name not in without and BRANCHES.get(name).fits(shape))


@dataclass(frozen=True)
class Origin:
    """What a block stands for in a user's network, so that folding gives that back.

    Args:
        name: Of the convolution, from the network that was converted.
        norm: Of the batch norm that the block took in; empty if there was none.
        bias: Whether the convolution had a bias.
        eps: Of the batch norm.
        momentum: Of the batch norm.
    """

    name: str
    norm: str = ""
    bias: bool = False
    eps: float = 1e-5
    momentum: float | None = 0.1


class RepBlock(nn.Module):
    """Sum of branches: (B, in, S, S) -> (B, out, ceil(S / stride), ceil(S / stride)); no activation.

    Called with gates it is a choice layer whose options are `names`; called without, all its branches run. A choice
    layer that is left with no option runs its KxK branch with a gate of one. `pynas.fuse` puts one convolution in the
    place of a block, exactly.

    Args:
        slot: Where it stands.
        names: Branches, in the order of the gates. Those of `slot.always` come on top; without any, the block has the
            KxK branch.
        choice: Whether it is a choice layer: it has a KxK branch in any case, and its weights are slices of one kernel,
            `kernel`, (out, in / groups, K, K), if the slot says so.
    """

    def __init__(self, slot: RepSlot, names: Sequence[str], choice: bool = False) -> None:
        super().__init__()
        self.slot, self.names = slot, tuple(names)
        self.always = tuple(name for name in slot.always if BRANCHES.get(name).fits(slot.shape))
        self.merged = slot.merged
        self.origin: Origin | None = None
        self.gates: Gates | None = None
        sharing = choice and slot.sharing
        fallback = (FALLBACK,) if choice or not names else ()
        self.branches = nn.ModuleDict()
        for name in dict.fromkeys((*self.names, *self.always, *fallback)):
            self.branches[name] = BRANCHES.get(name).build(slot.shape, sharing)
        self.kernel: nn.Parameter | None
        kernel = None
        if sharing:
            kernel = nn.Parameter(torch.empty(slot.out_channels, slot.in_channels // slot.groups, *[slot.kernel] * 2))
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))  # as torch's convolutions begin
        self.register_parameter("kernel", kernel)

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        gates = self.gates if gates is None else gates
        running = self._running(gates)
        if gates is None or (gates.values.dim() == 1 and set(gates.run) == set(gates.train)):
            pairs = [(branch, gate) for branch, gate, _ in running]
            if self.merged:
                return merged_sum(x, pairs, self.kernel)
            if merges(x, pairs):
                return fast_sum(x, pairs, self.kernel)
        total: Tensor | None = None
        for branch, gate, train in running:
            with torch.set_grad_enabled(torch.is_grad_enabled() and train):
                y: Tensor = branch(x, self.kernel)
            if gate is not None:
                y = y * (gate[:, None, None, None] if gate.dim() == 1 else gate)
            total = y if total is None else total + y
        assert total is not None
        return total

    def _running(self, gates: Gates | None) -> list[tuple[Branch, Tensor | None, bool]]:
        """Branches to compute, each with its gate and whether it is differentiated."""
        found: dict[str, tuple[Tensor | None, bool]] = dict.fromkeys(self.branches, (None, True))
        if gates is not None:
            found = dict.fromkeys(self.always, (None, True))
            found |= {
                self.names[index]: (None if gates.single else gates.values[..., index], index in gates.train)
                for index in gates.run
            }
            if not gates.run:
                found[FALLBACK] = (None, True)
        return [(cast(Branch, self.branches[name]), gate, train) for name, (gate, train) in found.items()]

    def single_state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """State of the block of those branches alone, with weights of their own, by its names there."""
        inside = dict.fromkeys((*names, *self.always, *(() if names else (FALLBACK,))))
        state: dict[str, Tensor] = {}
        for name in inside:
            branch = cast(Branch, self.branches[name])
            state |= {f"branches.{name}.{key}": value for key, value in branch.state_dict().items()}
            weights = branch.weights(self.kernel)
            state |= {f"branches.{name}.{key}": weight.detach() for key, weight in weights.items()}
        return state

    def separate(self) -> None:
        """Makes the weights of branches that slice one kernel their own: copies of their slices."""
        if self.kernel is None:
            return
        for branch in self.branches.values():
            cast(Branch, branch).separate(self.kernel)
        self.kernel = None

    def keep(self, names: Sequence[str]) -> None:
        """Takes all other branches out, for good; without names the KxK branch stays."""
        self.separate()
        stay = (*names, *self.always) if names else (*self.always, FALLBACK)
        for name in list(self.branches):
            if name not in stay:
                del self.branches[name]
        self.names, self.gates = tuple(names), None

    def adopt(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> None:
        """Gives the KxK branch the weights of a convolution and of the batch norm behind it.

        Without a batch norm, that of the branch becomes one that changes nothing in eval mode but to add the bias.
        """
        branch = cast(Branch, self.branches[FALLBACK])
        own: Any = branch.bn
        with torch.no_grad():
            (self.kernel if self.kernel is not None else branch.weights()["weight"]).copy_(conv.weight)
            if bn is None:
                own.weight.fill_(math.sqrt(1 + own.eps))
                own.bias.copy_(torch.zeros_like(own.bias) if conv.bias is None else conv.bias)
                return
            own.eps, own.momentum = bn.eps, bn.momentum
            own.load_state_dict(bn.state_dict())
            if conv.bias is not None:
                own.running_mean.sub_(conv.bias)

    def silence(self) -> None:
        """Lets all branches but KxK begin with an output of zero: their last batch norms scale and shift by zero."""
        for name, branch in self.branches.items():
            if name != FALLBACK:
                nn.init.zeros_(cast(Branch, branch).bn.weight)
                nn.init.zeros_(cast(Branch, branch).bn.bias)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which cannot hold the graph that gates belong to."""
        state = self.__dict__.copy()
        if self.gates is not None:
            state["gates"] = dataclasses.replace(self.gates, values=self.gates.values.detach())
        return state

    # Folding

    def convolution(self) -> tuple[Tensor, Tensor]:
        """Kernel (out, in / groups, K, K) and bias (out,) of the convolution that the block is in eval mode, float64.

        Raises:
            ValueError: The block is searched still, or the convolution does not do the same (a batch norm with broken
                statistics, for instance).
        """
        if self.gates is not None:
            raise ValueError("A block that is searched still cannot be folded. End the search first: search.fix()")
        with torch.no_grad():
            parts = [cast(Branch, branch).folded(self.kernel) for branch in self.branches.values()]
            weight = torch.stack([part for part, _ in parts]).sum(0)
            bias = torch.stack([shift for _, shift in parts]).sum(0)
        self._check(weight, bias)
        return weight, bias

    def _check(self, weight: Tensor, bias: Tensor) -> None:
        slot, pixels = self.slot, self.slot.kernel + 2
        shape = (2, slot.in_channels, pixels, pixels + 1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight.device)
        exact = copy.deepcopy(self).double().eval()
        exact.merged = False
        with torch.no_grad():
            expected = exact(x)
            actual = functional.conv2d(x, weight, bias, slot.stride, slot.kernel // 2, 1, slot.groups)
        difference = relative_difference(expected, actual)
        if difference > EXACT:
            raise ValueError(f"The convolution of block {slot.name!r} differs from its branches by {difference:.1e}.")

    def folded_modules(self, name: str, restore: bool = True) -> dict[str, nn.Module]:
        """What takes the block's place: modules by their full names, given the block's own.

        One convolution with bias; in a converted network, to `restore` it, the layers that were there, with a batch
        norm that only adds the bias where there was one.
        """
        weight, bias = self.convolution()
        kind = next(self.parameters()).dtype
        slot, origin = self.slot, self.origin if restore else None
        norm = origin.norm if origin is not None else ""
        in_conv = origin is None or origin.bias
        conv = nn.Conv2d(
            slot.in_channels,
            slot.out_channels,
            slot.kernel,
            slot.stride,
            slot.kernel // 2,
            groups=slot.groups,
            bias=in_conv,
        )
        conv.weight = nn.Parameter(weight.to(kind))
        found: dict[str, nn.Module] = {name: conv.eval()}
        if in_conv:
            conv.bias = nn.Parameter(bias.to(kind))
        if origin is not None and norm:
            bn = nn.BatchNorm2d(slot.out_channels, origin.eps, origin.momentum).to(weight.device, kind)
            nn.init.constant_(bn.weight, math.sqrt(1 + origin.eps))  # takes back what its eps does to a variance of one
            if not in_conv:
                bn.bias = nn.Parameter(bias.to(kind))
            found[name.removesuffix(origin.name) + norm] = bn.eval()
        return found

    @property
    def restores(self) -> bool:
        """Whether folding gives back layers of a user's network."""
        return self.origin is not None

    def extra_repr(self) -> str:
        slot = self.slot
        return f"{slot.in_channels}, {slot.out_channels}, K={slot.kernel}, stride={slot.stride}, groups={slot.groups}"


class RepFamily:
    """The family "rep": options are branches by their names in `BRANCHES`, any subset of them."""

    fallback = FALLBACK  # what is computed, and paid, where no option is chosen

    def spec(self, slot: Slot, name: str) -> OpSpec:
        return BRANCHES.get(name).spec(_rep(slot).shape)

    def single(self, slot: Slot, names: tuple[str, ...]) -> nn.Module:
        return RepBlock(_rep(slot), names)

    def mixed(self, slot: Slot) -> nn.Module:
        return RepBlock(_rep(slot), slot.choice.options, choice=True)

    def always(self, slot: Slot) -> tuple[OpSpec, ...]:
        """Branches that are there whatever is chosen."""
        shape = _rep(slot).shape
        return tuple(self.spec(slot, name) for name in _rep(slot).always if BRANCHES.get(name).fits(shape))

    def deployed(self, slot: Slot, names: tuple[str, ...]) -> tuple[OpSpec, ...]:
        """What is left after folding: one convolution, whatever was chosen."""
        here = _rep(slot)
        channels, shape = (slot.in_channels, slot.out_channels), (here.kernel, slot.stride, here.groups)
        return (OpSpec("conv", *channels, slot.size, *shape, activation=slot.activation),)

    def plain(self, slot: Slot) -> nn.Module:
        """The convolution that a folded block is, with fresh weights."""
        here = _rep(slot)
        return nn.Conv2d(
            slot.in_channels, slot.out_channels, here.kernel, slot.stride, here.kernel // 2, groups=here.groups
        )


def _rep(slot: Slot) -> RepSlot:
    if not isinstance(slot, RepSlot):
        raise ValueError(f"The family 'rep' needs a RepSlot; slot {slot.name!r} is a {type(slot).__name__}.")
    return slot


FAMILIES.add("rep", RepFamily())
