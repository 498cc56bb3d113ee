"""One inverted-bottleneck block in inference, batch norms folded: three convolutions in one pass over the image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pynas.kernels import cuda_infer
from pynas.kernels.kernel import Kernel
from pynas.kernels.native import KERNELS

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")  # as in csrc/cpu/mbconv.h
KERNEL_SIZES = (3, 5, 7)


class Folded(NamedTuple):
    """Weights of a block with M hidden channels and G groups, batch norms folded in; all of one dtype.

    Args:
        expand: (M, in / G, 1, 1), the first 1x1 convolution.
        expand_bias: (M,).
        depthwise: (M, 1, K, K), in the order after the channel shuffle.
        depthwise_bias: (M,).
        project: (out, M / G, 1, 1), the last 1x1 convolution.
        project_bias: (out,).
    """

    expand: Tensor
    expand_bias: Tensor
    depthwise: Tensor
    depthwise_bias: Tensor
    project: Tensor
    project_bias: Tensor


def inference_reference(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    groups: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """States the block in plain PyTorch, for any device and any order of derivative.

    1x1 convolution - activation - channel shuffle where groups > 1 - depthwise convolution - activation -
    1x1 convolution, plus x where `residual`.

    Source: FBNet, arXiv 1812.03443, Table 2 and Figure 3; the shuffle of ShuffleNet, arXiv 1707.01083.

    Args:
        x: (B, H, W, in): channels last.
        expand, expand_bias, depthwise, depthwise_bias, project, project_bias: See `Folded`.
        stride: Of the depthwise convolution, 1 or 2.
        groups: Of both 1x1 convolutions.
        activation: One of `ACTIVATIONS`, after the first and the second convolution.
        residual: Whether x is added; needs stride 1 and as many output as input channels.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), out).

    Raises:
        ValueError: Shapes or dtypes disagree, or a number is not allowed.
    """
    weights = Folded(expand, expand_bias, depthwise, depthwise_bias, project, project_bias)
    _check(x, weights, stride, groups, activation, residual)
    act = getattr(functional, activation, None) or (lambda t: t)
    y = act(functional.conv2d(x.permute(0, 3, 1, 2), expand, expand_bias, groups=groups))
    if groups > 1:
        y = y.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    padding = depthwise.shape[-1] // 2
    y = act(functional.conv2d(y, depthwise, depthwise_bias, stride, padding, groups=len(depthwise)))
    y = functional.conv2d(y, project, project_bias, groups=groups).permute(0, 2, 3, 1)
    return (x + y if residual else y).contiguous()


def _check(x: Tensor, w: Folded, stride: int, groups: int, activation: str, residual: bool) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have the shape (batch, height, width, channels), got {tuple(x.shape)}.")
    if x.dtype not in (torch.float32, torch.float64) or any(t.dtype is not x.dtype for t in w):
        found = ", ".join(sorted({str(t.dtype) for t in (x, *w)}))
        raise ValueError(f"x and all weights must be float32, or all float64; got {found}. Try x.to(expand.dtype).")
    if any(t.device != x.device for t in w):
        found = ", ".join(sorted({str(t.device) for t in (x, *w)}))
        raise ValueError(f"x and all weights must be on one device, got {found}.")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}; 1 and 2 are possible.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; possible are {', '.join(ACTIVATIONS)}.")
    check_weights(w, groups)
    if x.shape[3] != w.expand.shape[1] * groups:
        raise ValueError(
            f"x has {x.shape[3]} channels, the last of its dimensions; the weights want {w.expand.shape[1] * groups}. "
            "For a tensor (batch, channels, height, width) pass x.permute(0, 2, 3, 1)."
        )
    if residual and (stride != 1 or x.shape[3] != len(w.project)):
        raise ValueError(
            f"residual=True needs stride 1 and as many output as input channels, "
            f"got stride {stride}, {x.shape[3]} and {len(w.project)} channels."
        )


def check_weights(w: Folded, groups: int) -> None:
    kernel = w.depthwise.shape[-1] if w.depthwise.dim() else 0
    if kernel not in KERNEL_SIZES:
        raise ValueError(f"depthwise has shape {tuple(w.depthwise.shape)}; kernel sizes {KERNEL_SIZES} are possible.")
    hidden, outs = len(w.depthwise), len(w.project)
    ins = w.expand.shape[1] if w.expand.dim() > 1 else 0
    if groups < 1 or hidden % groups or outs % groups or not (hidden and outs and ins):
        raise ValueError(f"groups is {groups}; it must divide the {hidden} hidden and {outs} output channels.")
    wanted = (
        *((hidden, ins, 1, 1), (hidden,), (hidden, 1, kernel, kernel), (hidden,)),
        *((outs, hidden // groups, 1, 1), (outs,)),
    )
    for name, tensor, shape in zip(Folded._fields, w, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with groups={groups} it must be {shape}.")


class Packed(NamedTuple):
    """What the kernel reads: weights in its order, and the numbers that say which order."""

    weights: Tensor
    numbers: tuple[int, ...]


def pack(w: Folded, stride: int, groups: int, activation: str) -> Packed:
    """Packs weights that `_check` has passed."""
    hidden, ins, outs = len(w.depthwise), w.expand.shape[1] * groups, len(w.project)
    numbers = ins, hidden, outs, w.depthwise.shape[-1], stride, groups, ACTIVATIONS.index(activation)
    packed, *parts = KERNELS.mbconv_infer_pack(numbers, tuple(t.detach().contiguous() for t in w))
    return Packed(packed, (*numbers, *parts))


def run_packed(x: Tensor, packed: Packed, residual: bool) -> Tensor | None:
    """Calls the kernel. None: infinities or NaN met zeros that stand for missing weights between groups."""
    threads = torch.get_num_threads()
    y = KERNELS.mbconv_infer(x, packed.numbers, packed.weights, residual, threads)
    if y is None:
        y = KERNELS.mbconv_infer(x.detach().contiguous(), packed.numbers, packed.weights, residual, threads)
    if y is None:
        raise ValueError("x changed while mbconv_inference was reading it.")
    return None if y is False else y


def inference_function(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    groups: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """`inference_reference` by the kernel; the reference itself for other devices and where a gradient is wanted.

    It packs the weights at every call: what runs more often is `pynas.ops.prepared.prepare`.
    """
    w = Folded(expand, expand_bias, depthwise, depthwise_bias, project, project_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *w)):
        return inference_reference(x, *w, stride, groups, activation, residual)
    if x.dim() == 4 and cuda_infer.takes(x, expand.shape[1]):
        _check(x, w, stride, groups, activation, residual)
        return cuda_infer.run(x.detach(), w, stride, groups, ACTIVATIONS.index(activation), residual)
    if KERNELS is None or not x.is_cpu:
        return inference_reference(x, *w, stride, groups, activation, residual)
    _check(x, w, stride, groups, activation, residual)
    y = run_packed(x, pack(w, stride, groups, activation), residual)
    return inference_reference(x, *w, stride, groups, activation, residual) if y is None else y


@torch.library.custom_op("pynas::mbconv_inference", mutates_args=())
def inference_op(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    groups: int,
    activation: str,
    residual: bool,
) -> Tensor:
    """`inference_function` as a registered operator. It has no gradient."""
    w = expand, expand_bias, depthwise, depthwise_bias, project, project_bias
    return inference_function(x, *w, stride, groups, activation, residual)


@inference_op.register_fake
def _(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    stride: int,
    groups: int,
    activation: str,
    residual: bool,
) -> Tensor:
    batch, height, width, _ = x.shape
    return x.new_empty(batch, (height + stride - 1) // stride, (width + stride - 1) // stride, project.shape[0])


def packs(w: Folded) -> bool:
    return w.expand.dtype in (torch.float32, torch.float64) and all(t.dtype is w.expand.dtype for t in w)


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """All kernel sizes, strides, activations and ways to cut groups; channels that fill no vector; an empty batch."""
    samples: list[tuple[Any, ...]] = []
    for ins, hidden, outs, kernel, stride, groups, activation, size, batch in (
        *((16, 96, 16, 3, 1, 1, "relu", (9, 7), 2), (24, 24, 24, 5, 1, 2, "relu6", (5, 6), 3)),
        *((64, 64, 64, 3, 1, 2, "none", (8, 8), 1), (6, 10, 4, 7, 2, 2, "hardswish", (4, 11), 2)),
        (8, 24, 8, 3, 1, 1, "relu", (3, 3), 0),
    ):
        generator = torch.Generator().manual_seed(hidden + kernel)
        shapes = (
            *((batch, *size, ins), (hidden, ins // groups, 1, 1), (hidden,), (hidden, 1, kernel, kernel)),
            *((hidden,), (outs, hidden // groups, 1, 1), (outs,)),
        )
        tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        scaled = [t / t[0].numel() ** 0.5 if i and t.dim() == 4 else t for i, t in enumerate(tensors)]
        moved = [t.to(device) for t in scaled]
        samples.append((*moved, stride, groups, activation, stride == 1 and ins == outs))
    return samples


MBCONV_INFERENCE = Kernel(
    "mbconv_inference",
    inference_op,
    inference_function,
    inference_reference,
    _samples,
    differentiable=False,
    same_bits=False,
    tolerance=(1e-4, 1e-5),
)
