"""How inverted-bottleneck modules meet their kernel: what it reads of them, and whether it does just what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn

from pynas.fuse import fold_conv_bn
from pynas.kernels import setting
from pynas.kernels.formats import is_channels_last
from pynas.kernels.mbconv import mixed_mbconv
from pynas.kernels.mbconv_infer import inference_function
from pynas.kernels.mbconv_reference import ACTIVATIONS, KERNELS_ALLOWED
from pynas.kernels.mbconv_update import update_norms
from pynas.kernels.native import KERNELS
from pynas.kernels.rule import infers_on_gpu, runs_fused, worth
from pynas.ops.layers import ACTIVATIONS as ACTIVATION_MODULES
from pynas.ops.layers import ConvBN
from pynas.ops.watch import BUFFERS, HOOKS, ORDINARY, Shapes, Watch, common, ordinary, own

_CODES: dict[type[nn.Module], int] = {ACTIVATION_MODULES[name]: code for code, name in enumerate(ACTIVATIONS) if code}
_WEIGHTS = (("conv", "weight"), ("bn", "weight"), ("bn", "bias"))
INFERENCE_POSITIONS = 2048  # of a batch: fewer are done before the weights are packed
# What modules keep as attributes and the kernel has been told once.
_FACTS = ("stride", "padding", "dilation", "groups", "padding_mode", "residual", "inplace", "min_val", "max_val")


def _parts(block: Any) -> tuple[Any, Any, Any]:
    return block.expand, block.depthwise, block.project


def _conv(conv: Any, kernel: int, stride: int, groups: int) -> bool:
    return (
        own(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.groups) == ((kernel, kernel), (stride, stride), groups)
        and (conv.padding, conv.dilation) == ((kernel // 2, kernel // 2), (1, 1))
        and (conv.bias, conv.padding_mode) == (None, "zeros")
    )


def _activation(part: nn.Module) -> int:
    """Its code; -1 for one that the kernel does not have."""
    names = list(part._modules)
    if names == ["conv", "bn"]:
        return 0
    activation: Any = part._modules.get("activation")
    if names != ["conv", "bn", "activation"] or not own(activation, type(activation)):
        return -1
    return _CODES.get(type(activation), -1)


def takes(activation: str, squeeze: int) -> bool:
    """Whether the kernel has blocks of this activation, and of so many channels of squeeze-and-excitation."""
    return activation in ACTIVATIONS and not squeeze


def facts(block: Any) -> tuple[tuple[int, int, int, int], tuple[int, int, int]] | None:
    """In channels, out channels, stride and activation of a block; its kernel, hidden channels and groups.

    None where it is not made of the very modules that the kernel stands for.
    """
    parts, shuffle = _parts(block), block.shuffle
    if block.squeeze is not None or not all(own(part, ConvBN) and own(part.bn, nn.BatchNorm2d) for part in parts):
        return None
    first, middle, last = (part.conv for part in parts)
    codes = [_activation(part) for part in parts]
    if not isinstance(middle, nn.Conv2d) or codes[0] < 0 or codes[1:] != [codes[0], 0]:
        return None
    (kernel, _), (stride, _), hidden, groups = middle.kernel_size, middle.stride, middle.groups, first.groups
    if kernel not in KERNELS_ALLOWED or stride not in (1, 2) or hidden != middle.in_channels:
        return None
    alike = _conv(first, 1, 1, groups) and _conv(middle, kernel, stride, hidden) and _conv(last, 1, 1, groups)
    shuffled = groups == 1 if shuffle is None else "forward" not in shuffle.__dict__ and shuffle.groups == groups
    residual = stride == 1 and first.in_channels == last.out_channels
    if not alike or not shuffled or block.residual != residual:
        return None
    return (first.in_channels, last.out_channels, stride, codes[0]), (kernel, hidden, groups)


@dataclass(frozen=True)
class Division:
    """Running options of a layer: those that one call of the kernel takes, and the others.

    Args:
        blocks: Modules of the class `MBConv`.
        columns: Their columns of the gates.
        trained: Which of them are differentiated.
        identity: Column of the identity that joins them; -1: none.
        others: Columns of options that run by themselves.
    """

    blocks: Sequence[Any]
    columns: Sequence[int]
    trained: Sequence[bool]
    identity: int = -1
    others: tuple[int, ...] = ()

    @staticmethod
    def alone(block: nn.Module) -> Division:
        """One block without gates."""
        return Division([block], [0], [True])

    def parts(self) -> list[Any]:
        """Convolutions with their norms, three of each block."""
        return [part for block in self.blocks for part in _parts(block)]

    def numbers(self) -> tuple[tuple[int, int, int, int], tuple[int, ...]] | None:
        """In channels, out channels, stride, activation; and the options' numbers as `mixed_mbconv` takes them.

        None where it cannot take them together.
        """
        found = [facts(block) for block in self.blocks]
        options: list[int] = []
        for fact, column, trained in zip(found, self.columns, self.trained, strict=True):
            if fact is None or found[0] is None or fact[0] != found[0][0]:
                return None
            options += [*fact[1], column, int(trained)]
        return (found[0][0], tuple(options)) if found and found[0] is not None else None


class Blocks:
    """The blocks of a division as the kernel takes them. Reads parameters anew at every call.

    Args:
        division: What runs.
        called: Whether the blocks are called as modules, so that their own hooks have run.
        around: Modules that must keep their children, too.
    """

    def __init__(self, division: Division, called: bool, around: Sequence[nn.Module] = ()) -> None:
        numbers = division.numbers()
        self.division, self.sound = division, numbers is not None
        modules = [module for block in division.blocks for module in block.modules()]
        silent = [child for module in around for child in module.children() if type(child) is nn.Identity]
        self._watch = Watch(
            modules, division.blocks if called else (), around, silent if division.identity >= 0 else (), _FACTS
        )
        self.unchanged = self._watch.unchanged
        if numbers is None:
            return
        (self._in, out, stride, code), self._options = numbers
        self._layer, self._worth = (stride, out, code), _worth(self._in, self._options)
        self._shapes = Shapes(_shapes(self._in, out, self._options))
        parts = division.parts()
        self._weights = [getattr(part, name)._parameters for part in parts for name, _ in _WEIGHTS]
        self._weight_keys = [key for _ in parts for _, key in _WEIGHTS]
        self._buffers = [part.bn._buffers for part in parts for _ in BUFFERS]
        self._buffer_keys = [key for _ in parts for key in BUFFERS]
        self._norms = [part.bn.__dict__ for part in parts]

    def __call__(self, x: Tensor, gates: Tensor | None) -> Tensor | None:
        """The gated sum in training mode, running statistics updated; None where the modules must do it."""
        if not ordinary(x, gates) or self._watch.hooked():
            return None
        images, channels, height, width = x.shape
        stride, eps, momentum = self._layer[0], *common(self._norms)
        out_positions = images * -(-height // stride) * -(-width // stride)
        if momentum is None or eps is None or channels != self._in or out_positions < 2:
            return None
        if not runs_fused(x, self._worth, self._layer, self._options):
            return None
        try:
            tensors = tuple(map(getitem, self._weights, self._weight_keys))
            buffers = tuple(map(getitem, self._buffers, self._buffer_keys))
        except KeyError:  # parametrised: computed from other parameters
            return None
        if not {*map(type, tensors), *map(type, buffers)} <= ORDINARY:
            return None
        if not self._shapes.fit(tensors) or tensors[0].dtype is not x.dtype:
            return None
        y, statistics = mixed_mbconv(x, gates, tensors, self._layer, self._options, self.division.identity, eps)
        update_norms(self._layer, self._options, statistics, buffers, momentum, images * height * width, out_positions)
        return y

    def inference(self, x: Tensor) -> Tensor | None:
        """One block in eval mode without gradients, batch norms folded; None where the modules must do it.

        Weights are folded and packed at every call, so that none is ever stale; small inputs are not worth that.
        """
        if not ordinary(x, None) or self._watch.hooked() or setting.current() == "reference":
            return None
        images, channels, height, width = x.shape
        if channels != self._in:
            return None
        if x.is_cuda:
            if not infers_on_gpu(x, self._layer, self._options):
                return None
        elif KERNELS is None or not x.is_cpu or images * height * width < INFERENCE_POSITIONS:
            return None
        parts = self.division.parts()
        if any(part.bn.training or part.bn.running_mean is None or part.bn.running_var is None for part in parts):
            return None
        weights = tuple(holder.get(key) for holder, key in zip(self._weights, self._weight_keys, strict=True))
        if not self._shapes.fit(weights) or any(weight.dtype is not x.dtype for weight in weights):
            return None
        first, middle, final = (fold_conv_bn(part.conv.weight, part.conv.bias, part.bn) for part in parts)
        stride, _, code = self._layer
        groups, residual = self._options[2], bool(self.division.blocks[0].residual)
        last = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        y = inference_function(last, *first, *middle, *final, stride, groups, ACTIVATIONS[code], residual).permute(
            0, 3, 1, 2
        )
        return y if is_channels_last(x) else y.contiguous()


def _shapes(channels: int, out: int, options: Sequence[int]) -> list[tuple[int, ...]]:
    """Of all weights."""
    shapes: list[tuple[int, ...]] = []
    for kernel, hidden, groups in zip(*(options[i::5] for i in range(3)), strict=True):
        shapes += [(hidden, channels // groups, 1, 1), (hidden,), (hidden,)]
        shapes += [(hidden, 1, kernel, kernel), (hidden,), (hidden,)]
        shapes += [(out, hidden // groups, 1, 1), (out,), (out,)]
    return shapes


def _worth(in_channels: int, options: Sequence[int]) -> int:
    """Of all options together, for `runs_fused`."""
    return sum(worth(in_channels, kernel, hidden) for kernel, hidden in zip(options[::5], options[1::5], strict=True))


def traced(division: Division, x: Tensor, gates: Tensor | None) -> Tensor | None:
    """The same as `Blocks` inside torch.compile, which reads modules, not their dictionaries."""
    numbers = division.numbers()
    norms = [part.bn for part in division.parts()]
    mixed = torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    if numbers is None or torch.compiler.is_exporting() or mixed or x.dim() != 4:
        return None
    ((channels, out, stride, code), options), eps, momentum = numbers, norms[0].eps, norms[0].momentum
    usual = all(norm.training and norm.affine and norm.track_running_stats for norm in norms)
    alike = all(norm.eps == eps and norm.momentum == momentum for norm in norms)
    if not usual or not alike or momentum is None or any(_hooked(block) for block in division.blocks):
        return None
    images, height, width = x.shape[0], x.shape[2], x.shape[3]
    out_positions = images * -(-height // stride) * -(-width // stride)
    if x.dtype not in (torch.float32, torch.float64) or channels != x.shape[1] or out_positions < 2:
        return None
    if (gates is not None and gates.dtype != x.dtype) or not runs_fused(
        x, _worth(channels, options), (stride, out, code), options
    ):
        return None
    tensors = [t for part in division.parts() for t in (part.conv.weight, part.bn.weight, part.bn.bias)]
    buffers = tuple(t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
    layer = stride, out, code
    y, statistics = mixed_mbconv(x, gates, tensors, layer, options, division.identity, eps)
    update_norms(layer, options, statistics, buffers, momentum, images * height * width, out_positions)
    return y


def _hooked(block: nn.Module) -> bool:
    return any(getattr(module, name) for module in block.modules() for name in HOOKS)
