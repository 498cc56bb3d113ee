"""How inverted-bottleneck modules meet their kernel: what it reads of them, and whether it does just what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from pynas.fuse import fold_conv_bn
from pynas.kernels import setting
from pynas.kernels.mbconv import mixed_mbconv
from pynas.kernels.mbconv_infer import inference_function
from pynas.kernels.mbconv_reference import ACTIVATIONS, KERNELS_ALLOWED, is_channels_last
from pynas.kernels.mbconv_update import update_norms
from pynas.kernels.native import KERNELS
from pynas.kernels.rule import runs_fused, worth
from pynas.ops.layers import ACTIVATIONS as ACTIVATION_MODULES
from pynas.ops.layers import ConvBN

_CODES: dict[type[nn.Module], int] = {ACTIVATION_MODULES[name]: code for code, name in enumerate(ACTIVATIONS) if code}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}", {}) for name in _HOOKS]
_ORDINARY = {Tensor, nn.Parameter}
_WEIGHTS = (("conv", "weight"), ("bn", "weight"), ("bn", "bias"))
INFERENCE_POSITIONS = 2048  # of a batch: fewer are done before the weights are packed
# What modules keep as attributes and the kernel has been told once.
_FACTS = ("stride", "padding", "dilation", "groups", "padding_mode", "residual", "inplace", "min_val", "max_val")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _parts(block: Any) -> tuple[Any, Any, Any]:
    return block.expand, block.depthwise, block.project


def _own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says: no subclass, no other `forward` on the object."""
    return type(module) is kind and "forward" not in module.__dict__


def _conv(conv: Any, kernel: int, stride: int, groups: int) -> bool:
    return (
        _own(conv, nn.Conv2d)
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
    if names != ["conv", "bn", "activation"] or not _own(activation, type(activation)):
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
    if block.squeeze is not None or not all(_own(part, ConvBN) and _own(part.bn, nn.BatchNorm2d) for part in parts):
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


def _ordinary(x: Tensor, gates: Tensor | None) -> bool:
    """Whether nobody watches single operations, and the kernel takes such tensors."""
    if type(x) not in _ORDINARY or x.dim() != 4 or x.dtype not in (torch.float32, torch.float64):
        return False
    if gates is not None and (gates.dtype != x.dtype or gates.device != x.device):
        return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


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
        self._children = [module._modules for module in (*modules, *around) if module._modules]
        self._now = [child for children in self._children for child in children.values()]
        quiet = [module for module in modules if not (called and module in division.blocks)]
        if division.identity >= 0:
            quiet += [child for module in around for child in module.children() if type(child) is nn.Identity]
        self._facts = [(module.__dict__, name) for module in modules for name in _FACTS if name in module.__dict__] + [
            (part.conv._parameters, "bias") for part in division.parts() if numbers is not None
        ]
        self._seen = [holder[name] for holder, name in self._facts]
        self._all = [*modules, *quiet]
        self._kinds = [type(module) for module in self._all]
        self._checked: tuple[Any, ...] = ()
        self._hooks: list[Any] = [module.__dict__[name] for module in quiet for name in _HOOKS] + _GLOBAL_HOOKS
        if numbers is None:
            return
        (self._in, out, stride, code), self._options = numbers
        self._layer, self._worth = (stride, out, code), _worth(self._in, self._options)
        parts = division.parts()
        self._weights = [getattr(part, name)._parameters for part in parts for name, _ in _WEIGHTS]
        self._weight_keys = [key for _ in parts for _, key in _WEIGHTS]
        self._buffers = [part.bn._buffers for part in parts for _ in _BUFFERS]
        self._buffer_keys = [key for _ in parts for key in _BUFFERS]
        self._norms = [part.bn.__dict__ for part in parts]

    def unchanged(self) -> bool:
        """Whether all modules are those that were there, and are as they were."""
        return (
            list(chain.from_iterable(map(dict.values, self._children))) == self._now
            and list(map(type, self._all)) == self._kinds
            and all(
                holder.get(name, self) is seen for (holder, name), seen in zip(self._facts, self._seen, strict=True)
            )
            and not any("forward" in module.__dict__ for module in self._all)
        )

    def _fit(self, tensors: tuple[Any, ...]) -> bool:
        """Whether weights have the shapes that their modules tell; parts that were cut out have not."""
        if len(tensors) == len(self._checked) and all(map(is_, tensors, self._checked)):
            return True
        _, out, _ = self._layer
        shapes: list[tuple[int, ...]] = []
        for kernel, hidden, groups in zip(*(self._options[i::5] for i in range(3)), strict=True):
            shapes += [(hidden, self._in // groups, 1, 1), (hidden,), (hidden,)]
            shapes += [(hidden, 1, kernel, kernel), (hidden,), (hidden,)]
            shapes += [(out, hidden // groups, 1, 1), (out,), (out,)]
        if any(tensor is None or tensor.shape != shape for tensor, shape in zip(tensors, shapes, strict=True)):
            return False
        self._checked = tensors
        return True

    def __call__(self, x: Tensor, gates: Tensor | None) -> Tensor | None:
        """The gated sum in training mode, running statistics updated; None where the modules must do it."""
        if not _ordinary(x, gates) or any(self._hooks):
            return None
        images, channels, height, width = x.shape
        stride, eps, momentum = self._layer[0], *_common(self._norms)
        out_positions = images * -(-height // stride) * -(-width // stride)
        if momentum is None or eps is None or channels != self._in or out_positions < 2:
            return None
        if not runs_fused(x, self._worth):
            return None
        try:
            tensors = tuple(map(getitem, self._weights, self._weight_keys))
            buffers = tuple(map(getitem, self._buffers, self._buffer_keys))
        except KeyError:  # parametrised: computed from other parameters
            return None
        if not {*map(type, tensors), *map(type, buffers)} <= _ORDINARY:
            return None
        if not self._fit(tensors) or tensors[0].dtype is not x.dtype:
            return None
        y, statistics = mixed_mbconv(x, gates, tensors, self._layer, self._options, self.division.identity, eps)
        update_norms(self._layer, self._options, statistics, buffers, momentum, images * height * width, out_positions)
        return y

    def inference(self, x: Tensor) -> Tensor | None:
        """One block in eval mode without gradients, batch norms folded; None where the modules must do it.

        Weights are folded and packed at every call, so that none is ever stale; small inputs are not worth that.
        """
        if not _ordinary(x, None) or any(self._hooks) or setting.current() == "reference":
            return None
        images, channels, height, width = x.shape
        if channels != self._in:
            return None
        if KERNELS is None or not x.is_cpu or images * height * width < INFERENCE_POSITIONS:
            return None
        parts = self.division.parts()
        if any(part.bn.training or part.bn.running_mean is None or part.bn.running_var is None for part in parts):
            return None
        weights = tuple(holder.get(key) for holder, key in zip(self._weights, self._weight_keys, strict=True))
        if not self._fit(weights) or any(weight.dtype is not x.dtype for weight in weights):
            return None
        first, middle, final = (fold_conv_bn(part.conv.weight, part.conv.bias, part.bn) for part in parts)
        stride, _, code = self._layer
        groups, residual = self._options[2], bool(self.division.blocks[0].residual)
        last = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        y = inference_function(last, *first, *middle, *final, stride, groups, ACTIVATIONS[code], residual).permute(
            0, 3, 1, 2
        )
        return y if is_channels_last(x) else y.contiguous()


def _worth(in_channels: int, options: Sequence[int]) -> int:
    """Of all options together, for `runs_fused`."""
    return sum(worth(in_channels, kernel, hidden) for kernel, hidden in zip(options[::5], options[1::5], strict=True))


def _common(norms: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """eps and momentum of all norms; None where they differ, or a norm is in eval mode or averages otherwise."""
    first = norms[0]
    eps, momentum = first["eps"], first["momentum"]
    for norm in norms:
        if not norm["training"] or norm["eps"] != eps or norm["momentum"] != momentum:
            return None, None
    return eps, momentum


class Wiring(dict[Any, Any]):
    """What has been worked out about a module and its children; a copy of the module begins with nothing."""

    def __deepcopy__(self, memo: object) -> Wiring:
        return Wiring()

    def __reduce__(self) -> tuple[type[Wiring], tuple[()]]:
        return Wiring, ()


def traced(division: Division, x: Tensor, gates: Tensor | None) -> Tensor | None:
    """The same as `Blocks` inside torch.compile, which reads modules, not their dictionaries."""
    numbers = division.numbers()
    norms = [part.bn for part in division.parts()]
    if numbers is None or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu") or x.dim() != 4:
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
    if (gates is not None and gates.dtype != x.dtype) or not runs_fused(x, _worth(channels, options)):
        return None
    tensors = [t for part in division.parts() for t in (part.conv.weight, part.bn.weight, part.bn.bias)]
    buffers = tuple(t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
    layer = stride, out, code
    y, statistics = mixed_mbconv(x, gates, tensors, layer, options, division.identity, eps)
    update_norms(layer, options, statistics, buffers, momentum, images * height * width, out_positions)
    return y


def _hooked(block: nn.Module) -> bool:
    return any(getattr(module, name) for module in block.modules() for name in _HOOKS)
