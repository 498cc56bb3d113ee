"""Kernels of parallel and sequential linear branches as kernels of one convolution: exact algebra, differentiable.

The rules are those of RepVGG, ACNet and Diverse Branch Block, on which RepNAS (arXiv 2109.03508) builds. Groups are
everywhere: a kernel has shape (out_channels, in_channels / groups, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def centred(kernel: Tensor, size: int) -> Tensor:
    """A kernel (O, I, H, W) with odd H and W in the middle of zeros, (O, I, size, size)."""
    down, right = (size - kernel.shape[-2]) // 2, (size - kernel.shape[-1]) // 2
    return functional.pad(kernel, (right, right, down, down))


def centre_slice(kernel: Tensor, height: int, width: int) -> Tensor:
    """The middle of a kernel, (O, I, K, K) -> (O, I, height, width): RepNAS's weight sharing.

    Rows [K/2] - [height/2] to [K/2] + [height/2], both included, and columns likewise. A view, so the gradient of the
    whole kernel is the sum of its slices' gradients.
    """
    size = kernel.shape[-1]
    top, left = size // 2 - height // 2, size // 2 - width // 2
    return kernel[:, :, top : top + height, left : left + width]


def identity_kernel(channels: int, groups: int, size: int = 1, *, like: Tensor) -> Tensor:
    """The kernel (channels, channels / groups, size, size) of the convolution that changes nothing."""
    kernel = torch.zeros(channels, channels // groups, size, size, dtype=like.dtype, device=like.device)
    place = torch.arange(channels, device=like.device)
    kernel[place, place % (channels // groups), size // 2, size // 2] = 1.0
    return kernel


def average_kernel(channels: int, groups: int, size: int, *, like: Tensor) -> Tensor:
    """The kernel of an average pool that counts its padding: 1 / size^2 everywhere on a channel's own plane."""
    kernel = identity_kernel(channels, groups, like=like) / size**2
    return kernel.expand(-1, -1, size, size)


def chained(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """The kernel of a 1x1 convolution followed by another one.

    Args:
        first: (M, I / groups, 1, 1).
        second: (O, M / groups, K, K).
        groups: Of both.

    Returns:
        (O, I / groups, K, K), W[o, i] = sum over m of second[o, m] * first[m, i] within each group.
    """
    outer = second.unflatten(0, (groups, -1))  # (g, O/g, M/g, K, K)
    inner = first.flatten(1).unflatten(0, (groups, -1))  # (g, M/g, I/g)
    return torch.einsum("gomhw,gmi->goihw", outer, inner).flatten(0, 1)


def chained_bias(bias: Tensor, second: Tensor, groups: int) -> Tensor:
    """What a constant (M,) that comes out of the first convolution adds behind the second, (O,)."""
    sums = second.sum((2, 3)).unflatten(0, (groups, -1))  # (g, O/g, M/g)
    return torch.einsum("gom,gm->go", sums, bias.unflatten(0, (groups, -1))).flatten()
