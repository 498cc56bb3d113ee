"""The EF baseline: fair in expectation only (Chu, Zhang and Xu, FairNAS, arXiv 1907.01845, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pynas.fields import check_fields
from pynas.kernels.paths import uniform_paths
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.derive import check_goals, derive_shared
from pynas.strategies.shared_weights import Length, SharedWeights, check_descent, option_counts
from pynas.supernet import mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric, mean_of
from pynas.training.run import RunFolder


@STRATEGIES.register("ef")
@dataclass
class EF(Strategy):
    """One uniformly drawn path a step, trained for k updates in a row.

    It computes as many gradients a step as `fairnas`, and is fair in expectation, but what one path has learned stands
    before the next begins: counts drift apart k times as fast as with single updates, and the order matters. The paper
    shows it with the same learning rate and with a sixth of it.

    Networks are derived as in `fairnas`.

    Args:
        epochs: Passes over the training images; with `path_gradients` merely how the training is divided.
        batch_size: Images per batch.
        lr: Peak of the cosine schedule of SGD.
        momentum: Of SGD.
        weight_decay: On all parameters.
        repeats: Updates that a path gets in a row, k; 0 takes as many as the longest layer has options (6 in the
            paper).
        batches: "each" takes a new batch for every update, "shared" one for all updates of a path. The paper does not
            say.
        path_gradients: Gradients of single paths in the whole training, cut down to whole steps; 0 leaves it to
            `epochs`. The same number makes runs of different strategies comparable.
        samples: Networks that are drawn and judged at the end, without objectives.
        evaluations: Networks that the evolution judges at the end, with objectives.
        calibrate: Images for the batch norms of each network that is judged; 0 for none.
    """

    epochs: int = 150
    batch_size: int = 256
    lr: float = 0.045
    momentum: float = 0.9
    weight_decay: float = 4e-5
    repeats: int = 0
    batches: Literal["shared", "each"] = "each"
    path_gradients: int = 0
    samples: int = 64
    evaluations: int = 640
    calibrate: int = 512

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"samples": 960, "evaluations": 2100},
        "quick": {"epochs": 96, "batch_size": 64, "samples": 16, "evaluations": 80},
    }
    COST: ClassVar[str] = "as many passes over the images as FairNAS's paper preset, each of one path only"
    FAIR: ClassVar[tuple[str, str]] = ("yes", "no")
    PURSUES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "strategy ef")
        check_descent("ef", self)
        if self.repeats < 0:
            raise ValueError(f"ef's repeats must not be negative, but is {self.repeats}.")

    def suit(self, space: SearchSpace) -> None:
        self.options = option_counts(space)
        self.k = self.repeats or max(self.options)
        self.length = Length(self.epochs, self.k, 1 if self.batches == "shared" else self.k, self.path_gradients)

    def check(self, problem: Problem) -> None:
        check_goals(problem, self.evaluations)

    def macs_per_image(self, space: SearchSpace) -> float:
        self.suit(space)
        return 3 * mean_macs(space, 1) * self.k

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.shared = SharedWeights(problem, self)
        self.counts = self.shared.counts

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        return self.k * self.steps(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        step = self.length.step(feed, progress)
        path = uniform_paths(1, self.options, seed=self.shared.problem.seed, step=step)
        gates = self.shared.gates(path[0])
        batches = self.shared.draw(feed, self.k, self.batches)
        updates = [self.shared.update([(gates, batch)], feed, step) for batch in batches]
        self.counts.add_paths(path, times=self.k)
        return {name: mean_of([update[name] for update in updates]) for name in updates[0]}

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return self.counts.report()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        return derive_shared(self.shared, self, feed, run, bars)

    def state_dict(self) -> dict[str, Any]:
        return self.shared.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared.load_state_dict(state)
