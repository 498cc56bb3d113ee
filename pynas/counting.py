"""Sizes of a network as mobile papers state them: parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# What convolutions of any dimension and linear layers call in the end. Products of two activations are `bmm` or
# `scaled_dot_product_attention`, which stay out.
_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
# Torch runs these as one operation whose multiply-adds the counter cannot see: an error beats a number too small.
_UNSEEN = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Counts:
    """Sizes of a network.

    Args:
        params: All parameters, with scale and shift of batch norms, without running statistics; shared ones once.
        macs: Multiply-adds of convolutions and linear layers for one image. Biases, batch norms, activations, pooling
            and additions count nothing.
    """

    params: int
    macs: int


def count(net: nn.Module, input_shape: Sequence[int]) -> Counts:
    """Counts parameters, and multiply-adds by running one image through `net` in eval mode.

    `torch.utils.flop_counter` sees the operations below modules, so functional calls count too; it counts two per
    multiply-add. `net` comes back as it was: training flags, running statistics and gradients.

    Args:
        net: Any module that takes one batch of images.
        input_shape: (channels, height, width) of one image.

    Raises:
        ValueError: `input_shape` is no such triple; `net` fails on it (wrong number of channels, too small); or it
            has recurrent or attention layers, which the counter does not see.

    >>> count(nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 10, 10))
    Counts(params=216, macs=21600)
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"count takes a torch.nn.Module, not {type(net).__name__}.")
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else (input_shape,)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"input_shape is (channels, height, width) of one image, such as (3, 224, 224), not {shape}.")
    for name, module in net.named_modules():
        if isinstance(module, _UNSEEN):
            raise ValueError(f"Cannot count layer {name!r}: {type(module).__name__} runs as one fused operation.")
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False)
    try:
        with _evaluating(net), torch.no_grad(), counter:
            net(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The net fails on one image of shape {shape}: {reason}. Give the input_shape that it was built for."
        ) from error
    flops = counter.get_flop_counts().get("Global", {})  # no entry at all without a counted layer
    return Counts(
        params=sum(parameter.numel() for parameter in net.parameters()),
        macs=sum(flops.get(layer, 0) for layer in _LAYERS) // 2,
    )


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then every module gets its own flag back (some may have been frozen one by one)."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
