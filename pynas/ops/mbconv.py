"""Inverted-bottleneck options: those of FBNet, FairNAS and NAS-Bench-Macro."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.choices import Gates, Slot
from pynas.kernels.rule import worth, would_run
from pynas.ops.fused import Blocks, Division, takes, traced
from pynas.ops.layers import ACTIVATIONS, MODULES, ConvBN, build
from pynas.ops.mixed import Mixed
from pynas.ops.watch import Wiring
from pynas.registry import FAMILIES, Registry


class Option(Protocol):
    """One entry of this family: everything else about it follows from its spec."""

    def spec(self, slot: Slot) -> OpSpec: ...


OPTIONS: Registry[Option] = Registry("mbconv option")


@dataclass(frozen=True)
class Expand:
    """1x1 conv - BN - act - [shuffle] - depthwise KxK - BN - act - [squeeze-and-excitation] - 1x1 conv - BN (FBNet,
    Table 2 and Figure 3; FairNAS without shuffle).

    The first 1x1 convolution is kept for expansion 1, as in the paper's operation counts.
    """

    kernel: int
    expansion: int
    groups: int = 1

    def spec(self, slot: Slot) -> OpSpec:
        return OpSpec(
            "mbconv",
            slot.in_channels,
            slot.out_channels,
            slot.size,
            kernel=self.kernel,
            stride=slot.stride,
            groups=self.groups,
            expansion=self.expansion,
            squeeze=max(1, round(slot.squeeze * slot.in_channels)) if slot.squeeze else 0,
            activation=slot.activation,
        )


@dataclass(frozen=True)
class Skip:
    """Identity; where the shape changes, a strided 1x1 convolution with BN stands in for it.

    Args:
        activated: Whether the slot's activation follows that BN.
    """

    activated: bool = True

    def spec(self, slot: Slot) -> OpSpec:
        if slot.stride == 1 and slot.in_channels == slot.out_channels:
            return OpSpec("skip", slot.in_channels, slot.out_channels, slot.size)
        activation = slot.activation if self.activated else "none"
        return OpSpec("conv", slot.in_channels, slot.out_channels, slot.size, stride=slot.stride, activation=activation)


OPTIONS.add("k3_e1", Expand(3, 1))
OPTIONS.add("k3_e1_g2", Expand(3, 1, groups=2))
OPTIONS.add("k3_e3", Expand(3, 3))
OPTIONS.add("k3_e6", Expand(3, 6))
OPTIONS.add("k5_e1", Expand(5, 1))
OPTIONS.add("k5_e1_g2", Expand(5, 1, groups=2))
OPTIONS.add("k5_e3", Expand(5, 3))
OPTIONS.add("k5_e6", Expand(5, 6))
OPTIONS.add("skip", Skip())
OPTIONS.add("k7_e3", Expand(7, 3))
OPTIONS.add("k7_e6", Expand(7, 6))
OPTIONS.add("identity", Skip(activated=False))  # NAS-Bench-Macro's


class ChannelShuffle(nn.Module):
    """(B, C, H, W) -> the same with channels (g, C/g) read as (C/g, g)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        shuffled: Tensor = x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return shuffled


class SqueezeExcite(nn.Module):
    """Scales each channel by what a small network makes of the means of all (Hu et al., arXiv 1709.01507).

    (B, C, H, W) -> the same. Both 1x1 convolutions have a bias.

    Args:
        channels: C.
        middle: Channels between the two convolutions.
        activation: Between them.
    """

    def __init__(self, channels: int, middle: int, activation: str) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.activation = ACTIVATIONS[activation]() if activation != "none" else nn.Identity()
        self.expand = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x * scale


@MODULES.register("mbconv")
class MBConv(nn.Module):
    """Kind "mbconv": (B, in, S, S) -> (B, out, ceil(S / stride), ceil(S / stride)).

    Adds its input when stride is 1 and the channels agree. No activation after the last batch norm.
    """

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        hidden = spec.in_channels * spec.expansion
        act = spec.activation
        self.expand = ConvBN(spec.in_channels, hidden, groups=spec.groups, activation=act)
        self.shuffle = ChannelShuffle(spec.groups) if spec.groups > 1 else None
        self.depthwise = ConvBN(hidden, hidden, spec.kernel, spec.stride, groups=hidden, activation=act)
        self.squeeze = SqueezeExcite(hidden, spec.squeeze, act) if spec.squeeze else None
        self.project = ConvBN(hidden, spec.out_channels, groups=spec.groups, activation="none")
        self.residual = spec.stride == 1 and spec.in_channels == spec.out_channels
        self._wiring = Wiring()

    def forward(self, x: Tensor) -> Tensor:
        y = self._fused(x) if self.training or not torch.is_grad_enabled() else None
        return self.plain(x) if y is None else y

    def _fused(self, x: Tensor) -> Tensor | None:
        if type(self) is not MBConv:
            return None
        if torch.compiler.is_compiling():
            return traced(Division.alone(self), x, None) if self.training else None
        wired: Blocks | None = self._wiring.get(id(self))  # a shallow copy shares the dictionary
        if wired is None or not wired.unchanged():
            wired = self._wiring[id(self)] = Blocks(Division.alone(self), called=True)
        if not wired.sound:
            return None
        return wired(x, None) if self.training else wired.inference(x)

    def plain(self, x: Tensor) -> Tensor:
        """The block in plain PyTorch, module by module."""
        y: Tensor = self.expand(x)
        if self.shuffle is not None:
            y = self.shuffle(y)
        y = self.depthwise(y)
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y)
        return x + y if self.residual else y


class MixedMBConv(Mixed):
    """A choice layer whose blocks, and the identity, run in one call of a kernel where that does the same."""

    def __init__(self, options: Mapping[str, nn.Module]) -> None:
        super().__init__(options)
        self._wiring = Wiring()

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        if gates.single:  # the block calls its own kernel
            return self.alone(x, gates)
        y, run = None, gates.run
        if self.training and torch.compiler.is_compiling():
            division = self._divided(gates)
            y = traced(division, x, gates.values)
            run = run if y is None else division.others
        elif self.training:
            key = id(self), gates.run, gates.train
            wired: Blocks | None = self._wiring.get(key)
            if wired is None or not wired.unchanged():
                wired = self._wiring[key] = Blocks(self._divided(gates), called=False, around=[self, self.options])
            y = wired(x, gates.values) if wired.sound else None
            run = run if y is None else wired.division.others
        return self.add(y, x, gates, run) if run or y is None else y

    def _divided(self, gates: Gates) -> Division:
        """Which of the running options the kernel can take; the identity may join blocks."""
        modules = list(self.options.values())
        own = [type(module) if "forward" not in module.__dict__ else None for module in modules]
        columns = [column for column in gates.run if own[column] is MBConv]
        blocks = [modules[column] for column in columns]
        identities = [column for column in gates.run if own[column] is nn.Identity]
        identity = identities[0] if blocks and blocks[0].residual and len(identities) == 1 else -1
        others = tuple(column for column in gates.run if column not in columns and column != identity)
        trained = [column in gates.train for column in columns]
        return Division(blocks, columns, trained, identity, others)


class MBConvFamily:
    """The family "mbconv": options are looked up by name in `OPTIONS`."""

    def spec(self, slot: Slot, name: str) -> OpSpec:
        return OPTIONS.get(name).spec(slot)

    def single(self, slot: Slot, names: tuple[str, ...]) -> nn.Module:
        (name,) = names
        return build(self.spec(slot, name))

    def mixed(self, slot: Slot) -> nn.Module:
        return MixedMBConv({name: self.single(slot, (name,)) for name in slot.choice.options})

    def fused(self, slot: Slot, images: int) -> bool:
        """Whether the slot's blocks, all at once, run in a fused kernel in training on so many images, as it is set."""
        specs = [self.spec(slot, name) for name in slot.choice.options]
        blocks = [spec for spec in specs if spec.kind == "mbconv" and takes(spec.activation, spec.squeeze)]
        total = sum(worth(slot.in_channels, spec.kernel, spec.expansion * slot.in_channels) for spec in blocks)
        return bool(blocks) and would_run(slot.in_channels, images * slot.size**2, total)


FAMILIES.add("mbconv", MBConvFamily())
