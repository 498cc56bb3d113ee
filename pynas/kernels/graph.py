"""What a kernel's backward pass asks autograd: who waits for which gradient, and whether it can give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WANTS_X, WANTS_GATES, WANTS_WEIGHTS = 1, 2, 4  # Wanted of csrc/mbconv_binding.cpp and csrc/edge_binding.cpp

# Tells whether the running backward pass comes to a node: `backward(inputs=...)` leaves the others out, and
# `needs_input_grad` does not know of it.
_will_execute: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def _executes(node: Any) -> bool:
    if node is None:
        return False
    try:
        return _will_execute(node)
    except RuntimeError:  # torch does not say it of the leaves of torch.autograd.grad
        return True


def wanted(nodes: Iterable[tuple[Any, int]], gates: bool) -> int:
    """Which gradients someone waits for. `nodes` are those before x, the gates where there are some, and weights."""
    x, *others = (node for node, _ in nodes)
    found = WANTS_X * _executes(x)
    if gates:
        found |= WANTS_GATES * _executes(others.pop(0))
    return found | WANTS_WEIGHTS * any(map(_executes, others))


def refuse_batched(grad: Tensor) -> None:
    """Raises RuntimeError for a batch of gradients, which kernels cannot take."""
    if "Batched" in str(torch._C._dispatch_keys(grad)):
        raise RuntimeError(
            "The fused kernel takes one gradient at a time, not a batch of them (is_grads_batched, vectorize). "
            "Use kernels='reference' for that."
        )


def gradients_of(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of plain PyTorch below autograd, where an operator runs: only functions of functions can be
    differentiated there."""
    pulled: Any = torch.func.vjp(function, *inputs)
    return [part.clone() for part in pulled[1](grad)]
