"""Inverted-bottleneck blocks made ready for inference: batch norms folded, weights packed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pynas.fuse import fold_conv_bn
from pynas.kernels.mbconv_infer import (
    ACTIVATIONS,
    Folded,
    check_weights,
    inference_reference,
    pack,
    packs,
    run_packed,
)
from pynas.kernels.native import KERNELS

_STAGES = ("expand", "depthwise", "project")


class Prepared:
    """A block whose weights are folded and packed once, for as long as they stay as they are. See `prepare`."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)), with channels last in memory.

        Input with channels last in memory is read as it is, other input is copied. Where a gradient is wanted, the
        reference runs, with batch norms folded.

        Raises:
            ValueError: x does not fit the block.
        """
        if self._ready is not None and not torch.is_grad_enabled():
            y = KERNELS.mbconv_infer_prepared(x, *self._ready, torch.get_num_threads())
            if isinstance(y, Tensor):
                return y
        if self._changed():
            self._refresh()
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in self._tensors)):
            return self._reference(x, _fold(self._block))
        packed = self._packed
        if packed is None or not x.is_cpu or x.dtype is not packed.weights.dtype or x.dim() != 4:
            return self._reference(x, self._folded)
        last = x.permute(0, 2, 3, 1)
        if last.shape[3] != packed.numbers[0]:
            return self._reference(x, self._folded)
        y = run_packed(last, packed, self._residual)
        return self._reference(x, self._folded) if y is None else y.permute(0, 3, 1, 2)

    def _reference(self, x: Tensor, folded: Folded) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must have the shape (batch, channels, height, width), got {tuple(x.shape)}.")
        y = inference_reference(x.permute(0, 2, 3, 1), *folded, *self._numbers, self._residual)
        return y.permute(0, 3, 1, 2)

    def _refresh(self) -> None:
        self._numbers = _numbers(self._block)
        self._residual = bool(self._block.residual)
        with torch.no_grad():
            self._folded = _fold(self._block)
        check_weights(self._folded, self._numbers[1])
        native = KERNELS is not None and self._folded.expand.is_cpu
        self._packed = pack(self._folded, *self._numbers) if native and packs(self._folded) else None
        places = _places(self._block)
        holders, keys = tuple(holder for holder, _ in places), tuple(key for _, key in places)
        seen = tuple(holder.get(key) for holder, key in places)
        self._seen = holders, keys, seen
        self._tensors = tuple(value for value in seen if isinstance(value, Tensor))
        self._stamped: int | None = KERNELS.mbconv_infer_stamp(self._tensors) if self._packed else None
        self._ready: tuple[Any, ...] | None = None
        if self._packed is not None and self._stamped is not None:
            weights = self._packed.numbers, self._packed.weights
            self._ready = *self._seen, self._tensors, self._stamped, *weights, self._residual

    def _changed(self) -> bool:
        """Whether a weight has changed, as far as that can be told; the kernel itself asks the same."""
        holders, keys, seen = self._seen
        if self._stamped is None or not all(
            holder.get(key) is s for holder, key, s in zip(holders, keys, seen, strict=True)
        ):
            return True
        stamp: int | None = KERNELS.mbconv_infer_stamp(self._tensors)
        return stamp != self._stamped


def prepare(block: nn.Module) -> Prepared:
    """Folds the batch norms of a block, by their running statistics, and packs its weights for the kernel.

    The result answers as `block` does in eval mode, and follows it: at every call it looks whether weights, statistics
    or modules of the block have changed, and then folds and packs again. It sees what is assigned, what torch writes in
    place, and, from some elements of every tensor, steps of fused optimisers and writes to `Tensor.data`; it can miss
    the latter two if they change a few elements only.

    Args:
        block: Made of `expand`, `depthwise` and `project`, each with `conv` and `bn`, and `activation` in the first
            two; a `residual` flag; and a channel shuffle between the first two where they are grouped. `MBConv` is one.

    Raises:
        ValueError: A batch norm keeps no running statistics, or a part of the block is none that this computes.
    """
    return Prepared(block)


def _places(block: Any) -> list[tuple[dict[str, Any], str]]:
    """Where everything lies that the answer depends on: a module's attributes take longer than its dictionaries."""
    modules = block.__dict__["_modules"]
    places = [(modules, name) for name in _STAGES]
    some = (modules, "shuffle"), (block.__dict__, "residual")
    places += [(holder, name) for holder, name in some if name in holder]
    for name in _STAGES:
        stage = modules[name].__dict__["_modules"]
        places += ((stage, part) for part in ("conv", "bn", "activation") if part in stage)
        conv, bn = stage["conv"].__dict__, stage["bn"].__dict__
        places += ((conv["_parameters"], key) for key in ("weight", "bias"))
        places += ((bn["_parameters"], key) for key in ("weight", "bias"))
        places += ((bn["_buffers"], key) for key in ("running_mean", "running_var", "num_batches_tracked"))
        places.append((bn, "eps"))
    return places


def _fold(block: Any) -> Folded:
    found: list[Tensor] = []
    for name in _STAGES:
        stage = getattr(block, name)
        found += fold_conv_bn(stage.conv.weight, stage.conv.bias, stage.bn, f"{name}.bn")
    return Folded(*found)


def _numbers(block: Any) -> tuple[int, int, str]:
    """Stride, groups and activation of a block, after checks that it is one."""
    for name in _STAGES:
        stage = getattr(block, name, None)
        conv, bn = getattr(stage, "conv", None), getattr(stage, "bn", None)
        if type(conv) is not nn.Conv2d or not isinstance(bn, nn.BatchNorm2d):
            raise ValueError(
                f"prepare needs a block whose {name!r} has an nn.Conv2d 'conv' and an nn.BatchNorm2d 'bn', "
                f"got {type(conv).__name__} and {type(bn).__name__}. Parametrised convolutions have to be merged first."
            )
        if "weight" not in conv._parameters:
            raise ValueError(f"{name}.conv is parametrised. Call torch.nn.utils.parametrize.remove_parametrizations.")
    first, middle, last = (getattr(block, name) for name in _STAGES)
    kernel, stride, groups = middle.conv.kernel_size[0], middle.conv.stride[0], first.conv.groups
    wanted = {
        "expand": (first.conv, (1, 1), (1, 1), (0, 0), groups),
        "depthwise": (middle.conv, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, middle.conv.out_channels),
        "project": (last.conv, (1, 1), (1, 1), (0, 0), groups),
    }
    for name, (conv, *expected) in wanted.items():
        found = [conv.kernel_size, conv.stride, conv.padding, conv.groups]
        if found != expected or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise ValueError(
                f"{name}.conv has kernel size, stride, padding and groups {found}; "
                f"{expected} without dilation are needed."
            )
    acts = [_activation(name, getattr(block, name)) for name in _STAGES[:2]]
    if acts[0] != acts[1]:
        raise ValueError(f"expand and depthwise have the activations {acts[0]} and {acts[1]}; they must be the same.")
    if getattr(block, "squeeze", None) is not None:
        raise ValueError("The block has squeeze-and-excitation, which this does not compute. Call the block itself.")
    if (getattr(block, "shuffle", None) is None) != (groups == 1):
        raise ValueError(f"A block of {groups} groups must {'not ' * (groups == 1)}have a channel shuffle.")
    if block.residual and (stride != 1 or first.conv.in_channels != last.conv.out_channels):
        raise ValueError("The block adds its input, which needs stride 1 and as many output as input channels.")
    return stride, groups, acts[0]


def _activation(name: str, stage: Any) -> str:
    names: dict[type[Any], str] = {type(None): "none", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}
    module = getattr(stage, "activation", None)
    if type(module) not in names:
        raise ValueError(f"{name}.activation is {type(module).__name__}; possible are {', '.join(ACTIVATIONS)}.")
    return names[type(module)]
