"""Branches of convolutions for networks and training loops of your own: convert, search, fold back.

>>> from torch import nn
>>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
>>> names = list(net.state_dict())
>>> list(dict(convert(net).named_children())["0"].branches)
['1x1', 'kxk', '1x1_kxk', '1x1_avg', '1xk', 'kx1']
>>> from pynas.fuse import fuse
>>> list(fuse(net).state_dict()) == names
True
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cost_models.names import unknown
from pynas.architecture import Architecture
from pynas.branch_budget import read_budget
from pynas.branch_sampler import BranchDraw, BranchSampler
from pynas.fuse import relative_difference
from pynas.ops.branches import BRANCHES, FALLBACK
from pynas.ops.convert import KERNELS, Place, blocks, places, replace, run
from pynas.ops.rep import RepBlock
from pynas.registry import SearchSpace
from pynas.subsets import SubsetCosts
from pynas.supernet import CostTable
from pynas.training.evaluate import Norm
from pynas.training.optim import cosine
from pynas.training.where import device_of

# Blocks of the literature as fixed sets of branches. DBB's for depthwise convolutions have no 1x1 branch, and twice the
# channels in the middle of 1x1-KxK.
BLOCKS: Mapping[str, tuple[str, ...]] = {
    "plain": ("kxk",),
    "repvgg": ("1x1", "kxk", "skip"),
    "acb": ("kxk", "1xk", "kx1"),
    "dbb": ("1x1", "kxk", "1x1_kxk", "1x1_avg"),
    "all": BRANCHES.names(),
}
SAME = 1e-4  # of the largest output: what a conversion may change where it should change nothing


def fixed(space: SearchSpace, block: str) -> Architecture:
    """The network of a space of branches that has the same block everywhere: RepVGG's, ACNet's ("acb"), DBB's, ...

    Branches that do not fit a place are left out there.

    Args:
        space: For instance `pynas.SPACES.get("repnas")(host="repvgg_a0")`.
        block: A name of `BLOCKS`.

    Raises:
        ValueError: For an unknown block.
    """
    names = branches_of(block)
    chosen = {choice.name: tuple(n for n in choice.options if n in names) for choice in space.choices()}
    return Architecture(space.name, chosen, space.options())


def branches_of(block: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the branches of a named block, or these names themselves. Raises ValueError for unknown ones."""
    if isinstance(block, str):
        if block not in BLOCKS:
            raise unknown("block", block, BLOCKS, f"Or give names of branches: {', '.join(BRANCHES.names())}.")
        return BLOCKS[block]
    for name in block:
        BRANCHES.get(name)
    return tuple(block)


def convert(
    net: nn.Module,
    block: str | Sequence[str] = "all",
    *,
    sharing: bool = False,
    silent: bool = True,
    kernels: Sequence[int] = KERNELS,
    only: Callable[[str, nn.Conv2d], bool] | None = None,
    example: Tensor | None = None,
    merged: bool = False,
) -> nn.Module:
    """Puts a block of branches in the place of every K x K convolution of a network and of the batch norm behind it.

    Changes `net` and returns it. The KxK branch takes over the weights. Train it as before, then `pynas.fuse(net)`
    gives a copy with the layers that were there before, whose state loads into your class with `strict=True`. Make
    optimisers after the conversion: there are new parameters.

    Left as they are: convolutions with dilation, other padding than K // 2 zeros, or an even or oblong kernel; those
    that run more than once; those with neither a bias nor a batch norm of their own, for nothing could hold what
    branches add; and subclasses of `nn.Conv2d`. `pynas.ops.convert.places(net)` lists what is taken.

    Args:
        net: Traced by `torch.fx`, or run on the example where it cannot be.
        block: A name of `BLOCKS` ("all", "repvgg", "acb", "dbb"), or names of branches, the KxK among them.
        sharing: Whether the branches of a block slice one kernel, that of the convolution.
        silent: Let the new branches begin with an output of zero, so that the network answers in eval mode as before:
            for trained networks. Otherwise their batch norms begin as usual: for a training from scratch.
        kernels: Sizes to convert.
        only: Asked with name and convolution whether to convert it.
        example: An input (B, ...). With it, the conversion is checked.
        merged: Train each block as one convolution with exact batch statistics; see `pynas.ops.moments`.

    Raises:
        ValueError: Nothing to convert; an unknown or incomplete block; a network that cannot be traced or fails on the
            example; or one that a silent conversion changes. `net` is untouched then.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"convert takes a torch.nn.Module, not {type(net).__name__}.")
    names = branches_of(block)
    if FALLBACK not in names:
        raise ValueError(f"The branches {list(names)} lack {FALLBACK!r}, which takes over the convolution's weights.")
    if any(True for _ in blocks(net)):
        raise ValueError("The network has blocks of branches already. Fold them first: pynas.fuse(net).")
    found = [place for place in places(net, kernels, example) if only is None or only(place.name, place.conv)]
    if not found:
        sizes = ", ".join(f"{kernel}x{kernel}" for kernel in kernels)
        raise ValueError(f"The network has no convolution of {sizes} that a block could stand for.")
    if example is not None:
        _check_places(net, found, names, example)
    for place in found:
        made = _block(place, names, block == "dbb", sharing=sharing, merged=merged)
        replace(net, place, made, made)
        if silent:
            made.silence()
    return net


def _check_places(net: nn.Module, found: Sequence[Place], names: tuple[str, ...], example: Tensor) -> None:
    """Converts a copy whose batch norms all do something else, with silent branches: nothing may change."""
    probe = copy.deepcopy(net)
    random = torch.Generator().manual_seed(0)
    for module in probe.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            mean = torch.randn(module.num_features, generator=random)
            module.running_mean.copy_(0.5 * mean)
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=random))
    expected = run(probe, example)
    modules = dict(probe.named_modules())
    for place in found:
        conv, bn = modules[place.name], modules.get(place.norm) if place.norm else None
        there = dataclasses.replace(place, conv=conv, bn=bn)
        made = _block(there, names, False)
        replace(probe, there, made, made)
        made.silence()
    difference = relative_difference(expected, run(probe, example))
    if difference > SAME:
        raise ValueError(
            f"The conversion would change the network's answers by {difference:.1e} of the largest: something reads a "
            "convolution besides its batch norm. Leave it out with only=lambda name, conv: ..."
        )


def _block(place: Place, names: tuple[str, ...], dbb: bool, **settings: Any) -> RepBlock:
    depthwise = 1 < place.conv.groups == place.conv.in_channels
    if dbb and depthwise:
        names, settings = tuple(name for name in names if name != "1x1"), {**settings, "middle": 2}
    slot = place.slot(names, **settings)
    return RepBlock(slot, slot.choice.options, choice=True)


class BranchSearch:
    """The search of RepNAS for a network and a training loop of your own.

    Call `draw()` before each forward pass and `step()` after each backward pass, beside your optimiser's. After
    `frozen` + `joint` steps the branches are fixed, the others are taken out of the network, and batch norms begin new
    running statistics; go on training, then fold with `pynas.fuse`. Gates, noise and schedule are those of the strategy
    `repnas`, which see; a state can be saved at any time, with the network's own. Gates are drawn where the network is
    when the search is made.

    Args:
        net: Converted by `convert`; changed in place.
        budget: A number of branches or a share of them, over the whole network.
        frozen: Steps in which random branches train.
        joint: Steps after these, in which logits are trained as well.
        seed: Of the draws.
        lr: Of the logits' Adam.
        beta: First beta of that Adam.
        weight_decay: Of that Adam.

    Raises:
        ValueError: The network has no blocks, or the budget cannot be.
    """

    def __init__(
        self,
        net: nn.Module,
        budget: int | float | str = 0.34,
        *,
        frozen: int,
        joint: int,
        seed: int = 0,
        lr: float = 1e-4,
        beta: float = 0.5,
        weight_decay: float = 5e-4,
    ) -> None:
        self.net, self.frozen, self.joint = net, frozen, joint
        self.blocks = dict(blocks(net))
        if not self.blocks:
            raise ValueError("The network has no blocks of branches. Convert it first: pynas.rep.convert(net).")
        if min(frozen, joint) < 0:
            raise ValueError(f"frozen and joint are numbers of steps, not {frozen} and {joint}.")
        asked, table = read_budget(budget), _counted(list(self.blocks.values()))
        if asked.kind in ("ms", "MB"):
            raise ValueError("A search of your own network counts branches: give a number of them or a share.")
        total = int(table.mask.sum())
        self.budget = int(asked.amount * total + 1e-9) if asked.kind == "ratio" else int(asked.amount)
        SubsetCosts.of(table).check(self.budget)
        slots = [block.slot for block in self.blocks.values()]
        self.sampler = BranchSampler(table.choices, slots, table, self.budget, seed).to(device_of(net))
        self.optimizer = torch.optim.Adam([self.sampler.logits], lr, (beta, 0.999), weight_decay=weight_decay)
        self.weight_decay = weight_decay
        self.steps = 0
        self.kept: dict[str, tuple[str, ...]] | None = None

    @property
    def phase(self) -> Literal["frozen", "joint", "fixed"]:
        """Where the search stands."""
        if self.kept is not None:
            return "fixed"
        return "frozen" if self.steps < self.frozen else "joint"

    def draw(self) -> BranchDraw | None:
        """Gives every block the gates of the next forward pass; none once branches are fixed."""
        if self.kept is not None:
            return None
        drawn = self.sampler.draw(self.steps + 1)
        for block in self.blocks.values():
            block.gates = drawn.gates[block.slot.name]
        return drawn

    def step(self) -> None:
        """Updates the logits by the last backward pass, and fixes the branches when it is time."""
        if self.kept is not None:
            return
        if self.phase == "joint":
            decay = cosine(self.weight_decay, self.steps - self.frozen, max(1, self.joint))
            self.optimizer.param_groups[0]["weight_decay"] = decay
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps >= self.frozen + self.joint:
            self.fix()

    def fix(self) -> None:
        """Keeps the branches of largest logits and takes the others out of the network, for good."""
        rows = zip(self.blocks.items(), self.sampler.best().tolist(), strict=True)
        self._keep({name: tuple(n for n, on in zip(b.names, row, strict=False) if on) for (name, b), row in rows})
        for module in self.net.modules():
            if isinstance(module, Norm):
                module.reset_running_stats()

    def _keep(self, kept: Mapping[str, tuple[str, ...]]) -> None:
        self.kept = dict(kept)
        for name, block in self.blocks.items():
            block.keep(self.kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Of the search; the network's own is apart, and is loaded after this one."""
        return {
            "sampler": self.sampler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "kept": self.kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another search stood; takes the branches out that it had taken out."""
        self.sampler.load_state_dict(state["sampler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if state["kept"] is not None:
            self._keep(state["kept"])


def _counted(found: Sequence[RepBlock]) -> CostTable:
    """A table in which every branch of some blocks costs 1."""
    choices = tuple(block.slot.choice for block in found)
    width = max(len(choice.options) for choice in choices)
    mask = torch.zeros(len(choices), width, dtype=torch.bool)
    for row, choice in enumerate(choices):
        mask[row, : len(choice.options)] = True
    names, order = tuple(block.slot.name for block in found), tuple(range(len(found)))
    empty = torch.zeros(len(found), dtype=torch.float64)
    return CostTable(names, choices, order, mask.double(), mask, 0.0, "branches", {}, empty=empty)
