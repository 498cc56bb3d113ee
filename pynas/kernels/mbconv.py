"""Inverted-bottleneck blocks in training, one alone or all those of a choice layer, in one call forward and one back.

States nothing new: `mbconv_reference` is the mathematics, `csrc/cpu/mbconv.h` says what makes it fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pynas.kernels import cuda, cuda_mbconv, formats, graph, once
from pynas.kernels import mbconv_reference as plain
from pynas.kernels.graph import WANTS_GATES, WANTS_WEIGHTS, WANTS_X
from pynas.kernels.kernel import Kernel
from pynas.kernels.mbconv_reference import NUMBERS, TENSORS, mbconv_reference
from pynas.kernels.native import KERNELS

_TOLD = once.told("mixed_mbconv", "pynas.kernels.mbconv.mbconv_reference")

_Ints = Sequence[int]
_Call = tuple[tuple[int, ...], tuple[int, ...], int, float]  # layer, options, identity, eps
_Saved = tuple[Tensor, ...]  # mean and covariance of x, products, statistics


def mixed_mbconv(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: Sequence[int],
    options: Sequence[int],
    identity: int = -1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Gated sum of inverted-bottleneck blocks in training mode, batch statistics included.

    A block is: 1x1 convolution - batch norm - activation - channel shuffle - depthwise convolution - batch norm -
    activation - 1x1 convolution - batch norm, plus x where stride is 1 and the channels agree. y has the memory format
    of x. Gradients flow from y to x, gates and tensors; they cannot be differentiated again.

    Source: FBNet, arXiv 1812.03443, Figure 3; MobileNetV2, arXiv 1801.04381.

    Args:
        x: (B, C, H, W), float32 or float64 for the kernel; the reference takes any floating point type.
        gates: (O,), (1, O) or (B, O) weights of the options; None takes one.
        tensors: Nine of each block: weight of the first convolution (hidden, C / groups, 1, 1), scale and shift of its
            norm; (hidden, 1, K, K) and the same; (C', hidden / groups, 1, 1) and the same.
        layer: Stride (1 or 2), C', and the activation's index in `mbconv_reference.ACTIVATIONS`.
        options: Five numbers of each block: kernel (3, 5 or 7), hidden channels, groups, its column in `gates`, and 1;
            or 0 where it is not trained: then it gives a gradient to its gate and to nothing else.
        identity: Column of the gate of x itself, which joins the sum; -1: it does not.
        eps: Of all batch norms.

    Returns:
        y (B, C', H', W'); and, flat, mean and biased variance of each block's three norms in turn, those of the first
        in the order after the shuffle.

    Raises:
        ValueError: Shapes, types or numbers make no sense, or a channel has one value (as torch).
    """
    if torch.compiler.is_compiling():
        if not _has_kernel(x, layer, options):
            return mbconv_reference(x, gates, tensors, layer, options, identity, eps)
        y, statistics, *_ = mbconv_op(x, gates, list(tensors), list(layer), list(options), identity, eps)
        return y, statistics
    return mbconv_function(x, gates, tensors, layer, options, identity, eps)


def _has_kernel(x: Tensor, layer: _Ints, options: _Ints) -> bool:
    """Whether there is a kernel for images on this device."""
    if x.dim() != 4 or len(layer) != 3 or layer[0] not in (1, 2):  # which `check` tells, and kernels divide by
        return False
    return (KERNELS is not None and x.is_cpu) or cuda_mbconv.takes(x, layer, options)


def _takes(x: Tensor, layer: _Ints) -> bool:
    """Whether the kernel can take what is sound."""
    images, _, height, width = plain.out_shape(x, layer)
    return x.is_cpu and x.dtype in (torch.float32, torch.float64) and images * height * width > 1


def _rows(gates: Tensor | None) -> Tensor | None:
    """Dense (1 or B, O): one layer's gates are often cut from those of all."""
    if gates is None:
        return None
    return (gates[None] if gates.dim() == 1 else gates).contiguous()


def _for_cuda(
    x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call
) -> tuple[Tensor, _Ints, _Ints, tuple[Tensor, ...], Tensor | None, int, float]:
    """Arguments as `cuda_mbconv` takes them."""
    layer, options, identity, eps = call
    rows = None if gates is None else _rows(cuda.dense(gates))
    images = cuda.aligned(cuda.dense(formats.last(x)))
    return images, layer, options, tuple(map(cuda.dense, tensors)), rows, identity, eps


def _forward(x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call) -> tuple[Tensor, ...] | None:
    """y as (B, H, W, C) and what backward needs; None where the reference must do it."""
    layer, options, identity, eps = call
    if cuda_mbconv.takes(x, layer, options):
        plain.check(x, gates, tensors, layer, options, identity, eps)
        return cuda_mbconv.forward(*_for_cuda(x, gates, tensors, call))
    threads, inputs = torch.get_num_threads(), (formats.last(x), layer, options)
    found = KERNELS.mbconv_forward(*inputs, tensors, _rows(gates), identity, eps, threads)
    if found is None:
        plain.check(x, gates, tensors, layer, options, identity, eps)
        if not _takes(x, layer):
            return None
        dense = tuple(tensor.contiguous() for tensor in tensors)
        found = KERNELS.mbconv_forward(*inputs, dense, _rows(gates), identity, eps, threads)
    if found is None:
        raise ValueError("mixed_mbconv takes no conjugate, negated or sparse tensors. Call .resolve_neg() first.")
    result: tuple[Tensor, ...] = found
    return result


def _backward(
    x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call, saved: _Saved, grad: Tensor, wanted: int
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of x (as dense (B, H, W, C)), gates (as rows) and tensors; empty where they are not wanted."""
    layer, options, identity, eps = call
    if cuda_mbconv.takes(x, layer, options):
        images, out, height, width = plain.out_shape(x, layer)
        if grad.dtype is not x.dtype or grad.device != x.device or grad.shape != (images, out, height, width):
            raise ValueError(f"The gradient must be {x.dtype} on {x.device} in the shape of the output.")
        return cuda_mbconv.backward(*_for_cuda(x, gates, tensors, call), cuda.dense(formats.last(grad)), saved, wanted)
    threads, inputs = torch.get_num_threads(), (formats.last(x), layer, options)
    rest = identity, eps, threads, formats.last(grad), saved, wanted
    found = KERNELS.mbconv_backward(*inputs, tensors, _rows(gates), *rest)
    if found is None:
        dense = tuple(tensor.contiguous() for tensor in tensors)
        found = KERNELS.mbconv_backward(*inputs, dense, _rows(gates), *rest)
    if found is None:
        raise ValueError(f"The gradient must be a CPU tensor of {x.dtype} in the shape of the output.")
    result: tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]] = found
    return result


class _Blocks(torch.autograd.Function):
    # The kernel has run before: `done` is its result. Tensors that are not trained are among `tensors` alone, so that
    # autograd sees no path to them.
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        tensors: tuple[Tensor, ...],
        done: tuple[Tensor, ...],
        x: Tensor,
        gates: Tensor | None,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, *saved = done
        ctx.call = call
        ctx.save_for_backward(x, gates, *saved, *tensors)
        ctx.mark_non_differentiable(saved[-1])
        ctx.set_materialize_grads(False)
        return formats.first(y, formats.is_channels_last(x)), saved[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if grad is None:
            return (None,) * count
        graph.refuse_batched(grad)
        x, gates, *rest = ctx.saved_tensors
        saved, tensors = tuple(rest[:4]), tuple(rest[4:])
        wanted = graph.wanted(ctx.next_functions, gates is not None)
        x_grad, gates_grad, grads = _backward(x, gates, tensors, ctx.call, saved, grad, wanted)
        if x_grad is not None:
            x_grad = formats.first(x_grad, formats.is_channels_last(x))
        if gates_grad is not None and gates is not None:
            gates_grad = gates_grad.view(gates.shape)
        found = _of_trained(grads, ctx.call[1]) if grads else (None,) * (count - 5)
        return None, None, None, *once.last(_TOLD, (x_grad, gates_grad, *found), (x, gates, *tensors, grad))


def _of_trained(things: Sequence[Any], options: _Ints) -> tuple[Any, ...]:
    """Those of the options that are trained."""
    if 0 not in options[4::NUMBERS]:
        return tuple(things)
    return tuple(thing for numbers, parts in plain.split(options, things) if numbers[4] for thing in parts)


def mbconv_function(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: _Ints,
    options: _Ints,
    identity: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The hot path of `mixed_mbconv`; the reference where there is no kernel for the device or type."""
    done = None
    if _has_kernel(x, layer, options):
        tensors, call = tuple(tensors), (tuple(layer), tuple(options), identity, eps)
        done = _forward(x.detach(), gates, tensors, call)
    if done is None:
        return mbconv_reference(x, gates, tensors, layer, options, identity, eps)
    if torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _Blocks.apply(call, tensors, done, x, gates, *_of_trained(tensors, options))
        return result
    return formats.first(done[0], formats.is_channels_last(x)), done[-1]


# The operator, which also returns what backward needs: mean and covariance of x, and products.

_OpResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _saved_shapes(x: Tensor, layer: _Ints, options: _Ints) -> tuple[tuple[int, ...], ...]:
    """Of mean, covariance and products; empty where the reference stands in."""
    images, out, height, width = plain.out_shape(x, layer)
    channels, count = int(x.shape[1]), len(options) // NUMBERS
    if cuda_mbconv.takes(x, layer, options):
        return (channels,), (channels, channels), (count, images * height * width, out)
    if KERNELS is None or not _takes(x, layer):
        return (0,), (0,), (0,)
    lanes = KERNELS.mbconv_lanes(channels, out)[x.dtype == torch.float64]
    return (
        (channels,),
        (channels, -(-channels // lanes) * lanes),
        (count, images * height * width, -(-out // lanes) * lanes),
    )


@torch.library.custom_op("pynas::mixed_mbconv", mutates_args=())
def mbconv_op(
    x: Tensor,
    gates: Tensor | None,
    tensors: list[Tensor],
    layer: list[int],
    options: list[int],
    identity: int,
    eps: float,
) -> _OpResult:
    """`mixed_mbconv` as a registered operator."""
    call = tuple(layer), tuple(options), identity, eps
    done = None
    if _has_kernel(x, layer, options):
        done = _forward(x, gates, tuple(tensors), call)
    if done is None:
        y, statistics = mbconv_reference(x, gates, tensors, *call)
        return y, statistics, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    y, mean, covariance, products, statistics = done
    return formats.first(y, formats.is_channels_last(x)), statistics, mean, covariance, products


@mbconv_op.register_fake
def _(
    x: Tensor, gates: Tensor | None, tensors: list[Tensor], layer: list[int], options: list[int], *rest: Any
) -> _OpResult:
    y = formats.empty_like(x, plain.out_shape(x, layer))
    mean, covariance, products = (x.new_empty(shape) for shape in _saved_shapes(x, layer, options))
    return y, x.new_empty(plain.statistics_size(layer, options)), mean, covariance, products


@torch.library.custom_op("pynas::mixed_mbconv_backward", mutates_args=())
def mbconv_backward_op(
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
    """Gradients of x, gates and trained tensors as a registered operator; empty tensors where they are not wanted."""
    call, parts = (tuple(layer), tuple(options), identity, eps), tuple(tensors)
    if saved[0].numel():
        x_grad, gates_grad, grads = _backward(x, gates, parts, call, tuple(saved), grad, wanted)
        x_grad = None if x_grad is None else formats.first(x_grad, formats.is_channels_last(x))
        gates_grad = gates_grad.view_as(gates) if gates_grad is not None and gates is not None else None
    else:
        x_grad, gates_grad, grads = _reference_grads(x, gates, parts, call, grad)
    nothing = x.new_empty(0)
    trained = _of_trained(grads, options) if wanted & WANTS_WEIGHTS else ()
    return (
        x_grad if x_grad is not None and wanted & WANTS_X else nothing,
        gates_grad if gates_grad is not None and wanted & WANTS_GATES else nothing.clone(),
        list(trained),
    )


def _reference_grads(
    x: Tensor, gates: Tensor | None, tensors: tuple[Tensor, ...], call: _Call, grad: Tensor
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Gradients of the reference."""
    inputs = [x, *tensors] if gates is None else [x, gates, *tensors]

    def y(x: Tensor, *rest: Tensor) -> Tensor:
        columns, parts = (None, rest) if gates is None else (rest[0], rest[1:])
        return mbconv_reference(x, columns, parts, *call)[0]

    x_grad, *grads = graph.gradients_of(y, inputs, grad)
    gates_grad = None if gates is None else grads.pop(0)
    return formats.like(x_grad, x), gates_grad, tuple(grads)


@mbconv_backward_op.register_fake
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
    trained = _of_trained(tensors, options) if wanted & WANTS_WEIGHTS else ()
    return (
        formats.empty_like(x, x.shape) if wanted & WANTS_X else x.new_empty(0),
        x.new_empty(gates.shape) if gates is not None and wanted & WANTS_GATES else x.new_empty(0),
        [part.new_empty(part.shape) for part in trained],
    )


mbconv_backward_op.register_autograd(once.refusal(_TOLD))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _OpResult) -> None:
    x, gates, tensors, *call = inputs
    _, statistics, *saved = output
    ctx.call = call
    ctx.save_for_backward(x, gates, *saved, statistics, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, gates, *rest = ctx.saved_tensors
    saved, tensors = rest[:4], rest[4:]
    needs_x, needs_gates, needs_tensors, *_ = ctx.needs_input_grad
    wanted = WANTS_X * needs_x + WANTS_GATES * needs_gates + WANTS_WEIGHTS * any(needs_tensors)
    x_grad, gates_grad, trained = mbconv_backward_op(x, gates, tensors, *ctx.call, saved, grad, wanted)
    given, options = iter(trained), ctx.call[1]
    grads = [
        next(given) if wanted & WANTS_WEIGHTS and options[NUMBERS * (i // TENSORS) + 4] else None
        for i in range(len(tensors))
    ]
    return x_grad if needs_x else None, gates_grad if needs_gates else None, grads, None, None, None, None


mbconv_op.register_autograd(_op_backward, setup_context=_setup_context)

MIXED_MBCONV = Kernel(
    "mixed_mbconv",
    mbconv_op,
    mbconv_function,
    mbconv_reference,
    plain.samples,
    results=2,
    same_bits=False,
    tolerance=(1e-4, 1e-5),
)
