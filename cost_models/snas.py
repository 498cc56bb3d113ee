"""The three resource measures of SNAS (Xie et al., ICLR 2019, arXiv 1812.09926), counted from an op's layers.

They are those of its released code: weights of convolutions, their multiply-adds with the additions or comparisons of
pools, and memory access. Batch norms and activations count nothing; y and C below are output side and channels.

| op | size | flops | access, stride 1 | access, stride 2 |
| --- | --- | --- | --- | --- |
| pools | 0 | 9 y^2 C | 2 y^2 C | 5 y^2 C |
| skip | 0 (C^2 at stride 2) | 0 (C^2 y^2) | 2 y^2 C | 9 y^2 C + size |
| separable convolution | 2 C k^2 + 2 C^2 | size y^2 | 8 y^2 C + size | 11 y^2 C + size |
| dilated convolution | C k^2 + C^2 | size y^2 | 4 y^2 C + size | 7 y^2 C + size |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .base import CostModel
from .spec import Layer, OpSpec

COUNTED = ("conv", "depthwise", "linear", "pool")


def _counted(spec: OpSpec) -> list[Layer]:
    return [layer for layer in spec.layers if layer.op in COUNTED]


def _size(spec: OpSpec) -> int:
    return sum(layer.params - layer.norm for layer in _counted(spec))


@dataclass
class Size:
    """Weights of convolutions and linear layers."""

    name: str = "snas_size"
    unit: str = "weights"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        return float(_size(spec))

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "weights counted as in SNAS, without batch norms; no device was measured"


@dataclass
class Flops:
    """Multiply-adds of convolutions and linear layers, and the pixels that pools look at."""

    name: str = "snas_flops"
    unit: str = "operations"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        return float(sum(layer.macs + layer.window * layer.writes for layer in _counted(spec)))

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "multiply-adds and pooled pixels counted as in SNAS; no device was measured"


@dataclass
class Access:
    """Values read and written by convolutions, linear layers, pools and identities, and the weights read."""

    name: str = "snas_access"
    unit: str = "values"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        if spec.kind == "skip":
            return 2.0 * spec.in_channels * spec.size**2
        return float(_size(spec) + sum(layer.reads + layer.writes for layer in _counted(spec)))

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "memory access counted as in SNAS, an identity's too; no device was measured"


MEASURES: dict[str, Callable[[], CostModel]] = {"size": Size, "flops": Flops, "access": Access}
