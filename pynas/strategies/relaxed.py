"""What strategies that train weights beside a distribution over options share: descents, tallies, reports.

Not a strategy, and nothing to derive from: parts that a strategy puts together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pynas.choices import Gates, Slot
from pynas.registry import SearchSpace
from pynas.samplers import Theta
from pynas.supernet import CostTable, Supernet
from pynas.training.optim import cosine, set_lr

SKIPS = ("skip", "skip_connect")


class WeightSettings(Protocol):
    """Hyper-parameters of the descent of the weights, as DARTS and SNAS have them."""

    weight_lr: float
    weight_lr_end: float
    weight_momentum: float
    weight_decay: float
    weight_clip: float


class WeightDescent:
    """SGD on all weights of a supernet with a cosine between two learning rates, and gradients cut to a norm.

    Args:
        net: The supernet.
        settings: How.
    """

    def __init__(self, net: nn.Module, settings: WeightSettings) -> None:
        self.parameters = list(net.parameters())
        self.settings = settings
        self.optimizer = torch.optim.SGD(
            self.parameters, settings.weight_lr, settings.weight_momentum, weight_decay=settings.weight_decay
        )

    def begin(self, step: int, steps: int) -> float:
        """Sets the learning rate of a step of the whole training, forgets gradients, and returns that rate."""
        low = self.settings.weight_lr_end
        lr = low + cosine(self.settings.weight_lr - low, step, steps)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return lr

    def step(self) -> None:
        """Descends the gradients that are there."""
        if self.settings.weight_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.weight_clip)
        self.optimizer.step()


class Tally:
    """What a search has computed, so that strategies can be compared at equal cost.

    A pass is a batch through the network. One that is differentiated counts in gradients of single paths: as many as
    options run in a choice, on average.
    """

    def __init__(self) -> None:
        self.gradient_passes = 0
        self.path_gradients = 0.0
        self.forward_passes = 0

    def add(self, paths: float, passes: int = 1) -> None:
        """Takes note of differentiated passes of so many paths each."""
        self.gradient_passes += passes
        self.path_gradients += paths * passes

    def report(self) -> dict[str, float]:
        """For logs: passes with and without gradients, and gradients of single paths, weights' and architecture's."""
        return dict(vars(self))

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def mean_options(space: SearchSpace) -> float:
    """Options of a choice, on average."""
    counts = [len(choice.options) for choice in space.choices()]
    return math.fsum(counts) / len(counts)


def gates_of(slots: Sequence[Slot], rows: Tensor) -> dict[str, Gates]:
    """Gates that run and train all options of every slot with these weights, shape (slots, options)."""
    gates = {}
    for slot, row in zip(slots, rows, strict=True):
        every = tuple(range(len(slot.choice.options)))
        gates[slot.name] = Gates(row[: len(every)], every, every)
    return gates


def by_choice(net: Supernet, gates: Mapping[str, Gates]) -> dict[str, Gates]:
    """Gates of the first slot of every choice, by choice."""
    found: dict[str, Gates] = {}
    for slot in net.slots:
        found.setdefault(slot.choice.name, gates[slot.name])
    return found


def theta_report(theta: Theta, table: CostTable) -> dict[str, Any]:
    """For logs: expected cost, share of skips, entropy in nats of every choice and their mean."""
    with torch.no_grad():
        p = theta.probabilities().cpu()
        entropy = [round(value, 6) for value in theta.entropy().tolist()]
        cost = float((p.double() * table.by_choice()).sum()) + table.fixed
    places = [
        (row, choice.options.index(name))
        for row, choice in enumerate(theta.choices)
        for name in SKIPS
        if name in choice.options
    ]
    shares = [float(p[row, column]) for row, column in places]
    return {
        "expected_cost": cost,
        "skip_share": math.fsum(shares) / len(shares) if shares else 0.0,
        "entropy": entropy,
        "mean_entropy": math.fsum(entropy) / len(entropy),
    }


def right(logits: Tensor, y: Tensor) -> float:
    """Share of a batch that is classified right."""
    return float((logits.detach().argmax(1) == y).float().mean())


def check_positive(name: str, strategy: Any, positive: Iterable[str], not_negative: Iterable[str]) -> None:
    """Checks numbers of a strategy. Raises ValueError for the first that cannot work."""
    if strategy.epochs < 1 or strategy.batch_size < 2:
        raise ValueError(
            f"{name} needs epochs >= 1 and batch_size >= 2, not {strategy.epochs} and {strategy.batch_size}."
        )
    for field in positive:
        if not getattr(strategy, field) > 0:
            raise ValueError(f"{name}'s {field} must be a positive number, not {getattr(strategy, field)!r}.")
    for field in not_negative:
        if not getattr(strategy, field) >= 0:
            raise ValueError(f"{name}'s {field} must not be negative, but is {getattr(strategy, field)!r}.")
