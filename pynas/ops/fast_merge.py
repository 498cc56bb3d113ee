"""Branches of a block as one convolution in training, with the batch statistics of every branch from a kernel.

`pynas.ops.moments` says the mathematics. Here the moments of 3x3 patches come from `pynas.kernels.patches`, and the
small algebra goes over all branches at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pynas.kernels import formats, setting
from pynas.kernels.native import KERNELS
from pynas.kernels.patches import PLACES, patch_moments
from pynas.merge import chained_bias
from pynas.ops import branches as kinds
from pynas.ops.branches import Affine, Branch, border
from pynas.ops.watch import HOOKS, ordinary

Running = Sequence[tuple[Branch, Tensor | None]]

# One convolution is faster than this many branches, up to so many channels, for inputs of so many values: see
# `bench/bench_branches.py`.
_FEWEST_BRANCHES, _MOST_CHANNELS, _FEWEST_VALUES = 5, 64, 2**18


def merges(x: Tensor, running: Running) -> bool:
    """Whether these branches run as one convolution on the CPU in training: by shape and number, or as it is set."""
    first = running[0][0]
    spec, asked = first.spec, setting.current()
    if KERNELS is None or asked == "reference" or not first.training or torch.compiler.is_compiling():
        return False
    if getattr(first, "size", 0) != 3 or spec.stride != 1 or _groups(running) != 1 or not ordinary(x, None):
        return False
    if not x.is_cpu or x.shape[1] != spec.in_channels or not all(_usual(branch) for branch, _ in running):
        return False
    if asked == "fused":
        return True
    wide = max(spec.in_channels, spec.out_channels)
    return len(running) >= _FEWEST_BRANCHES and wide <= _MOST_CHANNELS and x.numel() >= _FEWEST_VALUES


def _usual(branch: Branch) -> bool:
    """Whether its norms are in training mode, and nobody watches its modules."""
    norms = [branch.bn, branch.bn_inner] if isinstance(branch, kinds.Sequential) else [branch.bn]
    plain = all(n.training and n.affine and n.track_running_stats and n.momentum is not None for n in norms)
    return plain and not any(getattr(module, name) for module in (branch, *norms) for name in HOOKS)


def _groups(running: Running) -> int:
    """Of the block; a batch norm alone has none of its own."""
    return max(getattr(branch, "groups", branch.spec.groups) for branch, _ in running)


class _Quadratic(torch.autograd.Function):
    """r' C r of every row r, for a symmetric C: (R, D), (D, D) -> (R,). Autograd would take one product more back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, covariance: Tensor) -> Tensor:
        through = rows @ covariance
        ctx.save_for_backward(rows, through)
        return (through * rows).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, through = ctx.saved_tensors
        weighted = rows * grad[:, None]
        return through * (2 * grad[:, None]), rows.t() @ weighted if ctx.needs_input_grad[1] else None


class _Batch:
    """Moments of a batch of images.

    Args:
        x: (B, C, H, W).
    """

    def __init__(self, x: Tensor) -> None:
        images, channels, height, width = x.shape
        self.size, self.count = x.shape[2:], images * height * width
        self.mean, self.covariance, self.image = patch_moments(x)
        middle = slice(PLACES // 2 * channels, (PLACES // 2 + 1) * channels)
        self.pixel_mean, self.pixel_covariance = self.mean[middle], self.covariance[middle, middle]
        self._moved: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []

    def inner(self, branch: kinds.Sequential, first: Tensor) -> Affine:
        """The batch norm in the middle of a branch, behind its 1x1 kernel."""
        rows = first.flatten(1)
        mean, variance = rows @ self.pixel_mean, _quadratic(rows, self.pixel_covariance).clamp_min(0)
        self.moved(branch.bn_inner, mean, variance)
        return Affine.of(branch.bn_inner, mean, variance)

    def moved(self, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        """Takes note of statistics that a norm has seen."""
        self._moved.append((norm, mean.detach(), variance.detach()))

    def move(self) -> None:
        """Moves running statistics as torch.nn.BatchNorm2d does."""
        unbiased = self.count / max(1, self.count - 1)
        some: dict[float, list[tuple[Any, Tensor, Tensor]]] = {}
        for norm, mean, variance in self._moved:
            some.setdefault(float(norm.momentum or 0), []).append((norm, mean, variance * unbiased))
        self._moved = []
        with torch.no_grad():
            for momentum, found in some.items():
                torch._foreach_add_([norm.num_batches_tracked for norm, *_ in found], 1)
                torch._foreach_lerp_(
                    [norm.running_mean for norm, *_ in found], [mean for _, mean, _ in found], momentum
                )
                torch._foreach_lerp_([norm.running_var for norm, *_ in found], [v for *_, v in found], momentum)


def _quadratic(rows: Tensor, covariance: Tensor) -> Tensor:
    found: Tensor = _Quadratic.apply(rows, covariance)
    return found


@dataclass
class _Part:
    """What is known of a branch before the last batch norm: a kernel, and what is added to its convolution.

    Args:
        branch: It.
        gate: Its gate, or none.
        kernel: (C', C, 3, 3).
        constant: (C',), or none.
        edge: (C', H, W), what its border holds more than the constant; or none.
    """

    branch: Branch
    gate: Tensor | None
    kernel: Tensor
    constant: Tensor | None = None
    edge: Tensor | None = None


def fast_sum(x: Tensor, running: Running, kernel: Tensor | None) -> Tensor:
    """`pynas.ops.moments.merged_sum` in training, where `merges` says that it can: (B, C, H, W) -> (B, C', H, W)."""
    batch = _Batch(x)
    weights = [branch.weights(kernel) for branch, _ in running]
    inner = [
        batch.inner(branch, branch.first(own)) if isinstance(branch, kinds.Sequential) else None
        for (branch, _), own in zip(running, weights, strict=True)
    ]
    batch.move()  # borders hold what running statistics say after this batch
    parts = [_part(batch, *found) for found in zip(running, weights, inner, strict=True)]
    rows = torch.stack([part.kernel for part in parts]).permute(0, 1, 3, 4, 2).flatten(2)  # (branches, C', 9 C)
    flat = rows.flatten(0, 1)
    mean = (flat @ batch.mean).view(rows.shape[:2])
    variance = _quadratic(flat, batch.covariance).view(rows.shape[:2])
    return _applied(x, batch, parts, rows, mean, variance)


def _part(batch: _Batch, running: tuple[Branch, Tensor | None], weights: kinds.Weights, inner: Affine | None) -> _Part:
    branch, gate = running
    merged = branch.merged(weights, inner)
    if inner is None or not isinstance(branch, kinds.Sequential):
        return _Part(branch, gate, merged)
    value = Affine.running(branch.bn_inner).shift - inner.shift
    edge = branch.outer(border(batch.size, value, 1)[None], weights)[0]
    return _Part(branch, gate, merged, chained_bias(inner.shift, branch.second(weights), 1), edge)


def _with_edge(batch: _Batch, part: _Part, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance with the constant and with the map, which goes along with the mean image."""
    assert part.constant is not None
    assert part.edge is not None
    image = batch.image.permute(2, 0, 1)[None]
    places = functional.conv2d(image, part.kernel, padding=1)[0].flatten(1) - mean[:, None]
    flat = part.edge.flatten(1)
    middle = flat.mean(1)
    away = flat - middle[:, None]
    return mean + part.constant + middle, variance + ((2 * places + away) * away).mean(1)


def _applied(x: Tensor, batch: _Batch, parts: Sequence[_Part], rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The last batch norms and the gates, into one convolution."""
    pairs = [
        (m, v) if part.constant is None else _with_edge(batch, part, m, v)
        for part, m, v in zip(parts, mean.unbind(), variance.unbind(), strict=True)
    ]
    means, variances = torch.stack([m for m, _ in pairs]), torch.stack([v for _, v in pairs])
    for part, m, v in zip(parts, means.unbind(), variances.unbind(), strict=True):
        batch.moved(part.branch.bn, m, v)
    batch.move()
    norms = [part.branch.bn for part in parts]
    eps = norms[0].eps if len({norm.eps for norm in norms}) == 1 else means.new_tensor([[n.eps] for n in norms])
    scale = torch.stack([norm.weight for norm in norms]) * (variances.clamp_min(0) + eps).rsqrt()
    added = [means.new_zeros(means.shape[1]) if part.constant is None else part.constant for part in parts]
    shift = torch.stack([norm.bias for norm in norms]) + (torch.stack(added) - means) * scale
    if any(part.gate is not None for part in parts):
        gates = torch.stack([means.new_ones(()) if part.gate is None else part.gate for part in parts])[:, None]
        scale, shift = scale * gates, shift * gates
    out, channels = rows.shape[1], x.shape[1]
    weight = (rows * scale[:, :, None]).sum(0).view(out, 3, 3, channels).permute(0, 3, 1, 2)
    y = functional.conv2d(x, weight, shift.sum(0), padding=1)
    pairs_of_maps = zip(parts, scale.unbind(), strict=True)
    maps = [part.edge * own[:, None, None] for part, own in pairs_of_maps if part.edge is not None]
    return y + formats.like(sum(maps[1:], maps[0])[None], y) if maps else y
