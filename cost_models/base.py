"""CostModel: what everything above asks for the price of an op."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from .spec import OpSpec


@runtime_checkable
class CostModel(Protocol):
    """The price of one op. The price of a network is the sum over its ops (FBNet: Wu et al. 2019, equation 3)."""

    name: str
    unit: str  # "ms", "MACs", "parameters", "bytes"
    net_cost: float  # of a whole network, beyond the sum over its ops: a calibration's offset, else 0

    def cost(self, spec: OpSpec) -> float:
        """The price in `unit` of one run: positive, and 0 for a free op. Raises ValueError for one it cannot price."""
        ...

    def source(self, spec: OpSpec) -> str:
        """Where that price comes from: "measured", "modelled", "fitted" or "analytic"."""
        ...

    def describe(self) -> str:
        """One line for reports: device, source, date, spread."""
        ...
