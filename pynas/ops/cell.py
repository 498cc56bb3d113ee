"""Options of an edge in a cell: those of DARTS (arXiv 1806.09055) and SNAS (arXiv 1812.09926)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.spec import OpSpec
from pynas.choices import Gates, Slot
from pynas.ops.fused_edge import EdgeOptions, FusedSequential, would_run
from pynas.ops.layers import MODULES, build
from pynas.ops.mixed import Mixed
from pynas.ops.watch import Wiring
from pynas.registry import FAMILIES, Registry

NONE = "none"  # the option of an edge that is not there

# Makes the spec of an option at a slot, whose channels are the same going in and out.
OPTIONS: Registry[Callable[[Slot], OpSpec]] = Registry("cell option")


def _spec(slot: Slot, kind: str, kernel: int = 1, dilation: int = 1, affine: int = 1) -> OpSpec:
    channels = slot.in_channels, slot.out_channels
    return OpSpec(kind, *channels, slot.size, kernel, slot.stride, dilation=dilation, affine=affine)


def _pool(slot: Slot, kind: str) -> OpSpec:
    if not slot.pool_norm:
        return _spec(slot, kind, kernel=3)
    return _spec(slot, f"{kind}_bn", kernel=3, affine=int(slot.affine))


def _skip(slot: Slot) -> OpSpec:
    if slot.stride == 1 and slot.in_channels == slot.out_channels:
        return OpSpec("skip", slot.in_channels, slot.out_channels, slot.size)
    return _spec(slot, "reduce", affine=int(slot.affine))


def _separable(slot: Slot, kind: str, kernel: int, dilation: int = 1) -> OpSpec:
    return _spec(slot, kind, kernel=kernel, dilation=dilation, affine=int(slot.affine))


OPTIONS.add(NONE, partial(_spec, kind="none"))
OPTIONS.add("max_pool_3x3", partial(_pool, kind="max_pool"))
OPTIONS.add("avg_pool_3x3", partial(_pool, kind="avg_pool"))
OPTIONS.add("skip_connect", _skip)
OPTIONS.add("sep_conv_3x3", partial(_separable, kind="sep_conv", kernel=3))
OPTIONS.add("sep_conv_5x5", partial(_separable, kind="sep_conv", kernel=5))
OPTIONS.add("dil_conv_3x3", partial(_separable, kind="dil_conv", kernel=3, dilation=2))
OPTIONS.add("dil_conv_5x5", partial(_separable, kind="dil_conv", kernel=5, dilation=2))


SEPARABLE = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")


@MODULES.register("none")
class Zero(nn.Module):
    """Kind "none": zeros in the shape of an edge's output. A cell leaves such an edge out."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        self.stride = spec.stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def _norm(channels: int, affine: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=bool(affine))


@MODULES.register("relu_conv")
class ReluConv(nn.Sequential):
    """Kind "relu_conv": ReLU, bias-free convolution, batch norm."""

    def __init__(self, spec: OpSpec) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(relu=nn.ReLU())
        channels = spec.in_channels, spec.out_channels
        layers["conv"] = nn.Conv2d(*channels, spec.kernel, spec.stride, spec.kernel // 2, bias=False)
        layers["bn"] = _norm(spec.out_channels, spec.affine)
        super().__init__(layers)


@MODULES.register("reduce")
class Reduce(nn.Module):
    """Kind "reduce", DARTS's factorised reduction: ReLU, two strided 1x1 convolutions of half the channels each, the
    second on the input moved by one pixel, then batch norm. A pixel beyond the border is zero."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        half = spec.out_channels // 2
        self.stride = spec.stride
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(spec.in_channels, half, 1, spec.stride, bias=False)
        self.odd = nn.Conv2d(spec.in_channels, half, 1, spec.stride, bias=False)
        self.bn = _norm(spec.out_channels, spec.affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        beyond = [int((side - 1) % self.stride == 0) for side in x.shape[2:]]
        moved = functional.pad(x, (0, beyond[1], 0, beyond[0])) if any(beyond) else x
        y: Tensor = self.bn(torch.cat([self.even(x), self.odd(moved[:, :, 1:, 1:])], 1))
        return y


class Separable(FusedSequential):
    """ReLU, depthwise convolution, 1x1 convolution, batch norm."""

    def __init__(self, spec: OpSpec, channels: int, stride: int) -> None:
        cin, kernel = spec.in_channels, spec.kernel
        layers: OrderedDict[str, nn.Module] = OrderedDict(relu=nn.ReLU())
        padding = kernel // 2 * spec.dilation
        layers["depthwise"] = nn.Conv2d(cin, cin, kernel, stride, padding, spec.dilation, groups=cin, bias=False)
        layers["pointwise"] = nn.Conv2d(cin, channels, 1, bias=False)
        layers["bn"] = _norm(channels, spec.affine)
        super().__init__(layers)


@MODULES.register("sep_conv")
class SepConv(FusedSequential):
    """Kind "sep_conv": two separable convolutions, the first with the stride, the second with the output's channels."""

    def __init__(self, spec: OpSpec) -> None:
        first, second = Separable(spec, spec.in_channels, spec.stride), Separable(spec, spec.out_channels, 1)
        super().__init__(OrderedDict(first=first, second=second))


@MODULES.register("dil_conv")
def _dil_conv(spec: OpSpec) -> nn.Module:
    return Separable(spec, spec.out_channels, spec.stride)


def _window(spec: OpSpec, norm: bool) -> nn.Module:
    padding = spec.kernel // 2
    if spec.kind.startswith("max"):
        pool: nn.Module = nn.MaxPool2d(spec.kernel, spec.stride, padding)
    else:
        pool = nn.AvgPool2d(spec.kernel, spec.stride, padding, count_include_pad=False)
    return nn.Sequential(OrderedDict(pool=pool, bn=_norm(spec.out_channels, spec.affine))) if norm else pool


for _kind in ("max_pool", "avg_pool"):
    MODULES.add(_kind, partial(_window, norm=False))
    MODULES.add(f"{_kind}_bn", partial(_window, norm=True))


class DropPath(nn.Dropout):
    """Leaves out a whole tensor of some images, in training, and scales that of the others up (DARTS, from NASNet).

    A dropout, so that whatever turns dropouts off turns this off. (B, C, H, W) -> the same. Starts with probability 0.
    """

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * (kept / (1 - self.p))


def set_drop_path(net: nn.Module, probability: float) -> None:
    """Gives every `DropPath` of a network its probability."""
    for module in net.modules():
        if isinstance(module, DropPath):
            module.p = probability


class MixedEdge(Mixed):
    """All options of an edge; convolutions, pools and identity run in one call of a kernel where that does the same.

    `none` adds nothing and is not computed; where it runs alone, there is no edge.
    """

    def __init__(self, options: dict[str, nn.Module]) -> None:
        super().__init__(options)
        self._none = tuple(options).index(NONE) if NONE in options else -1
        self._wiring = Wiring()

    def forward(self, x: Tensor, gates: Gates) -> Tensor | None:
        """(B, C, S, S) and gates -> (B, C, S', S'), or None."""
        if gates.run == (self._none,):
            return None
        if gates.single:
            return self.alone(x, gates)
        y, run = None, tuple(index for index in gates.run if index != self._none)
        if self.training and would_run() and not torch.compiler.is_compiling():
            key = id(self), run, gates.train
            wired: EdgeOptions | None = self._wiring.get(key)
            if wired is None or not wired.unchanged():
                wired = self._wiring[key] = EdgeOptions(
                    list(self.options.values()), [index for index in run if index in gates.train], [self, self.options]
                )
            y = wired(x, gates.values) if wired.sound else None
            if y is not None:
                run = tuple(index for index in run if index in wired.others or index not in gates.train)
        return self.add(y, x, gates, run) if run or y is None else y


class CellFamily:
    """The family "cell": options are looked up by name in `OPTIONS`."""

    def spec(self, slot: Slot, name: str) -> OpSpec:
        return OPTIONS.get(name)(slot)

    def single(self, slot: Slot, names: tuple[str, ...]) -> nn.Module:
        (name,) = names
        return build(self.spec(slot, name))

    def fused(self, slot: Slot, images: int) -> bool:
        """Whether the slot's options run in a fused kernel in training on so many images, as it is set."""
        return would_run() and any(name in SEPARABLE for name in slot.choice.options)

    def mixed(self, slot: Slot) -> nn.Module:
        return MixedEdge({name: self.single(slot, (name,)) for name in slot.choice.options})


FAMILIES.add("cell", CellFamily())
