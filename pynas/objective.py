"""Ways to weigh expected cost against accuracy when theta is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Objective(Protocol):
    """Turns a cross-entropy and costs into the loss that theta descends."""

    def loss(self, cross_entropy: Tensor, drawn: Tensor, expected: Tensor) -> Tensor:
        """The loss.

        Args:
            cross_entropy: Scalar.
            drawn: Cost of the network under the drawn gates, fixed part included, in the table's unit; scalar.
            expected: The same under the softmax of theta.
        """

    def update(self, expected: float) -> dict[str, float]:
        """Adapts to the expected cost after a step; returns what is worth logging."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class PaperObjective:
    """CE * alpha * log(LAT)^beta, the power applied to the logarithm (FBNet, eq. 2).

    The paper leaves the unit of LAT open; we take microseconds, as public code does. alpha only rescales the loss, so
    that Adam hardly notices it. Values of alpha and beta are those of public code; the paper lists none per model.

    Args:
        alpha: Factor.
        beta: Power; larger weighs cost more.
        scale: Multiplies costs in the table's unit to give LAT (1000 for milliseconds).
        cheapest: Cost of the cheapest network in the table's unit.

    Raises:
        ValueError: If LAT could come down to 1 or less, where the logarithm vanishes.
    """

    alpha: float
    beta: float
    scale: float
    cheapest: float

    def __post_init__(self) -> None:
        if self.cheapest * self.scale <= 1.01:
            raise ValueError(
                f"The cheapest network costs {self.cheapest * self.scale:g} (microseconds, or the table's unit); "
                "the paper's loss takes its logarithm and needs more than 1. Use objective='lagrange'."
            )

    def loss(self, cross_entropy: Tensor, drawn: Tensor, expected: Tensor) -> Tensor:
        return cross_entropy * self.alpha * (drawn * self.scale).log() ** self.beta

    def update(self, expected: float) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


@dataclass
class WeighedObjective:
    """CE + eta * cost (SNAS, eq. 14, whose sign convention is the opposite).

    Args:
        eta: Weight; larger gives smaller networks.
    """

    eta: float

    def loss(self, cross_entropy: Tensor, drawn: Tensor, expected: Tensor) -> Tensor:
        return cross_entropy + self.eta * expected

    def update(self, expected: float) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


@dataclass
class LagrangeObjective:
    """CE + multiplier * v + damping / 2 * v^2 with v = E[LAT] / target - 1: steers the expected latency to a target.

    Ours, not the paper's: its loss trades accuracy for latency at a rate that nobody can choose in advance. The
    multiplier rises while theta is too slow and falls (below zero if need be) while it wastes the budget. E[LAT] is
    taken under the softmax of theta, which has no sampling noise.

    Args:
        target: In the table's unit.
        rate: Change of the multiplier for each unit of v and step.
        damping: Weight of the quadratic term (augmented Lagrangian).
    """

    target: float
    rate: float = 0.1
    damping: float = 2.0
    multiplier: float = field(default=0.0, init=False)

    def loss(self, cross_entropy: Tensor, drawn: Tensor, expected: Tensor) -> Tensor:
        violation = expected / self.target - 1
        return cross_entropy + self.multiplier * violation + self.damping / 2 * violation**2

    def update(self, expected: float) -> dict[str, float]:
        self.multiplier += self.rate * (expected / self.target - 1)
        return {"multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier = float(state["multiplier"])
