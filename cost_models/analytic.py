"""Cost models that need no device: counts, and the roofline bound made from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .base import CostModel
from .spec import Layer, OpSpec


@dataclass
class Macs:
    """Multiply-adds of convolutions and linear layers, for one image. (Mobile papers print these as "FLOPs".)"""

    name: str = "macs"
    unit: str = "MACs"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        return float(spec.macs)

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "multiply-adds counted; no device was measured"


@dataclass
class Params:
    """Convolution and linear weights, linear biases, BN scale and shift."""

    name: str = "params"
    unit: str = "parameters"
    net_cost: float = 0.0

    def cost(self, spec: OpSpec) -> float:
        return float(spec.params)

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return "parameters counted; no device was measured"


@dataclass
class MemoryTraffic:
    """Bytes moved for one image if each primitive layer reads its inputs and weights and writes its outputs.

    Args:
        bytes_per_value: 4 for fp32, 2 for fp16, 1 for int8.
    """

    bytes_per_value: int = 4
    name: str = "memory"
    unit: str = "bytes"
    net_cost: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("bytes_per_value", self.bytes_per_value)

    def cost(self, spec: OpSpec) -> float:
        return float(self.bytes_per_value * sum(_values_moved(layer) for layer in spec.layers))

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return f"memory traffic counted at {self.bytes_per_value} bytes per value; no device was measured"


@dataclass
class TrainingMemory:
    """What a training step keeps for its backward pass: the output of every layer before its batch norm, and the input
    of every layer behind the first. The input of the op itself, which its neighbours share, is left out.

    Args:
        batch: Images per step.
        bytes_per_value: 4 for fp32.
    """

    batch: int
    bytes_per_value: int = 4
    name: str = "training-memory"
    unit: str = "MB a step"
    net_cost: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("batch", self.batch)
        _check_positive("bytes_per_value", self.bytes_per_value)

    def cost(self, spec: OpSpec) -> float:
        kept = sum(layer.writes for layer in spec.layers) + sum(layer.reads for layer in spec.layers[1:])
        return self.batch * self.bytes_per_value * kept * 1e-6

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return f"activations kept in a training step of {self.batch} images; no device was measured"


@dataclass
class Roofline:
    """A lower bound on latency: each primitive layer takes the longer of computing and moving its data, plus overhead.

    Williams, Waterman, Patterson 2009. fp32; no caches, so small ops that stay in cache can be faster.

    Args:
        gmacs_per_s: peak multiply-adds, in 1e9 per second.
        gbytes_per_s: memory bandwidth, in 1e9 bytes per second.
        overhead_us: fixed time of each primitive layer, in microseconds.
    """

    gmacs_per_s: float
    gbytes_per_s: float
    overhead_us: float = 0.0
    name: str = "roofline"
    unit: str = "ms"
    net_cost: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("gmacs_per_s", self.gmacs_per_s)
        _check_positive("gbytes_per_s", self.gbytes_per_s)
        if not 0 <= self.overhead_us < math.inf:
            raise ValueError(f"overhead_us is {self.overhead_us}; it must be a number of microseconds, 0 or more.")

    def cost(self, spec: OpSpec) -> float:
        return sum(self._layer_ms(layer) for layer in spec.layers)

    def _layer_ms(self, layer: Layer) -> float:
        compute_ms = layer.macs / self.gmacs_per_s * 1e-6
        memory_ms = 4 * _values_moved(layer) / self.gbytes_per_s * 1e-6
        return max(compute_ms, memory_ms) + self.overhead_us * 1e-3

    def source(self, spec: OpSpec) -> str:
        return "analytic"

    def describe(self) -> str:
        return (
            f"roofline of {self.gmacs_per_s:g} GMAC/s, {self.gbytes_per_s:g} GB/s "
            f"and {self.overhead_us:g} us per layer; no device was measured"
        )


# The models that need no numbers from the user, by name.
COUNTS: dict[str, Callable[[], CostModel]] = {"macs": Macs, "params": Params, "memory": MemoryTraffic}


def _values_moved(layer: Layer) -> int:
    return layer.reads + layer.params + layer.writes


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a positive number.")
