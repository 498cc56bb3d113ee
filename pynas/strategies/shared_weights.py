"""What strategies that train a supernet's weights on sampled paths share: its descent, counts and length.

Not a strategy, and nothing to derive from: a strategy makes a `SharedWeights` and hands it gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pynas.choices import Gates
from pynas.registry import SearchSpace
from pynas.strategies.base import Problem
from pynas.supernet import Supernet
from pynas.training.feed import Feed
from pynas.training.loop import Progress
from pynas.training.metrics import Metric, mean_of, range_of, told
from pynas.training.optim import autocast, cosine, fast_layout, set_lr
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts

LEAST_EVALUATIONS = 8  # of an evolution

Batch = tuple[Tensor, Tensor]
Batches = Literal["shared", "each"]


@dataclass(frozen=True)
class Length:
    """How many steps a training of shared weights takes.

    Args:
        epochs: Into which it is divided.
        gradients: Path-gradients of a step, on average.
        batches: Batches of a step.
        path_gradients: Of the whole training; 0 takes what `epochs` passes over the images give.
    """

    epochs: int
    gradients: float
    batches: int
    path_gradients: int = 0

    def total(self, feed: Feed) -> int:
        """Steps of the whole training."""
        if self.path_gradients:
            return max(1, int(self.path_gradients / self.gradients + 1e-9))
        return self.epochs * max(1, feed.steps_weights // self.batches)

    def before(self, feed: Feed, epoch: int) -> int:
        """Steps before an epoch."""
        return self.total(feed) * epoch // self.epochs

    def of(self, feed: Feed, epoch: int) -> int:
        """Steps of an epoch."""
        return self.before(feed, epoch + 1) - self.before(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> int:
        """Number of a step in the whole training, from 0."""
        return self.before(feed, progress.epoch) + progress.step


class Descending(Protocol):
    """What a strategy that trains shared weights has: its hyper-parameters, and its length once it suits a space."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    path_gradients: int
    samples: int
    evaluations: int
    calibrate: int
    length: Length


class SharedWeights:
    """A supernet whose weights descend the gradients of some forward passes at a time, and the counts of these.

    The supernet is where the problem trains. SGD with a cosine from `lr` to zero. Weights without a gradient in a step
    stay as they are: no decay, no momentum.

    Args:
        problem: Its space makes the supernet.
        strategy: Has peak learning rate, momentum, decay of all parameters, and length.
    """

    def __init__(self, problem: Problem, strategy: Descending) -> None:
        self.problem, self.lr, self.length = problem, strategy.lr, strategy.length
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.device = self.net.device
        self.counts = UpdateCounts(self.net.choices)
        momentum, decay = strategy.momentum, strategy.weight_decay
        self.optimizer = torch.optim.SGD(self.net.parameters(), self.lr, momentum, weight_decay=decay)
        self._rows = {choice.name: row for row, choice in enumerate(self.net.choices)}
        self._one_hot = {slot.name: _one_hot_gates(len(slot.choice.options), self.device) for slot in self.net.slots}

    def gates(self, path: Sequence[int] | Tensor) -> dict[str, Gates]:
        """Gates of the single path that takes option `path[l]` at choice l."""
        picked = path.tolist() if isinstance(path, Tensor) else path
        return {slot.name: self._one_hot[slot.name][picked[self._rows[slot.choice.name]]] for slot in self.net.slots}

    def draw(self, feed: Feed, passes: int, batches: Batches) -> list[Batch]:
        """A batch for each of so many passes: the same one for all, or one each."""
        drawn = [_ready(feed.weights()) for _ in range(passes if batches == "each" else 1)]
        return drawn * (passes // len(drawn))

    def update(self, passes: Sequence[tuple[Mapping[str, Gates], Batch]], feed: Feed, step: int) -> dict[str, Metric]:
        """One update by the sum of the gradients of all passes, which are taken at the same weights.

        Every pass finds torch's generator as the first did, so that dropout is the same in all and nothing but rounding
        and the running statistics of what paths share depends on their order.

        Args:
            passes: Gates and a batch each.
            feed: Tells how long the training is.
            step: Of the whole training.
        """
        lr = cosine(self.lr, step, self.length.total(feed))
        set_lr(self.optimizer, lr)
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        random = random_state(self.device)
        losses, accuracies = [], []
        for gates, (x, y) in passes:
            set_random_state(random, self.device)
            with autocast(self.problem.amp, self.device):
                logits = self.net(x, gates)
                loss = functional.cross_entropy(logits, y)
            loss.backward()
            losses.append(told(loss))
            accuracies.append(told((logits.detach().argmax(1) == y).float().mean()))
        self.optimizer.step()
        return {
            "loss": mean_of(losses),
            "lr": lr,
            "train_accuracy": mean_of(accuracies),
            "train_accuracy_range": range_of(accuracies),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts.state_dict(),
            "rng": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counts.load_state_dict(state["counts"])
        set_random_state(state["rng"], self.device)


def _ready(batch: Batch) -> Batch:
    return fast_layout(batch[0]), batch[1]


def _one_hot_gates(options: int, device: torch.device) -> list[Gates]:
    return [Gates.one_hot(options, index, device) for index in range(options)]


def check_descent(name: str, strategy: Descending) -> None:
    """Checks the fields that all these strategies have. Raises ValueError for one that cannot work."""
    if strategy.epochs < 1 or strategy.batch_size < 2 or not strategy.lr > 0:
        raise ValueError(
            f"{name} needs epochs >= 1, batch_size >= 2 and lr > 0, not {strategy.epochs}, {strategy.batch_size} and "
            f"{strategy.lr}."
        )
    if not 0 <= strategy.momentum < 1:
        raise ValueError(f"{name}'s momentum must lie in [0, 1), not {strategy.momentum!r}.")
    for field in ("weight_decay", "path_gradients", "calibrate"):
        if getattr(strategy, field) < 0:
            raise ValueError(f"{name}'s {field} must not be negative, but is {getattr(strategy, field)!r}.")
    for field, least in (("samples", 1), ("evaluations", LEAST_EVALUATIONS)):
        if getattr(strategy, field) < least:
            raise ValueError(f"{name} needs {field} >= {least}, not {getattr(strategy, field)}.")


def option_counts(space: SearchSpace) -> list[int]:
    """Number of options of every choice."""
    return [len(choice.options) for choice in space.choices()]
