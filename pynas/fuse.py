"""Batch norms folded into the convolutions before them, and blocks of branches into one: exact, checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def fold_conv_bn(weight: Tensor, bias: Tensor | None, bn: Norm, name: str = "") -> tuple[Tensor, Tensor]:
    """Gives weight and bias of the one convolution that equals a convolution followed by `bn` in eval mode.

    With s = scale / sqrt(running_var + eps): weight' = s * weight and bias' = s * (bias - running_mean) + shift, in
    float64, then cast back to the type of `weight`. Exact for every padding, stride, dilation and number of groups,
    because the batch norm comes after the convolution. Differentiable.

    Args:
        weight: Of the convolution, (O, I / groups, K, K); any shape that starts with O works.
        bias: (O,), or None for a convolution without.
        bn: Batch norm over O channels, with or without scale and shift.
        name: Of the batch norm, for errors.

    Raises:
        ValueError: `bn` keeps no running statistics, or its number of channels is not O.
    """
    label = f"the batch norm {name!r}" if name else "the batch norm"
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            f"Cannot fold {label}: it keeps no running statistics. Build it with track_running_stats=True and train."
        )
    if bn.num_features != len(weight):
        raise ValueError(f"Cannot fold {label}: it has {bn.num_features} channels, its convolution {len(weight)}.")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


@runtime_checkable
class Foldable(Protocol):
    """A module that knows what can stand in its place in eval mode, exactly."""

    @property
    def restores(self) -> bool:
        """Whether that is what a user's network had there."""

    def folded_modules(self, name: str, restore: bool = True) -> Mapping[str, nn.Module]:
        """Modules by their full names, given that of the module itself. Raises ValueError where it cannot be."""


def fuse(
    net: nn.Module,
    example: Tensor | None = None,
    tolerance: float = 1e-4,
    *,
    in_place: bool = False,
    restore: bool = True,
) -> nn.Module:
    """Copies `net` in eval mode with every block of branches, and every batch norm behind a convolution, folded.

    Blocks of branches (`pynas.ops.rep`) become one convolution each, checked in float64 against their branches. A
    network that `pynas.rep.convert` gave such blocks gets back the very layers that they replaced, and nothing else is
    folded, so that its state loads into the user's own class; fuse the result again to fold its batch norms.

    Pairs are neighbours in an `nn.Sequential` (or a subclass of it) at any depth. The convolution keeps its name and
    type, and gains a bias; an `nn.Identity`, which leaves no trace in an exported graph, keeps the batch norm's place,
    so that names and indices stay. Other convolutions, other batch norms and subclasses of `nn.Conv2d` or
    `nn.BatchNorm2d` stay as they are. Each place gets its own folded convolution, so one that is shared is folded
    once per batch norm. `net` may be in training mode: the copy uses its running statistics, and `net` is untouched.
    Types may be mixed (a half precision convolution before a float32 batch norm): the convolution's is kept.

    Args:
        net: Any module.
        example: An input of `net`, (B, ...) on its device. If given, both nets answer it and are compared.
        tolerance: Largest difference allowed, relative to the largest output.
        in_place: Change `net` itself, and return it. What the check finds wrong is then found too late; blocks are
            checked before any of them is replaced.
        restore: Give a converted network its own layers back. Without, its blocks become convolutions with a bias, as
            all others do, and what else can be folded is: for deployment.

    Raises:
        ValueError: a batch norm to fold keeps no running statistics; a block is searched still; the net fails on
            `example`; or the outputs differ.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"fuse takes a torch.nn.Module, not {type(net).__name__}.")
    fused = net.eval() if in_place else copy.deepcopy(net).eval()
    expected = None if example is None else forward(fused, example)  # before the first fold, so the original's
    restored = restore and any(isinstance(module, Foldable) and module.restores for module in fused.modules())
    fused = _fold_blocks(fused, in_place, restore)
    for path, module in [] if restored else list(fused.named_modules()):
        if isinstance(module, nn.Sequential):
            _fold_neighbours(module, f"{path}." if path else "")
    if example is not None and expected is not None:
        difference = relative_difference(expected, forward(fused, example))
        if difference > tolerance:
            raise ValueError(
                f"The fused net differs from the original by {difference:.1e} of the largest output, more than the "
                f"tolerance {tolerance:g}. A larger tolerance= accepts it (half precision needs about 1e-2)."
            )
    return fused


def _fold_blocks(net: nn.Module, in_place: bool, restore: bool) -> nn.Module:
    """Puts what foldable modules become in their places, all at once. Returns the net, or what became of it."""
    if isinstance(net, Foldable):
        if in_place:
            raise ValueError("The net is a block itself, which cannot be replaced in place. Use what fuse returns.")
        (alone,) = net.folded_modules("", restore=False).values()
        return alone
    found: dict[str, nn.Module] = {}
    known: dict[int, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, Foldable):
            first = known.setdefault(id(module), name)
            found |= module.folded_modules(name, restore) if first == name else {name: found[first]}
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        net.get_submodule(parent)._modules[child] = module
    return net


def _fold_neighbours(sequence: nn.Sequential, prefix: str) -> None:
    """Folds, in place, each batch norm that follows a convolution. Repeated batch norms fold one after the other."""
    place, conv = "", None
    # Not named_children(): it hides the second place of a shared module. Exact types only: a subclass may do more than
    # its parent (an activation inside, quantised weights).
    for name, child in list(sequence._modules.items()):
        if type(child) is nn.Conv2d:
            place, conv = name, child
        elif conv is not None and isinstance(child, Norm) and type(child) in get_args(Norm):
            conv = _folded(conv, child, prefix + name)
            sequence._modules[place] = conv
            sequence._modules[name] = nn.Identity().eval()
        else:
            conv = None


def _folded(conv: nn.Conv2d, bn: Norm, name: str) -> nn.Conv2d:
    """A new convolution in place of two modules. The old ones stay valid where they are shared."""
    with torch.no_grad():
        weight, bias = fold_conv_bn(conv.weight, conv.bias, bn, name)
    merged = copy.deepcopy(conv)
    merged.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    merged.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    return merged


def forward(net: nn.Module, images: Tensor) -> Tensor:
    """Runs `net` without gradients on a copy of `images` (its first layer may work in place).

    Raises:
        ValueError: the net fails on them, or its answer is not one tensor.
    """
    try:
        with torch.no_grad():
            answer = net(images.clone())
    except Exception as error:
        raise ValueError(
            f"The net fails on an input of shape {tuple(images.shape)}: {first_line(error)} "
            "Give the input size that it was built for."
        ) from error
    if not isinstance(answer, Tensor):
        raise ValueError(f"The net must answer with one tensor, not {type(answer).__name__}.")
    return answer


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of `expected`; infinite if `actual` is.

    Raises:
        ValueError: the shapes differ, or `expected` holds infinity or NaN.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"The net answers in shape {tuple(expected.shape)}, its copy in {tuple(actual.shape)}.")
    if not expected.isfinite().all():
        raise ValueError("The net answers with infinity or NaN, so its copies cannot be checked. Train it again.")
    if not actual.isfinite().all():
        return math.inf
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((expected.double() - actual.double()).abs().max() / scale)


def first_line(error: Exception) -> str:
    """The first line of an error's text, as a sentence; the error's type if it has no text."""
    text = str(error).strip().splitlines()
    return (text[0].rstrip(".") if text else type(error).__name__) + "."
