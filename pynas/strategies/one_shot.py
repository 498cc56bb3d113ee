"""One-Shot: all paths at once, with path dropout (Bender et al., "Understanding and Simplifying One-Shot Architecture
Search", ICML 2018)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pynas.choices import Gates
from pynas.fields import check_fields
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.derive import check_goals, derive_shared
from pynas.strategies.shared_weights import Length, SharedWeights, check_descent, option_counts
from pynas.supernet import mean_macs
from pynas.training.draws import uniform
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric
from pynas.training.run import RunFolder

STREAM = 2  # of the random numbers; 0 and 1 are those of the images


@STRATEGIES.register("one_shot")
@dataclass
class OneShot(Strategy):
    """The whole supernet in every step, options dropped at random (Bender et al., sections 3.2 and 3.3).

    An option of a layer of k is dropped with a probability that rises linearly from 0 to `drop`^(1/k) over the
    training, so that at its end all of them would be with probability `drop`. The rule and the rise are from memory of
    the paper, unverified, as is the default of `drop`.

    Ours: a layer of the spaces here has no other way around its options, so one of them stays where all would be
    dropped; and outputs are averaged, not added, so that a layer's scale does not depend on how many ran.

    Networks are derived as in `fairnas`.

    Args:
        epochs: Passes over the training images; with `path_gradients` merely how the training is divided.
        batch_size: Images per step.
        lr: Peak of the cosine schedule of SGD.
        momentum: Of SGD.
        weight_decay: On all parameters.
        drop: Probability at the end that all options of a layer would be dropped; 0 for no dropout.
        path_gradients: What the whole training computes, in gradients of single paths: a step that runs three options a
            layer counts three; 0 leaves it to `epochs`. Kept in expectation, to within the noise of the dropout.
        samples: Networks that are drawn and judged at the end, without objectives.
        evaluations: Networks that the evolution judges at the end, with objectives.
        calibrate: Images for the batch norms of each network that is judged; 0 for none.
    """

    epochs: int = 150
    batch_size: int = 256
    lr: float = 0.045
    momentum: float = 0.9
    weight_decay: float = 4e-5
    drop: float = 0.05
    path_gradients: int = 0
    samples: int = 64
    evaluations: int = 640
    calibrate: int = 512

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"samples": 960, "evaluations": 2100},
        "quick": {"epochs": 16, "batch_size": 64, "samples": 16, "evaluations": 80},
    }
    COST: ClassVar[str] = "as many passes over the images as FairNAS's paper preset, each of several paths"
    FAIR: ClassVar[tuple[str, str]] = ("no", "no")
    PURSUES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "strategy one_shot")
        check_descent("one_shot", self)
        if not 0 <= self.drop < 1:
            raise ValueError(f"one_shot's drop must lie in [0, 1), not {self.drop!r}.")

    def suit(self, space: SearchSpace) -> None:
        self.options = option_counts(space)
        self.length = Length(self.epochs, self._mean_paths(), 1, self.path_gradients)

    def _mean_paths(self) -> float:
        """Options of a layer that a step runs, on average over layers and training."""
        points = [(i + 0.5) / 256 for i in range(256)]
        rates = {k: [share * self.drop ** (1 / k) for share in points] for k in set(self.options)}
        kept = {k: math.fsum(k * (1 - rate) + rate**k for rate in rates[k]) / len(points) for k in rates}
        return math.fsum(kept[k] for k in self.options) / len(self.options)

    def check(self, problem: Problem) -> None:
        check_goals(problem, self.evaluations)

    def macs_per_image(self, space: SearchSpace) -> float:
        self.suit(space)
        return 3 * mean_macs(space, 1) * self.length.gradients

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.shared = SharedWeights(problem, self)
        self._means: dict[tuple[int, ...], tuple[Gates, Gates]] = {}
        self.counts = self.shared.counts

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        step = self.length.step(feed, progress)
        choices = self.shared.net.choices
        kept = kept_options(self.options, self.drop, step / self.length.total(feed), self.shared.problem.seed, step)
        rows = {choice.name: (k, *row) for choice, k, row in zip(choices, self.options, kept, strict=True)}
        gates = {name: self._gates_of(*row) for name, row in rows.items()}
        (batch,) = self.shared.draw(feed, 1, "each")
        running = {slot.name: gates[slot.choice.name][1] for slot in self.shared.net.slots}
        metrics = self.shared.update([(running, batch)], feed, step)
        self.counts.add_gates({name: counted for name, (counted, _) in gates.items()})
        return metrics

    def _gates_of(self, options: int, *kept: int) -> tuple[Gates, Gates]:
        """The mean of some options, on the CPU and where the supernet is; made once, as a GPU is waited for."""
        key = (options, *kept)
        if key not in self._means:
            counted = _mean_of(options, list(kept))
            moved = dataclasses.replace(counted, values=counted.values.to(self.shared.device))
            self._means[key] = (counted, moved)
        return self._means[key]

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return self.counts.report()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        return derive_shared(self.shared, self, feed, run, bars)

    def state_dict(self) -> dict[str, Any]:
        return self.shared.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared.load_state_dict(state)


def kept_options(options: list[int], drop: float, share: float, seed: int, step: int) -> list[list[int]]:
    """Which options each layer keeps in a step: a function of these numbers alone.

    Args:
        options: Number of options of each layer.
        drop: Probability at the end of the training that all options of a layer would be dropped.
        share: Of the training that is done, between 0 and 1.
        seed: Of the run.
        step: Of the whole training.
    """
    width = max(options)
    drawn = uniform((seed, STREAM), [step], len(options) * width).reshape(len(options), width)
    kept = []
    for numbers, k in zip(drawn.tolist(), options, strict=True):
        rate = share * drop ** (1 / k) if drop else 0.0
        # Where all numbers lie below the rate, the largest is that of an option taken uniformly.
        kept.append([i for i in range(k) if numbers[i] >= rate] or [max(range(k), key=numbers[:k].__getitem__)])
    return kept


def _mean_of(options: int, kept: list[int]) -> Gates:
    values: Tensor = torch.zeros(options)
    values[kept] = 1 / len(kept)
    return Gates(values, tuple(kept), tuple(kept))
