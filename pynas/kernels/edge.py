"""All options of an edge of a cell in training, in one call forward and one back.

States nothing new: `edge_reference` is the mathematics, `csrc/cpu/edge.h` says what makes it fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pynas.kernels import edge_reference as plain
from pynas.kernels import formats, graph, once
from pynas.kernels.edge_reference import edge_reference
from pynas.kernels.graph import WANTS_GATES, WANTS_WEIGHTS, WANTS_X
from pynas.kernels.kernel import Kernel
from pynas.kernels.native import KERNELS

_TOLD = once.told("mixed_edge", "pynas.kernels.edge_reference.edge_reference")

_Ints = Sequence[int]
_Call = tuple[tuple[int, ...], tuple[int, ...], int, float]  # layer, options, identity, eps


def mixed_edge(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: Sequence[int],
    options: Sequence[int],
    identity: int = -1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Gated sum of the options of an edge in training mode, batch statistics included.

    A convolution is one stage or two of: ReLU - depthwise convolution - 1x1 convolution - batch norm, the first with
    the edge's stride and the option's dilation, the second plain. A pool of 3x3 sees no padding; batch norm follows. y
    has the memory format of x. Gradients flow from y to x, gates and tensors; they cannot be differentiated again.

    Source: DARTS, arXiv 1806.09055, section 3.1.1 and released code.

    Args:
        x: (B, C, H, W), float32 or float64 for the kernel; the reference takes any floating point type.
        gates: (O,) weights of the options; None takes one.
        tensors: Of each stage: (C, 1, K, K) and (C, C, 1, 1), and where norms are affine scale and shift of its norm;
            of each pool only these.
        layer: Stride (1 or 2), and whether norms are affine (0 or 1).
        options: Five numbers of each option, convolutions first: kind (an index of `edge_reference.KINDS`), kernel (3,
            5 or 7), dilation (1 or 2), stages (1 or 2) - of pools, these three are not read -, its place in `gates`.
        identity: Place of the gate of x itself, which joins the sum; -1: it does not.
        eps: Of all batch norms.

    Returns:
        y (B, C, H', W'); and, flat, mean and biased variance of each norm, in order.

    Raises:
        ValueError: Shapes, types or numbers make no sense, or a channel has one value (as torch).
    """
    if torch.compiler.is_compiling():
        if KERNELS is None or not x.is_cpu:
            return edge_reference(x, gates, tensors, layer, options, identity, eps)
        y, statistics, _ = edge_op(x, gates, list(tensors), list(layer), list(options), identity, eps)
        return y, statistics
    return edge_function(x, gates, tensors, layer, options, identity, eps)


def _takes(x: Tensor, layer: _Ints) -> bool:
    """Whether the kernel can take what is sound."""
    images, _, height, width = plain.out_shape(x, layer)
    return x.is_cpu and x.dtype in (torch.float32, torch.float64) and images * height * width > 1


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _forward(x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call) -> tuple[Tensor, ...] | None:
    """y as (B, H, W, C) and what backward needs; None where the reference must do it."""
    layer, options, identity, eps = call
    gates = None if gates is None else gates.contiguous()
    inputs, rest = (formats.last(x), layer, options), (gates, identity, eps, torch.get_num_threads())
    found = KERNELS.edge_forward(*inputs, tensors, *rest)
    if found is None:
        plain.check(x, gates, tensors, layer, options, identity, eps)
        if not _takes(x, layer):
            return None
        found = KERNELS.edge_forward(*inputs, _dense(tensors), *rest)
    if found is None:
        raise ValueError("mixed_edge takes no conjugate, negated or sparse tensors. Call .resolve_neg() first.")
    result: tuple[Tensor, ...] = found
    return result


_Grads = tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]


def _backward(
    x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call, saved: Any, grad: Tensor, wanted: int
) -> _Grads:
    """Gradients of x (in its memory format), gates and tensors; empty where they are not wanted."""
    layer, options, identity, eps = call
    inputs = formats.last(x), layer, options
    rest = None if gates is None else gates.contiguous(), identity, eps, torch.get_num_threads()
    asked = formats.last(grad), tuple(saved), wanted
    found = KERNELS.edge_backward(*inputs, tensors, *rest, *asked)
    if found is None:
        found = KERNELS.edge_backward(*inputs, _dense(tensors), *rest, *asked)
    if found is None:
        raise ValueError(f"The gradient must be a CPU tensor of {x.dtype} in the shape of the output.")
    x_grad, gates_grad, grads = found
    return None if x_grad is None else formats.first(x_grad, formats.is_channels_last(x)), gates_grad, grads


class _Edge(torch.autograd.Function):
    # The kernel has run before: `done` is its result.
    @staticmethod
    def forward(
        ctx: Any, call: _Call, done: tuple[Tensor, ...], x: Tensor, gates: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, read, statistics = done
        ctx.call = call
        ctx.save_for_backward(x, gates, read, statistics, *tensors)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return formats.first(y, formats.is_channels_last(x)), statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * count
        graph.refuse_batched(grad)
        x, gates, *rest = ctx.saved_tensors
        saved, tensors = rest[:2], tuple(rest[2:])
        wanted = graph.wanted(ctx.next_functions, gates is not None)
        x_grad, gates_grad, grads = _backward(x, gates, tensors, ctx.call, saved, grad, wanted)
        found = grads if grads else (None,) * len(tensors)
        return None, None, *once.last(_TOLD, (x_grad, gates_grad, *found), (x, gates, *tensors, grad))


def edge_function(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: _Ints,
    options: _Ints,
    identity: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The hot path of `mixed_edge`; the reference where there is no kernel for the device or type."""
    done = None
    if KERNELS is not None and x.is_cpu and x.dim() == 4:
        tensors, call = tuple(tensors), (tuple(layer), tuple(options), identity, eps)
        done = _forward(x.detach(), gates, tensors, call)
    if done is None:
        return edge_reference(x, gates, tensors, layer, options, identity, eps)
    if torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _Edge.apply(call, done, x, gates, *tensors)
        return result
    return formats.first(done[0], formats.is_channels_last(x)), done[-1]


# The operator, which also returns what backward needs: what the norms read.


@torch.library.custom_op("pynas::mixed_edge", mutates_args=())
def edge_op(
    x: Tensor,
    gates: Tensor | None,
    tensors: list[Tensor],
    layer: list[int],
    options: list[int],
    identity: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixed_edge` as a registered operator."""
    call = tuple(layer), tuple(options), identity, eps
    done = None
    if KERNELS is not None and x.is_cpu and x.dim() == 4:
        done = _forward(x, gates, tuple(tensors), call)
    if done is None:
        y, statistics = edge_reference(x, gates, tensors, *call)
        return y, statistics, x.new_empty(0)
    y, read, statistics = done
    return formats.first(y, formats.is_channels_last(x)), statistics, read


@edge_op.register_fake
def _(
    x: Tensor, gates: Tensor | None, tensors: list[Tensor], layer: list[int], options: list[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, height, width = plain.out_shape(x, layer)
    norms = plain.norms_of(options)
    shape: tuple[int, ...] = (0,)
    if KERNELS is not None and _takes(x, layer):
        lanes = KERNELS.edge_lanes()[x.dtype == torch.float64]
        shape = norms, images * height * width * (-(-channels // lanes) * lanes)
    y = formats.empty_like(x, (images, channels, height, width))
    return y, x.new_empty(2 * norms * channels), x.new_empty(shape)


@torch.library.custom_op("pynas::mixed_edge_backward", mutates_args=())
def edge_backward_op(
    x: Tensor,
    gates: Tensor | None,
    tensors: list[Tensor],
    layer: list[int],
    options: list[int],
    identity: int,
    eps: float,
    saved: list[Tensor],
    grad: Tensor,
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of x, gates and tensors as a registered operator; empty where they are not wanted."""
    call, parts = (tuple(layer), tuple(options), identity, eps), tuple(tensors)
    if saved[0].numel():
        x_grad, gates_grad, grads = _backward(x, gates, parts, call, saved, grad, wanted)
    else:
        x_grad, gates_grad, grads = _reference_grads(x, gates, parts, call, grad)
    nothing = x.new_empty(0)
    return (
        x_grad if x_grad is not None and wanted & WANTS_X else nothing,
        gates_grad if gates_grad is not None and wanted & WANTS_GATES else nothing.clone(),
        [part for part in grads if part is not None] if wanted & WANTS_WEIGHTS else [],
    )


def _reference_grads(x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call, grad: Tensor) -> _Grads:
    """Gradients of the reference."""

    def y(x: Tensor, *rest: Tensor) -> Tensor:
        places, parts = (None, rest) if gates is None else (rest[0], rest[1:])
        return edge_reference(x, places, parts, *call)[0]

    x_grad, *grads = graph.gradients_of(y, [x, *tensors] if gates is None else [x, gates, *tensors], grad)
    gates_grad = None if gates is None else grads.pop(0)
    return formats.like(x_grad, x), gates_grad, tuple(grads)


@edge_backward_op.register_fake
def _(
    x: Tensor,
    gates: Tensor | None,
    tensors: list[Tensor],
    layer: list[int],
    options: list[int],
    identity: int,
    eps: float,
    saved: list[Tensor],
    grad: Tensor,
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        formats.empty_like(x, x.shape) if wanted & WANTS_X else x.new_empty(0),
        x.new_empty(gates.shape) if gates is not None and wanted & WANTS_GATES else x.new_empty(0),
        [part.new_empty(part.shape) for part in tensors] if wanted & WANTS_WEIGHTS else [],
    )


edge_backward_op.register_autograd(once.refusal(_TOLD))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gates, tensors, *call = inputs
    _, statistics, read = output
    ctx.call = call
    ctx.save_for_backward(x, gates, read, statistics, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, gates, *rest = ctx.saved_tensors
    saved, tensors = rest[:2], rest[2:]
    needs_x, needs_gates, needs_tensors, *_ = ctx.needs_input_grad
    wanted = WANTS_X * needs_x + WANTS_GATES * needs_gates + WANTS_WEIGHTS * any(needs_tensors)
    x_grad, gates_grad, grads = edge_backward_op(x, gates, tensors, *ctx.call, saved, grad, wanted)
    found = list(grads) if wanted & WANTS_WEIGHTS else [None] * len(tensors)
    return x_grad if needs_x else None, gates_grad if needs_gates else None, found, None, None, None, None


edge_op.register_autograd(_op_backward, setup_context=_setup_context)


def update_edge_norms(statistics: Tensor, buffers: Sequence[Tensor], momentum: float, positions: int) -> None:
    """Moves running statistics as torch.nn.BatchNorm2d does, in place: the variance is made unbiased.

    Args:
        statistics: What `mixed_edge` returned.
        buffers: Running mean, running variance and number of batches of each norm.
        momentum: Share of the new statistics.
        positions: Values of a channel, at least 2.
    """
    native = KERNELS is not None and not torch.compiler.is_compiling()
    if native and KERNELS.edge_update(statistics, tuple(buffers), momentum, positions):
        return
    with torch.no_grad():
        rows = statistics.view(len(buffers) // 3, 2, -1)
        for (mean, variance), at in zip(rows, range(0, len(buffers), 3), strict=True):
            running_mean, running_variance, batches = buffers[at : at + 3]
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_variance.mul_(1 - momentum).add_(variance, alpha=momentum * positions / (positions - 1))
            batches.add_(1)


MIXED_EDGE = Kernel(
    "mixed_edge",
    edge_op,
    edge_function,
    edge_reference,
    plain.samples,
    results=2,
    same_bits=False,
    tolerance=(1e-4, 1e-5),
)
