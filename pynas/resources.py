"""Expected cost of a distribution over networks, and three ways to its gradient (SNAS, arXiv 1812.09926, section 2.3).

To add a way of timing whole networks: `LATENCIES.add("my-phone", function)`, where the function takes an Architecture
and gives milliseconds. Then `SNAS(measure="measured", measured_by="my-phone")` searches for that device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cost_models.runners import TorchHost
from pynas.architecture import Architecture
from pynas.fuse import fuse
from pynas.registry import Registry
from pynas.supernet import CostTable

Combination = Literal["linear", "log"]
Estimator = Literal["reparametrization", "discrete", "policy_gradient"]
PAPER_WEIGHTS = {"size": 0.43 * 2, "flops": 0.43 / 4000, "access": 0.43 / 100}
REPEATS = 3  # of the timing of a whole network

LATENCIES: Registry[Callable[[Architecture], float]] = Registry(
    "latency", see="Add another: pynas.resources.LATENCIES.add(name, function)"
)


class SlotCosts:
    """What every slot costs under soft gates, in one measure or several.

    "linear" is the weighted sum of the measures. "log" is the mean of their natural logarithms, each of a slot's cost
    and at least 0 (SNAS's code: values below 1 are clamped to 1).

    Args:
        tables: One for each measure.
        weights: Of each measure, for "linear"; for "log" each scales its measure before the logarithm.
        combination: Of the measures.
        averaged: Whether the slots of a choice are averaged (SNAS's code divides by the number of cells of a type) or
            added up.
        device: Where gates are.
    """

    def __init__(
        self,
        tables: Sequence[CostTable],
        weights: Sequence[float],
        combination: Combination,
        averaged: bool,
        device: str | torch.device = "cpu",
    ) -> None:
        first = tables[0]
        self.combination = combination
        values = [table.values * weight for table, weight in zip(tables, weights, strict=True)]
        self.values = torch.stack(values).to(device, torch.get_default_dtype())  # (measures, slots, options)
        choice_of = torch.tensor(first.choice_of)
        counts = torch.bincount(choice_of)
        self.share = (1 / counts[choice_of] if averaged else torch.ones(len(choice_of))).to(device)

    def slots(self, gates: Tensor) -> Tensor:
        """Cost of each slot, shape (slots,), under gates (slots, options); differentiable."""
        costs = (self.values.to(gates.dtype) * gates).sum(-1)
        if self.combination == "linear":
            return costs.sum(0) * self.share
        return costs.clamp_min(1.0).log().mean(0) * self.share


def estimate(
    costs: SlotCosts,
    estimator: Estimator,
    gates: Tensor,
    probabilities: Tensor,
    log_density: Tensor,
    baseline: bool = True,
) -> Tensor:
    """The cost of a network: a scalar whose gradient estimates that of the expected cost.

    - "reparametrization": of the drawn gates, through the gates.
    - "discrete": of the probabilities in place of the gates; for a linear cost that is the expectation itself.
    - "policy_gradient": of the drawn gates, by the score function: every slot's log-density times its cost, less what
      it would cost under uniform gates (`baseline`). The cost need not be differentiable.

    Args:
        costs: Of slots.
        estimator: One of the three.
        gates: Drawn ones, (slots, options).
        probabilities: Of the options, (slots, options).
        log_density: Of the drawn gates, (slots,).
        baseline: Of the policy gradient.
    """
    if estimator == "reparametrization":
        return costs.slots(gates).sum()
    if estimator == "discrete":
        return costs.slots(probabilities).sum()
    drawn = costs.slots(gates.detach())
    options = (probabilities > 0).to(gates.dtype)
    usual = costs.slots(options / options.sum(-1, keepdim=True)) if baseline else torch.zeros_like(drawn)
    return with_gradient(float(drawn.sum()), (log_density * (drawn - usual)).sum())


def with_gradient(value: float, surrogate: Tensor) -> Tensor:
    """A scalar of that value with the gradient of the surrogate."""
    return surrogate - surrogate.detach() + value


class WholeNets:
    """The latency of whole drawn networks, for devices on which it is no sum over operations.

    Every network is asked for once. The gradient is the score function's: the log-probability of a drawn network times
    its latency, less a moving average.

    Args:
        latency_ms: Of a network, in milliseconds.
        momentum: Of the moving average.
    """

    def __init__(self, latency_ms: Callable[[Architecture], float], momentum: float = 0.9) -> None:
        self._ask, self.momentum = latency_ms, momentum
        self.known: dict[str, float] = {}
        self.mean: float | None = None

    def latency_ms(self, architecture: Architecture) -> float:
        """Raises ValueError if the answer is no positive number."""
        key = architecture.fingerprint
        if key not in self.known:
            answer = self._ask(architecture)
            if isinstance(answer, bool) or not isinstance(answer, int | float) or not 0 < answer < float("inf"):
                raise ValueError(f"A latency must be a positive number of milliseconds, not {answer!r}.")
            self.known[key] = float(answer)
        return self.known[key]

    def estimate(self, architecture: Architecture, log_probability: Tensor) -> Tensor:
        """The mean latency so far, with an estimate of its gradient.

        Args:
            architecture: Drawn.
            log_probability: Of it, a scalar; differentiable.
        """
        latency = self.latency_ms(architecture)
        before = latency if self.mean is None else self.mean
        self.mean = self.momentum * before + (1 - self.momentum) * latency
        return with_gradient(self.mean, log_probability * (latency - before))

    def state_dict(self) -> dict[str, Any]:
        return {"known": dict(self.known), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known, self.mean = dict(state["known"]), state["mean"]


def on_this_host(architecture: Architecture) -> float:
    """Median latency in ms of a network on this machine: torch, one thread, batch 1, batch norm folded."""
    size = architecture.search_space().input_size
    with torch.random.fork_rng(devices=[]):
        net = fuse(architecture.build())
    return statistics.median(TorchHost().time_net_ms(net, (1, 3, size, size), REPEATS))


LATENCIES.add("host", on_this_host)
