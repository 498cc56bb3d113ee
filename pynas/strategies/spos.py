"""SPOS: uniform single paths (Guo et al., "Single Path One-Shot NAS with Uniform Sampling", ECCV 2020,
arXiv 1904.00420)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pynas.fields import check_fields
from pynas.kernels.paths import uniform_paths
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.derive import check_goals, derive_shared
from pynas.strategies.shared_weights import Length, SharedWeights, check_descent, option_counts
from pynas.supernet import mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric
from pynas.training.run import RunFolder


@STRATEGIES.register("spos")
@dataclass
class SPOS(Strategy):
    """One uniformly drawn path a batch, one update a path (SPOS, sections 3.2 and 3.3).

    Options have equal chances in expectation, and counts that drift apart as n (m - 1) / m^2 after n steps.

    Networks are derived as in `fairnas`, recalibration included (SPOS, section 3.4). Schedule and learning rate are
    those of FairNAS's paper, for which this is the baseline; SPOS's own are not.

    Args:
        epochs: Passes over the training images; with `path_gradients` merely how the training is divided.
        batch_size: Images per step.
        lr: Peak of the cosine schedule of SGD.
        momentum: Of SGD.
        weight_decay: On all parameters.
        path_gradients: Gradients of single paths in the whole training; 0 leaves it to `epochs`. The same number makes
            runs of different strategies comparable.
        samples: Networks that are drawn and judged at the end, without objectives.
        evaluations: Networks that the evolution judges at the end, with objectives.
        calibrate: Images for the batch norms of each network that is judged; 0 for none.
    """

    epochs: int = 150
    batch_size: int = 256
    lr: float = 0.045
    momentum: float = 0.9
    weight_decay: float = 4e-5
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
        check_fields(self, "strategy spos")
        check_descent("spos", self)

    def suit(self, space: SearchSpace) -> None:
        self.options = option_counts(space)
        self.length = Length(self.epochs, 1, 1, self.path_gradients)

    def check(self, problem: Problem) -> None:
        check_goals(problem, self.evaluations)

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space, 1)

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.shared = SharedWeights(problem, self)
        self.counts = self.shared.counts

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        step = self.length.step(feed, progress)
        path = uniform_paths(1, self.options, seed=self.shared.problem.seed, step=step)
        (batch,) = self.shared.draw(feed, 1, "each")
        metrics = self.shared.update([(self.shared.gates(path[0]), batch)], feed, step)
        self.counts.add_paths(path)
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return self.counts.report()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        return derive_shared(self.shared, self, feed, run, bars)

    def state_dict(self) -> dict[str, Any]:
        return self.shared.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared.load_state_dict(state)
