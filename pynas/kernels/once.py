"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def told(name: str, reference: str) -> str:
    """The error of a second derivative.

    Args:
        name: Of the kernel.
        reference: Where its plain PyTorch is, which can be differentiated as often as one likes.
    """
    return f"{name} cannot be differentiated twice. For second derivatives call {reference}, which is plain PyTorch."


def refusal(text: str) -> Callable[..., None]:
    """A backward function that only raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(text)

    return refuse


def last(text: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Passes gradients on; where the caller keeps a graph of this backward pass, ties them to what they depend on.

    So every second derivative meets the error. `torch.autograd.function.once_differentiable` does not do it: where an
    input is also reached on another path, it lets torch.autograd.grad return that path's share alone.

    Args:
        text: Of the error.
        grads: What backward returns.
        sources: Inputs of forward and of backward.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    given = [grad for grad in grads if grad is not None]
    tied = iter(_Last.apply(text, len(given), *given, *sources)) if given else iter(())
    return [None if grad is None else next(tied) for grad in grads]


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.text = text
        return tuple(grad.clone() for grad in tensors[:count] if grad is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.text)
