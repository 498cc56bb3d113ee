"""How options of an edge meet their kernel: what it reads of their modules, and whether it does just what they do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn

from pynas.kernels import setting
from pynas.kernels.edge import mixed_edge, update_edge_norms
from pynas.kernels.edge_reference import KERNELS_ALLOWED
from pynas.kernels.native import KERNELS
from pynas.ops.watch import BUFFERS, ORDINARY, Shapes, Watch, Wiring, common, ordinary, own

_POOLS: dict[type[nn.Module], int] = {nn.MaxPool2d: 1, nn.AvgPool2d: 2}  # places in edge_reference.KINDS
_FACTS = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "inplace", "kernel_size"),
    *("ceil_mode", "return_indices", "count_include_pad", "divisor_override", "affine", "track_running_stats"),
)


@dataclass(frozen=True)
class Option:
    """One option as the kernel takes it.

    Args:
        stride: Of the whole option.
        channels: That come in, and go out; 0 for a pool, which takes any.
        numbers: Kind, kernel, dilation, stages.
        stages: Depthwise convolution (None for a pool), 1x1 convolution and norm.
    """

    stride: int
    channels: int
    numbers: tuple[int, int, int, int]
    stages: tuple[tuple[Any, Any, Any], ...]


def _parts(module: Any, names: Sequence[str]) -> list[Any] | None:
    return list(module._modules.values()) if list(module._modules) == list(names) else None


def _norm(norm: Any) -> bool:
    return own(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _stage(module: nn.Module) -> Option | None:
    """ReLU, depthwise convolution, 1x1 convolution, norm."""
    parts = _parts(module, ("relu", "depthwise", "pointwise", "bn"))
    if parts is None or not own(parts[0], nn.ReLU) or not all(own(part, nn.Conv2d) for part in parts[1:3]):
        return None
    _, depthwise, pointwise, norm = parts
    (kernel, _), (stride, _), (dilation, _) = depthwise.kernel_size, depthwise.stride, depthwise.dilation
    channels, reach = depthwise.in_channels, kernel // 2 * dilation
    wanted: list[tuple[Any, ...]] = [
        (channels, channels, (kernel, kernel), (stride, stride), (reach, reach), (dilation, dilation), channels),
        (channels, channels, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ]
    for conv, facts in zip((depthwise, pointwise), wanted, strict=True):
        found = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
        if (*found, conv.groups) != facts or conv.bias is not None or conv.padding_mode != "zeros":
            return None
    allowed = kernel in KERNELS_ALLOWED and dilation in (1, 2) and stride in (1, 2)
    if not allowed or not _norm(norm) or norm.num_features != channels:
        return None
    return Option(stride, channels, (0, kernel, dilation, 1), ((depthwise, pointwise, norm),))


def _two_stages(module: nn.Module) -> Option | None:
    parts = _parts(module, ("first", "second"))
    if parts is None or any("forward" in part.__dict__ for part in parts):
        return None
    first, second = map(_stage, parts)
    if first is None or second is None:
        return None
    same = first.channels == second.channels and first.numbers[1] == second.numbers[1]
    if not same or (first.numbers[2], second.numbers[2], second.stride) != (1, 1, 1):
        return None
    return Option(first.stride, first.channels, (0, first.numbers[1], 1, 2), first.stages + second.stages)


def _pool(module: nn.Module) -> Option | None:
    parts = _parts(module, ("pool", "bn"))
    if parts is None or type(parts[0]) not in _POOLS or "forward" in parts[0].__dict__ or not _norm(parts[1]):
        return None
    pool, norm = parts
    if (pool.kernel_size, pool.padding, pool.ceil_mode) != (3, 1, False) or pool.stride not in (1, 2):
        return None
    if isinstance(pool, nn.MaxPool2d):
        usual = pool.dilation == 1 and not pool.return_indices
    else:
        usual = not pool.count_include_pad and pool.divisor_override is None
    numbers = _POOLS[type(pool)], 3, 1, 1
    return Option(pool.stride, norm.num_features, numbers, ((None, None, norm),)) if usual else None


def option_of(module: nn.Module) -> Option | None:
    """What the kernel takes for a module; None where it is not made of the very modules that the kernel stands for."""
    if "forward" in module.__dict__ or type(module).forward not in (nn.Sequential.forward, FusedSequential.forward):
        return None
    return _stage(module) or _two_stages(module) or _pool(module)


class EdgeOptions:
    """Some running options of an edge as the kernel takes them. Reads parameters anew at every call.

    Args:
        modules: Of all options of the edge.
        run: Places of those that run.
        around: Modules that must keep their children.
        called: Whether the options are called as modules, so that their own hooks have run.
    """

    def __init__(
        self, modules: Sequence[nn.Module], run: Sequence[int], around: Sequence[nn.Module], called: bool = False
    ) -> None:
        found = {place: option_of(modules[place]) for place in run}
        convs = [place for place, option in found.items() if option is not None and option.numbers[0] == 0]
        pools = [place for place, option in found.items() if option is not None and option.numbers[0] > 0]
        identities = [place for place in run if own(modules[place], nn.Identity)]
        taken = [found[place] for place in (*convs, *pools)]
        options = [option for option in taken if option is not None]
        shapes = {(option.stride, option.channels) for option in options}
        norms = [norm for option in options for *_, norm in option.stages]
        affine = {norm.affine for norm in norms}
        self.sound = len(shapes) == 1 and len(affine) == 1
        self.others = tuple(run)
        inside = [module for place in run for module in modules[place].modules()]
        self._watch = Watch(inside, modules if called else (), around, [modules[place] for place in identities], _FACTS)
        self.unchanged = self._watch.unchanged
        if not self.sound:
            return
        ((stride, self._channels),) = shapes
        self._layer = stride, int(affine.pop())
        self._identity = identities[0] if len(identities) == 1 and stride == 1 else -1
        places = [*convs, *pools]
        self.others = tuple(place for place in run if place not in (*places, self._identity))
        self._numbers = tuple(
            chain.from_iterable((*option.numbers, place) for option, place in zip(options, places, strict=True))
        )
        self._holders: list[tuple[dict[str, Any], str]] = []
        for depthwise, pointwise, norm in (stage for option in options for stage in option.stages):
            if depthwise is not None:
                self._holders += [(depthwise._parameters, "weight"), (pointwise._parameters, "weight")]
            if self._layer[1]:
                self._holders += [(norm._parameters, "weight"), (norm._parameters, "bias")]
        self._shapes = Shapes([tuple(holder[key].shape) for holder, key in self._holders])
        self._buffers = [(norm._buffers, key) for norm in norms for key in BUFFERS]
        self._norms = [norm.__dict__ for norm in norms]

    def __call__(self, x: Tensor, gates: Tensor | None) -> Tensor | None:
        """The gated sum in training mode, running statistics updated; None where the modules must do it.

        Without gates, the sum.
        """
        if (gates is not None and gates.dim() != 1) or not x.is_cpu or not ordinary(x, gates) or self._watch.hooked():
            return None
        images, channels, height, width = x.shape
        positions = images * -(-height // self._layer[0]) * -(-width // self._layer[0])
        eps, momentum = common(self._norms)
        if eps is None or momentum is None or channels != self._channels or positions < 2:
            return None
        try:
            tensors = tuple(getitem(*holder) for holder in self._holders)
            buffers = tuple(getitem(*holder) for holder in self._buffers)
        except KeyError:  # parametrised: computed from other parameters
            return None
        if not {*map(type, tensors), *map(type, buffers)} <= ORDINARY or not self._shapes.fit(tensors):
            return None
        if any(tensor.dtype is not x.dtype for tensor in tensors):
            return None
        y, statistics = mixed_edge(x, gates, tensors, self._layer, self._numbers, self._identity, eps)
        update_edge_norms(statistics, buffers, momentum, positions)
        return y


def would_run() -> bool:
    """Whether edges run in the kernel on the CPU, as it is set."""
    return KERNELS is not None and setting.current() != "reference"


class FusedSequential(nn.Sequential):
    """An option that runs in one call of a kernel where that does the same: one or two stages of a convolution."""

    def __init__(self, layers: OrderedDict[str, nn.Module]) -> None:
        super().__init__(layers)
        self._wiring = Wiring()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and would_run() and not torch.compiler.is_compiling():
            wired: EdgeOptions | None = self._wiring.get(id(self))  # a shallow copy shares the dictionary
            if wired is None or not wired.unchanged():
                wired = self._wiring[id(self)] = EdgeOptions([self], [0], (), called=True)
            y = wired(x, None) if wired.sound else None
            if y is not None:
                return y
        for layer in self:
            x = layer(x)
        return x
