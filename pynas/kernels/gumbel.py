"""Gumbel-softmax gates of all layers in one call: noise, gates, choice, its log-probability, expected cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pynas.kernels import cuda_sampling, noise, once
from pynas.kernels.kernel import Kernel
from pynas.kernels.native import KERNELS

MOST_OPTIONS = 256  # kMostOptions of csrc/cpu/gumbel.h; a test compares them
_TOLD = once.told("gumbel_gates", "pynas.kernels.gumbel.gumbel_reference")
_TAUS = (1e-30, 1e30)  # beyond, float32 divides by 0 or infinity; kLeastTau and kMostTau there

_Call = tuple[Tensor, Tensor, Tensor, float, int, int, int]  # theta, mask, cost, tau, seed, step, draws
_Result = tuple[Tensor, Tensor, Tensor, Tensor]  # soft, index, log_prob, expected cost


class GumbelGates(NamedTuple):
    """What `gumbel_gates` returns for D draws, L layers and O options.

    Args:
        soft: (D, L, O) gates: softmax((theta + noise) / tau) over the allowed options, exactly 0 elsewhere.
        index: (D, L) int64, the chosen option argmax(theta + noise): a sample of softmax(theta).
        log_prob: (D, L), log softmax(theta) at index.
        cost: (D,), sum of soft * cost.
    """

    soft: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    log_prob: Tensor
    cost: Tensor


def gumbel_gates(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: float, seed: int, step: int, draws: int = 1
) -> GumbelGates:
    """Draws Gumbel-softmax gates for all layers of a space.

    The noise is a function of (seed, step, draw, layer, option) alone: the same on every instruction set, device and
    number of threads. It is a constant for autograd. Gradients flow to theta from soft, log_prob and cost, and to cost
    from cost; they cannot be differentiated again.

    Source: Jang et al., arXiv 1611.01144, eq. 2; FBNet, arXiv 1812.03443, eq. 6 and 7.

    Args:
        theta: (L, O) logits, float32 or float64.
        mask: (L, O) bool, True where the layer has the option.
        cost: (L, O), dtype of theta, cost of each option; ignored where mask is False.
        tau: Temperature, 1e-30 .. 1e30.
        seed: 0 .. 2^63 - 1.
        step: 0 .. 2^56 - 1; another step gives fresh noise.
        draws: How many independent draws.

    Raises:
        ValueError: Shapes or dtypes disagree, a number is out of range, a layer has no allowed option, or theta or cost
            of an allowed option is not finite. On a GPU values are not looked at, which would wait for it: such a layer
            has NaN instead.
    """
    if torch.compiler.is_compiling():
        # As a tensor, tau can change without a recompilation; so can step, which stays a symbol.
        heat = tau * torch.ones((), dtype=torch.float64, device="cpu")
        return GumbelGates(*gumbel_op(theta, mask, cost, heat, seed, step, draws))
    return GumbelGates(*gumbel_function(theta, mask, cost, tau, seed, step, draws))


def gumbel_reference(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: float | Tensor, seed: int, step: int, draws: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States `gumbel_gates` in plain PyTorch, for any device and any order of derivative."""
    _check(theta, mask, cost, tau, seed, step, draws)
    _check_values(theta, mask, cost)
    layers, options = theta.shape
    index = torch.arange(draws, device=theta.device)
    words = noise.random_words(noise.Domain.GUMBEL, seed, step, index, options, layers)
    gumbel = noise.gumbel(words).transpose(1, 2).to(theta.dtype)
    noisy = (theta + gumbel).masked_fill(~mask, -torch.inf)
    soft = torch.softmax(noisy / tau, -1)
    chosen = noisy.argmax(-1)
    log_p = torch.log_softmax(theta.masked_fill(~mask, -torch.inf), -1).expand_as(soft)
    log_prob = log_p.gather(-1, chosen[..., None]).squeeze(-1)
    return soft, chosen, log_prob, (soft * cost.masked_fill(~mask, 0)).sum((-2, -1))


def _check(theta: Tensor, mask: Tensor, cost: Tensor, tau: float | Tensor, seed: int, step: int, draws: int) -> None:
    shape = theta.shape
    if len(shape) != 2 or mask.shape != shape or cost.shape != shape:
        raise ValueError(
            f"theta, mask and cost must have one shape (layers, options), "
            f"got {tuple(shape)}, {tuple(mask.shape)} and {tuple(cost.shape)}."
        )
    if not 1 <= shape[1] <= MOST_OPTIONS or shape[0] >= noise.LAYERS:
        raise ValueError(f"theta has shape {tuple(shape)}; 1 to {MOST_OPTIONS} options and < 2^18 layers are possible.")
    dtype = theta.dtype
    if (dtype is not torch.float32 and dtype is not torch.float64) or cost.dtype is not dtype:
        raise ValueError(f"theta and cost must both be float32 or both float64, got {dtype} and {cost.dtype}.")
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}. Try mask.bool().")
    if not theta.device == mask.device == cost.device:
        raise ValueError(f"theta, mask and cost are on {theta.device}, {mask.device} and {cost.device}; one is needed.")
    if not _TAUS[0] <= tau <= _TAUS[1]:
        raise ValueError(f"tau is {float(tau)}; it must be a finite number > 0, from 1e-30 to 1e30.")
    if not 1 <= draws <= noise.INDICES:
        raise ValueError(f"draws is {draws}; it must be in 1 .. 2^32.")
    noise.check_stream(seed, step)


def _check_values(theta: Tensor, mask: Tensor, cost: Tensor) -> None:
    """Raises ValueError that names the first layer whose values make no sense."""
    closed = ~mask.any(-1)
    for name, bad, advice in (
        ("mask", closed, "allows no option. Allow at least one"),
        ("theta", (mask & ~theta.isfinite()).any(-1), "is not finite. Has the search diverged? Lower its step size"),
        ("cost", (mask & ~cost.isfinite()).any(-1), "is not finite for an allowed option"),
    ):
        if bad.any():
            raise ValueError(f"{name} of layer {int(bad.int().argmax())} {advice}.")


def _forward(call: _Call) -> tuple[_Call, _Result]:
    """Calls the kernel, which returns None where it cannot work with the arguments as they are.

    Returns:
        The arguments, with copies of tensors that are not dense; the results.
    """
    result: _Result | None = KERNELS.gumbel_forward(*call)
    if result is None:
        _check(*call)
        call = call[0].contiguous(), call[1].contiguous(), call[2].contiguous(), *call[3:]
        result = KERNELS.gumbel_forward(*call)
    if result is None:
        _check_values(*call[:3])
        raise ValueError("theta, mask or cost changed while gumbel_gates was reading them.")
    return call, result


def _cuda_forward(call: _Call) -> tuple[_Call, _Result]:
    theta, mask, cost, tau, seed, step, draws = call
    return call, cuda_sampling.gumbel_forward(theta.detach(), mask, cost.detach(), tau, seed, step, draws)


def _backward(call: _Call, grads: tuple[Tensor | None, ...], wants_cost: bool) -> tuple[Tensor, Tensor | None]:
    """Calls the kernel for the gradients of theta and cost.

    Args:
        call: What `_forward` returned.
        grads: Of soft, log_prob and the expected cost; None stands for zeros.
        wants_cost: Whether the gradient of cost is wanted.
    """
    if cuda_sampling.takes_gates(call[0]):
        return cuda_sampling.gumbel_backward(*call, grads, wants_cost)
    result: tuple[Tensor, Tensor | None] | None = KERNELS.gumbel_backward(*call, *grads, wants_cost)
    if result is None:
        dense = [None if grad is None else grad.contiguous() for grad in grads]
        result = KERNELS.gumbel_backward(*call, *dense, wants_cost)
    if result is None:
        raise ValueError(f"The gradients must be dense CPU tensors of {call[0].dtype} in the shapes of the outputs.")
    return result


class _Gates(torch.autograd.Function):
    # A step is some 40 us of autograd around 4 us of kernel. So the kernel runs outside: `apply` takes longer over more
    # inputs and outputs, and index needs none of it. What has no gradient comes in one tuple; the backward kernel draws
    # the gates again, so that none is saved; and inputs are kept as plain attributes with their versions checked by
    # hand, because save_for_backward takes longer than the kernel.
    @staticmethod
    def forward(ctx: Any, theta: Tensor, cost: Tensor, done: tuple[_Call, _Result]) -> tuple[Tensor, ...]:
        call, (soft, _, log_prob, expected) = done
        version = theta._version + call[1]._version + cost._version  # none of them ever falls
        ctx.inputs = call, version
        ctx.set_materialize_grads(False)
        return soft, log_prob, expected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, version = ctx.inputs
        theta, mask, cost, *_ = call
        if theta._version + mask._version + cost._version != version:
            raise RuntimeError(
                "theta, mask or cost was changed in place between gumbel_gates and backward(). "
                "Call backward() first, or change a copy."
            )
        found = _backward(call, grads, ctx.needs_input_grad[1])
        return *once.last(_TOLD, found, (theta, cost, *grads)), None


def gumbel_function(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: float | Tensor, seed: int, step: int, draws: int = 1
) -> _Result:
    """The hot path of `gumbel_gates`; the reference where there is no kernel for the device."""
    tau = float(tau)
    if cuda_sampling.takes_gates(theta):
        _check(theta, mask, cost, tau, seed, step, draws)
        return _with_gradient((theta, mask, cost, tau, seed, step, draws), _cuda_forward)
    if KERNELS is None or not (theta.is_cpu and mask.is_cpu and cost.is_cpu):
        return gumbel_reference(theta, mask, cost, tau, seed, step, draws)
    return _with_gradient((theta, mask, cost, tau, seed, step, draws), _forward)


def _with_gradient(call: _Call, forward: Callable[[_Call], tuple[_Call, _Result]]) -> _Result:
    theta, _, cost, *_ = call
    call, result = forward(call)
    if torch.is_grad_enabled() and (theta.requires_grad or cost.requires_grad):
        soft, log_prob, expected = _Gates.apply(call[0], call[2], (call, result))
        return soft, result[1], log_prob, expected
    return result


@torch.library.custom_op("pynas::gumbel_gates", mutates_args=())
def gumbel_op(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: Tensor, seed: int, step: int, draws: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gumbel_gates` as a registered operator, with tau as a tensor without dimensions."""
    return gumbel_function(theta, mask, cost, tau, seed, step, draws)


@gumbel_op.register_fake
def _(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: Tensor, seed: int, step: int, draws: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, options = theta.shape
    return (
        theta.new_empty(draws, layers, options),
        theta.new_empty(draws, layers, dtype=torch.int64),
        theta.new_empty(draws, layers),
        theta.new_empty(draws),
    )


@torch.library.custom_op("pynas::gumbel_gates_backward", mutates_args=())
def gumbel_backward_op(
    theta: Tensor,
    mask: Tensor,
    cost: Tensor,
    tau: Tensor,
    seed: int,
    step: int,
    soft_grad: Tensor,
    log_prob_grad: Tensor,
    cost_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of theta and cost as a registered operator, so that compiled graphs can hold the backward pass."""
    draws, grads_in = len(cost_grad), (soft_grad, log_prob_grad, cost_grad)
    _check(theta, mask, cost, tau, seed, step, draws)
    shapes = [(draws, *theta.shape), (draws, len(theta)), (draws,)]
    if any(grad.shape != shape or grad.dtype != theta.dtype for grad, shape in zip(grads_in, shapes, strict=True)):
        raise ValueError(f"The gradients must be {theta.dtype} of shapes {shapes}.")
    if (KERNELS is not None and theta.is_cpu) or cuda_sampling.takes_gates(theta):
        dense = theta.contiguous(), mask.contiguous(), cost.contiguous()
        grads = _backward((*dense, float(tau), seed, step, draws), grads_in, wants_cost=True)
        return cast(tuple[Tensor, Tensor], grads)
    soft, index, _, _ = gumbel_reference(theta, mask, cost, tau, seed, step, draws)
    total = (soft_grad + cost_grad[:, None, None] * cost).masked_fill(~mask, 0)
    through_soft = soft * (total - (soft * total).sum(-1, keepdim=True)) / tau
    chosen = torch.zeros_like(soft).scatter_(-1, index[..., None], 1.0)
    p = torch.softmax(theta.masked_fill(~mask, -torch.inf), -1)
    theta_grad = through_soft + log_prob_grad[..., None] * (chosen - p)
    return theta_grad.sum(0), (soft * cost_grad[:, None, None]).sum(0)


@gumbel_backward_op.register_fake
def _(theta: Tensor, mask: Tensor, cost: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(theta), torch.empty_like(cost)


gumbel_backward_op.register_autograd(once.refusal(_TOLD))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    theta, mask, cost, tau, ctx.seed, ctx.step, _ = inputs
    ctx.save_for_backward(theta, mask, cost, tau)


def _op_backward(ctx: Any, soft_grad: Tensor, _: Tensor, log_prob_grad: Tensor, cost_grad: Tensor) -> tuple[Any, ...]:
    inputs = *ctx.saved_tensors, ctx.seed, ctx.step
    theta_out, cost_out = gumbel_backward_op(*inputs, soft_grad, log_prob_grad, cost_grad)
    return theta_out, None, cost_out, None, None, None, None


gumbel_op.register_autograd(_op_backward, setup_context=_setup_context)


def _samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """FBNet's 22 x 9, one option, uneven layers, more layers than one run of the kernel holds, several draws."""
    samples: list[tuple[Any, ...]] = []
    for layers, options, tau, draws in ((22, 9, 5.0, 1), (3, 1, 1.0, 2), (5, 7, 0.3, 3), (70, 17, 1.0, 1)):
        generator = torch.Generator().manual_seed(layers)
        theta = torch.randn(layers, options, generator=generator, dtype=dtype).to(device).requires_grad_()
        cost = torch.rand(layers, options, generator=generator, dtype=dtype).to(device).requires_grad_()
        mask = torch.rand(layers, options, generator=generator) < 0.7
        mask[:, -1] |= ~mask.any(-1)
        heat = torch.tensor(tau, dtype=torch.float64)
        samples.append((theta, mask.to(device), cost, heat, 2026, layers, draws))
    return samples


GUMBEL_GATES = Kernel("gumbel_gates", gumbel_op, gumbel_function, gumbel_reference, _samples)
