"""The seven linear branches of a re-parameterisable block (RepNAS, arXiv 2109.03508), each with its batch norm.

To add a branch: a subclass of `Branch` here (its weights, what it computes before its last batch norm, and which kernel
that is), its kind in `cost_models/spec.py`, and its entry in `BRANCHES`. Folding, sharing, costs and the contract tests
follow from these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.spec import OpSpec
from pynas.fuse import fold_conv_bn
from pynas.merge import average_kernel, centre_slice, centred, chained, chained_bias, identity_kernel
from pynas.ops.layers import MODULES
from pynas.registry import Registry

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Affine:
    """A batch norm with known statistics: scale and shift, each (C,)."""

    scale: Tensor
    shift: Tensor

    @staticmethod
    def running(bn: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> Affine:
        """With running statistics, of which it keeps no view: another forward pass may come before the backward."""
        assert bn.running_mean is not None
        assert bn.running_var is not None
        return Affine.of(bn, bn.running_mean.clone(), bn.running_var, dtype)

    @staticmethod
    def of(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, dtype: torch.dtype | None = None) -> Affine:
        """With given statistics, in their type or another."""
        kind = dtype or mean.dtype
        scale = bn.weight.to(kind) * (variance.to(kind) + bn.eps).rsqrt()
        return Affine(scale, bn.bias.to(kind) - mean.to(kind) * scale)


def bordered(x: Tensor, value: Tensor, pad: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H + 2 pad, W + 2 pad), with a border of one value (C,) per channel. Differentiable."""
    return functional.pad(x, [pad] * 4) + border(x.shape[-2:], value, pad)


def border(size: torch.Size, value: Tensor, pad: int) -> Tensor:
    """That border alone, around zeros: (C, H + 2 pad, W + 2 pad)."""
    mask = functional.pad(value.new_zeros(size), [pad] * 4, value=1.0)
    return value[:, None, None] * mask


class Branch(nn.Module, ABC):
    """One branch: (B, in, S, S) -> (B, out, ceil(S / stride), ceil(S / stride)); one convolution in eval mode.

    Args:
        spec: Its shape.
        shared: Whether its weights are slices of the block's kernel, which every call gets then.
    """

    def __init__(self, spec: OpSpec, shared: bool = False) -> None:
        super().__init__()
        self.spec, self.shared = spec, shared
        for name, (out_channels, in_channels, height, width) in self.shapes().items():
            taken = shared and name in self.taken()
            weight = None if taken else self._fresh(name, out_channels, in_channels, height, width)
            self.register_parameter(name, weight)
        self.bn = nn.BatchNorm2d(spec.out_channels)

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Shapes of the weights by name: channels out, channels in of all groups, height, width."""

    def taken(self) -> tuple[str, ...]:
        """Names of the weights that are slices of the block's kernel where weights are shared."""
        return tuple(self.shapes())

    def _fresh(self, name: str, out_channels: int, in_channels: int, height: int, width: int) -> nn.Parameter:
        """Weights as torch's convolutions begin."""
        weight = torch.empty(out_channels, in_channels // self.spec.groups, height, width)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return nn.Parameter(weight)

    def weights(self, kernel: Tensor | None = None) -> dict[str, Tensor]:
        """All weights by name; with the block's kernel (out, in / groups, K, K), slices where they are shared."""
        found: dict[str, Tensor] = {}
        for name, (_, _, height, width) in self.shapes().items():
            own = getattr(self, name)
            if own is None:
                assert kernel is not None, "a branch of shared weights needs its block's kernel"
                own = centre_slice(kernel, height, width)
            found[name] = own
        return found

    def separate(self, kernel: Tensor) -> None:
        """Makes the weights the branch's own: copies of their slices."""
        for name, weight in self.weights(kernel).items():
            if getattr(self, name) is None:
                self.register_parameter(name, nn.Parameter(weight.detach().clone()))
        self.shared = False

    def forward(self, x: Tensor, kernel: Tensor | None = None) -> Tensor:
        """(B, in, S, S), and the block's kernel where weights are shared -> (B, out, S', S')."""
        y: Tensor = self.bn(self.linear(x, self.weights(kernel)))
        return y

    @abstractmethod
    def linear(self, x: Tensor, weights: Weights) -> Tensor:
        """What comes before the last batch norm."""

    @abstractmethod
    def merged(self, weights: Weights, inner: Affine | None) -> Tensor:
        """The kernel (out, in / groups, K, K) that `linear` is but for constants, with zero padding.

        Args:
            weights: In the type to compute in.
            inner: The batch norm in the middle, where there is one.
        """

    def folded(self, kernel: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Kernel (out, in / groups, K, K) and bias (out,) of the convolution that this is in eval mode, in float64."""
        weights = {name: weight.double() for name, weight in self.weights(kernel).items()}
        return fold_conv_bn(self.merged(weights, None), None, self.bn)


class ConvBranch(Branch):
    """Convolution of H x W, batch norm: the branches 1x1, KxK, 1xK and Kx1."""

    def __init__(self, spec: OpSpec, size: int, height: int, width: int, shared: bool = False) -> None:
        self.size, self.height, self.width = size, height, width
        super().__init__(spec, shared)

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {"weight": (self.spec.out_channels, self.spec.in_channels, self.height, self.width)}

    def linear(self, x: Tensor, weights: Weights) -> Tensor:
        padding = (self.height // 2, self.width // 2)
        return functional.conv2d(x, weights["weight"], None, self.spec.stride, padding, 1, self.spec.groups)

    def merged(self, weights: Weights, inner: Affine | None) -> Tensor:
        return centred(weights["weight"], self.size)


class Sequential(Branch):
    """1x1 convolution, batch norm, a border, something of K x K, batch norm.

    The border is what the batch norm in the middle makes of zero *with its running statistics*, also in training. With
    ordinary zero padding there, the branch would be no convolution of the zero-padded input.
    """

    def __init__(self, spec: OpSpec, size: int, shared: bool = False) -> None:
        self.size = size
        super().__init__(spec, shared)
        self.bn_inner = nn.BatchNorm2d(self.middle)

    @property
    @abstractmethod
    def middle(self) -> int:
        """Channels between the two."""

    @abstractmethod
    def first(self, weights: Weights) -> Tensor:
        """Kernel (middle, in / groups, 1, 1)."""

    @abstractmethod
    def second(self, weights: Weights) -> Tensor:
        """Kernel (out, middle / groups, K, K)."""

    def linear(self, x: Tensor, weights: Weights) -> Tensor:
        y = self.bn_inner(functional.conv2d(x, self.first(weights), groups=self.spec.groups))
        return self.outer(bordered(y, Affine.running(self.bn_inner).shift, self.size // 2), weights)

    @abstractmethod
    def outer(self, y: Tensor, weights: Weights) -> Tensor:
        """The part of K x K, without padding."""

    def merged(self, weights: Weights, inner: Affine | None) -> Tensor:
        assert inner is not None
        first = self.first(weights) * inner.scale[:, None, None, None]
        return chained(first, self.second(weights), self.spec.groups)

    def folded(self, kernel: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = {name: weight.double() for name, weight in self.weights(kernel).items()}
        inner = Affine.running(self.bn_inner, torch.float64)
        constant = chained_bias(inner.shift, self.second(weights), self.spec.groups)
        return fold_conv_bn(self.merged(weights, inner), constant, self.bn)


class PointwiseAverage(Sequential):
    """1x1 convolution, batch norm, border, K x K average, batch norm."""

    @property
    def middle(self) -> int:
        return self.spec.out_channels

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {"weight": (self.spec.out_channels, self.spec.in_channels, 1, 1)}

    def first(self, weights: Weights) -> Tensor:
        return weights["weight"]

    def second(self, weights: Weights) -> Tensor:
        return average_kernel(self.spec.out_channels, self.spec.groups, self.size, like=weights["weight"])

    def outer(self, y: Tensor, weights: Weights) -> Tensor:
        return functional.avg_pool2d(y, self.size, self.spec.stride)


class PointwiseConv(Sequential):
    """1x1 convolution whose kernel is identity + W with W = 0 at first, batch norm, border, K x K convolution, batch
    norm.

    Where weights are shared, W is the centre of the block's kernel if the shapes agree, and the branch's own otherwise
    (ours: the article's rule has no slice for them). With more channels in the middle than come in, as DBB has it for
    depthwise convolutions, there is no identity, and the 1x1 convolution begins like any other.
    """

    @property
    def middle(self) -> int:
        return self.spec.expansion * self.spec.in_channels

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        spec = self.spec
        return {
            "inner": (self.middle, spec.in_channels, 1, 1),
            "weight": (spec.out_channels, self.middle, self.size, self.size),
        }

    def taken(self) -> tuple[str, ...]:
        if self.spec.expansion > 1:
            return ()
        return ("inner", "weight") if self.spec.in_channels == self.spec.out_channels else ("weight",)

    def _fresh(self, name: str, out_channels: int, in_channels: int, height: int, width: int) -> nn.Parameter:
        weight = super()._fresh(name, out_channels, in_channels, height, width)
        if name == "inner" and self.spec.expansion == 1:
            nn.init.zeros_(weight)
        return weight

    def first(self, weights: Weights) -> Tensor:
        inner = weights["inner"]
        if self.spec.expansion > 1:
            return inner
        return inner + identity_kernel(self.spec.in_channels, self.spec.groups, like=inner)

    def second(self, weights: Weights) -> Tensor:
        return weights["weight"]

    def outer(self, y: Tensor, weights: Weights) -> Tensor:
        return functional.conv2d(y, weights["weight"], None, self.spec.stride, 0, 1, self.spec.groups)


class SkipBranch(Branch):
    """Batch norm of the input."""

    def __init__(self, spec: OpSpec, size: int, groups: int, shared: bool = False) -> None:
        self.size, self.groups = size, groups
        super().__init__(spec, shared)

    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {}

    def linear(self, x: Tensor, weights: Weights) -> Tensor:
        return x

    def merged(self, weights: Weights, inner: Affine | None) -> Tensor:
        return identity_kernel(self.spec.in_channels, self.groups, self.size, like=self.bn.weight)

    def folded(self, kernel: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return fold_conv_bn(self.merged({}, None).double(), None, self.bn)


@dataclass(frozen=True)
class BranchShape:
    """Where a branch stands.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        size: Height and width that come in, in pixels.
        kernel: K of the block.
        stride: Of the block.
        groups: Of the block.
        middle: Channels in the middle of 1x1-KxK, as a multiple of `in_channels`.
        strided_pointwise: Whether 1x1-KxK keeps its 1x1 convolution where the stride is not 1.
    """

    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    middle: int = 1
    strided_pointwise: bool = True

    def spec(self, kind: str, kernel: int, expansion: int = 1) -> OpSpec:
        """Of a branch of that kind here."""
        stride, groups = (1, 1) if kind == "norm" else (self.stride, self.groups)
        channels = (self.in_channels, self.out_channels)
        return OpSpec(kind, *channels, self.size, kernel, stride, groups, expansion, activation="none")


class BranchKind(ABC):
    """One entry of `BRANCHES`."""

    def fits(self, shape: BranchShape) -> bool:
        """Whether there can be such a branch."""
        return True

    @abstractmethod
    def spec(self, shape: BranchShape) -> OpSpec:
        """What it costs."""

    @abstractmethod
    def build(self, shape: BranchShape, shared: bool) -> Branch:
        """Its module."""


@dataclass(frozen=True)
class Conv(BranchKind):
    """A single convolution.

    Args:
        kind: Of the spec.
        height: 0 for the block's K.
        width: 0 for the block's K.
    """

    kind: str
    height: int
    width: int

    def spec(self, shape: BranchShape) -> OpSpec:
        return shape.spec(self.kind, 1 if self.height and self.width else shape.kernel)

    def build(self, shape: BranchShape, shared: bool) -> Branch:
        size = shape.kernel
        return ConvBranch(self.spec(shape), size, self.height or size, self.width or size, shared)


class Average(BranchKind):
    """1x1-AVG."""

    def spec(self, shape: BranchShape) -> OpSpec:
        return shape.spec("pointwise_avg", shape.kernel)

    def build(self, shape: BranchShape, shared: bool) -> Branch:
        return PointwiseAverage(self.spec(shape), shape.kernel, shared)


class Pointwise(BranchKind):
    """1x1-KxK; where the stride is not 1, a plain KxK convolution if the shape says so."""

    def _plain(self, shape: BranchShape) -> bool:
        return shape.stride > 1 and not shape.strided_pointwise

    def spec(self, shape: BranchShape) -> OpSpec:
        if self._plain(shape):
            return shape.spec("conv", shape.kernel)
        return shape.spec("pointwise_conv", shape.kernel, shape.middle)

    def build(self, shape: BranchShape, shared: bool) -> Branch:
        if self._plain(shape):
            return ConvBranch(self.spec(shape), shape.kernel, shape.kernel, shape.kernel, shared)
        return PointwiseConv(self.spec(shape), shape.kernel, shared)


class Skip(BranchKind):
    """Batch norm alone, where the shape stays."""

    def fits(self, shape: BranchShape) -> bool:
        return shape.stride == 1 and shape.in_channels == shape.out_channels

    def spec(self, shape: BranchShape) -> OpSpec:
        return shape.spec("norm", 1)

    def build(self, shape: BranchShape, shared: bool) -> Branch:
        return SkipBranch(self.spec(shape), shape.kernel, shape.groups, shared)


BRANCHES: Registry[BranchKind] = Registry("branch")
BRANCHES.add("1x1", Conv("conv", 1, 1))
BRANCHES.add("kxk", Conv("conv", 0, 0))
BRANCHES.add("1x1_kxk", Pointwise())
BRANCHES.add("1x1_avg", Average())
BRANCHES.add("1xk", Conv("row", 1, 0))
BRANCHES.add("kx1", Conv("column", 0, 1))
BRANCHES.add("skip", Skip())

FALLBACK = "kxk"  # what a block computes that was left without a branch


def branch_of(spec: OpSpec) -> Branch:
    """The branch of a block of its own that a spec stands for, with fresh weights of its own."""
    shape = BranchShape(
        spec.in_channels, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.groups, spec.expansion
    )
    names = {"row": "1xk", "column": "kx1", "pointwise_conv": "1x1_kxk", "pointwise_avg": "1x1_avg", "norm": "skip"}
    return BRANCHES.get(names[spec.kind]).build(shape, False)


_make: Callable[[OpSpec], nn.Module] = branch_of
for _kind in ("row", "column", "pointwise_conv", "pointwise_avg", "norm"):
    MODULES.add(_kind, _make)
