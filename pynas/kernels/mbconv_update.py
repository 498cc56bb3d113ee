"""Running averages of batch norms whose batch statistics a kernel has found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pynas.kernels import cuda_mbconv
from pynas.kernels.mbconv_reference import split
from pynas.kernels.native import KERNELS


def update_norms(
    layer: tuple[int, ...],
    options: tuple[int, ...],
    statistics: Tensor,
    buffers: tuple[Tensor, ...],
    momentum: float,
    in_positions: int,
    out_positions: int,
) -> None:
    """Moves running statistics as torch.nn.BatchNorm2d does, in place: the variance is made unbiased.

    Args:
        layer: As in `mixed_mbconv`.
        options: As there.
        statistics: What it returned.
        buffers: Running mean, running variance and number of batches of the three norms of each option.
        momentum: Share of the new statistics.
        in_positions: Values of a channel in the first norm, at least 2.
        out_positions: Those in the others, at least 2.
    """
    counts = momentum, in_positions, out_positions
    if not torch.compiler.is_compiling():
        if cuda_mbconv.update(layer, options, statistics, buffers, *counts):
            return
        if KERNELS is not None and KERNELS.mbconv_update(layer, options, statistics, buffers, *counts):
            return
    with torch.no_grad():
        _in_torch(layer, options, statistics, buffers, momentum, in_positions, out_positions)


def _in_torch(
    layer: Sequence[int],
    options: Sequence[int],
    statistics: Tensor,
    buffers: Sequence[Tensor],
    momentum: float,
    in_positions: int,
    out_positions: int,
) -> None:
    at = 0
    for (_, hidden, groups, _, _), parts in split(options, buffers):
        for norm, channels in enumerate((hidden, hidden, layer[1])):
            mean, variance = statistics[at : at + 2 * channels].view(2, channels)
            at += 2 * channels
            if norm == 0:  # undo the shuffle
                mean, variance = (part.view(-1, groups).t().flatten() for part in (mean, variance))
            positions = out_positions if norm else in_positions
            running_mean, running_variance, batches = parts[3 * norm : 3 * norm + 3]
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_variance.mul_(1 - momentum).add_(variance, alpha=momentum * positions / (positions - 1))
            batches.add_(1)
