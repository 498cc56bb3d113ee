"""All running branches of a block as one convolution in training, with exact batch statistics: the plain reference.

Every branch is one K x K kernel of the zero-padded input but for constants, so the mean and the variance of its output
over the batch follow from the mean and the covariance of the input's K x K patches (its autocorrelation at the shifts
of a (2K - 1) x (2K - 1) window, with the borders cut off): mean K m, variance K C K'. So no branch is computed, nothing
but their kernels is summed, and one convolution gives what all of them would have, with all gradients.

Two things are added to that. The batch norm in the middle of a sequential branch needs mean and covariance of single
pixels. And its border, which holds what *running* statistics make of zero while the inside has the batch's, adds
a constant map to the branch, whose covariance with the rest follows from the mean patch of every place.

This says what `fast_merge` computes with a kernel, and is slower than the branches one by one: use it to check that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pynas.merge import chained_bias
from pynas.ops.branches import Affine, Branch, Sequential, border


@dataclass(frozen=True)
class Moments:
    """What a batch says about every linear function of its patches.

    Args:
        mean: Of a patch, (groups, D) with D = channels / groups * K^2.
        covariance: Of its entries within a group, (groups, D, D).
        places: Mean over the images of the patch at every place of the output, less `mean`, (groups, D, H' * W').
        count: Patches.
    """

    mean: Tensor
    covariance: Tensor
    places: Tensor
    count: int

    @staticmethod
    def of(x: Tensor, kernel: int, stride: int, groups: int) -> Moments:
        """Of a batch (B, C, H, W) with zero padding kernel // 2."""
        patches = functional.unfold(x, kernel, padding=kernel // 2, stride=stride)  # (B, C K^2, L)
        patches = patches.unflatten(1, (groups, -1))
        mean = patches.mean((0, 3))
        centred = patches - mean[None, :, :, None]
        count = patches.shape[0] * patches.shape[3]
        covariance = torch.einsum("bgil,bgjl->gij", centred, centred) / count
        return Moments(mean, covariance, centred.mean(0), count)

    def through(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (O,), of the convolution by a kernel (O, I / groups, K, K)."""
        rows = self._rows(kernel)
        mean = torch.einsum("god,gd->go", rows, self.mean)
        variance = torch.einsum("goi,gij,goj->go", rows, self.covariance, rows)
        return mean.flatten(), variance.flatten()

    def at_places(self, kernel: Tensor) -> Tensor:
        """Mean over the images of the convolution at every place, less its mean, (O, H' * W')."""
        found: Tensor = torch.einsum("god,gdl->gol", self._rows(kernel), self.places).flatten(0, 1)
        return found

    def _rows(self, kernel: Tensor) -> Tensor:
        rows: Tensor = kernel.flatten(1).unflatten(0, (len(self.mean), -1))
        return rows


def merged_sum(x: Tensor, running: Sequence[tuple[Branch, Tensor | None]], kernel: Tensor | None) -> Tensor:
    """Sum of the outputs of some branches of a block, each times its gate: (B, in, S, S) -> (B, out, S', S').

    Equals the branches one by one up to rounding, in training (where running statistics move likewise) and in eval
    mode, with gradients for the input, all weights and all gates.

    Args:
        x: Input.
        running: The branches, at least one, of the same block; each with its gate, a scalar, or none.
        kernel: Of the block, where weights are shared.
    """
    first = running[0][0]
    size: int = first.size  # type: ignore[assignment]
    stride, groups = first.spec.stride, _groups(running)
    training = first.training
    patches = Moments.of(x, size, stride, groups) if training else None
    pixels = Moments.of(x, 1, 1, groups) if training else None
    weight = bias = edge = None
    for branch, gate in running:
        part, norm, map_ = _branch(x, branch, kernel, patches, pixels)
        scale, shift = (norm.scale, norm.shift) if gate is None else (norm.scale * gate, norm.shift * gate)
        weight = _plus(weight, part * scale[:, None, None, None])
        bias = _plus(bias, shift)
        if map_ is not None:
            edge = _plus(edge, map_ * scale[:, None, None])
    assert weight is not None
    y = functional.conv2d(x, weight, bias, stride, size // 2, 1, groups)
    return y if edge is None else y + edge


def _branch(
    x: Tensor, branch: Branch, kernel: Tensor | None, patches: Moments | None, pixels: Moments | None
) -> tuple[Tensor, Affine, Tensor | None]:
    """Kernel of a branch, its last batch norm with the constants before it, and what its border adds before it."""
    weights = branch.weights(kernel)
    if not isinstance(branch, Sequential):
        part = branch.merged(weights, None)
        return part, _last(branch.bn, part, None, None, patches), None
    inner = _norm(branch.bn_inner, *_statistics(branch.bn_inner, branch.first(weights), pixels), pixels)
    part = branch.merged(weights, inner)
    constant = chained_bias(inner.shift, branch.second(weights), branch.spec.groups)
    if patches is None:
        return part, _last(branch.bn, part, constant, None, patches), None
    value = Affine.running(branch.bn_inner).shift - inner.shift
    edge = branch.outer(border(x.shape[-2:], value, branch.size // 2)[None], weights)[0]
    return part, _last(branch.bn, part, constant, edge, patches), edge


def _last(
    bn: nn.BatchNorm2d, kernel: Tensor, constant: Tensor | None, edge: Tensor | None, patches: Moments | None
) -> Affine:
    """The last batch norm, applied to the convolution by `kernel` plus a constant (O,) plus a map (O, H', W')."""
    mean, variance = _statistics(bn, kernel, patches)
    if patches is not None and constant is not None:
        mean = mean + constant
    if patches is not None and edge is not None:
        flat = edge.flatten(1)
        middle = flat.mean(1)
        away = flat - middle[:, None]
        mean = mean + middle
        variance = variance + 2 * (patches.at_places(kernel) * away).mean(1) + away.square().mean(1)
    norm = _norm(bn, mean, variance, patches)
    return norm if constant is None else Affine(norm.scale, norm.shift + norm.scale * constant)


def _statistics(bn: nn.BatchNorm2d, kernel: Tensor, batch: Moments | None) -> tuple[Tensor, Tensor]:
    if batch is not None:
        return batch.through(kernel)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return bn.running_mean, bn.running_var


def _norm(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, batch: Moments | None) -> Affine:
    """The batch norm with these statistics; in training, running ones move towards them as torch's would."""
    if batch is not None:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert bn.num_batches_tracked is not None
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
            momentum = 1 / int(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
            unbiased = variance * (batch.count / max(1, batch.count - 1))
            bn.running_var.lerp_(unbiased.to(bn.running_var.dtype), momentum)
    return Affine.of(bn, mean, variance)


def _groups(running: Sequence[tuple[Branch, Tensor | None]]) -> int:
    """Of the block; a batch norm alone has none of its own."""
    return max(getattr(branch, "groups", branch.spec.groups) for branch, _ in running)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
