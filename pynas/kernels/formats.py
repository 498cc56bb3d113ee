"""Images in torch's order of dimensions, and as kernels want them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether images lie with channels last in memory; what is made of them is to lie likewise."""
    return x.is_contiguous(memory_format=torch.channels_last)


def last(x: Tensor) -> Tensor:
    """(B, C, H, W) as dense (B, H, W, C)."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def first(y: Tensor, channels_last: bool) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in a memory format. In no case a view for autograd."""
    y = y.permute(0, 3, 1, 2)
    return y.data if channels_last else y.contiguous().data


def like(y: Tensor, x: Tensor) -> Tensor:
    """Images in the memory format of others."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Images of a shape in the memory format of others, not initialised."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
