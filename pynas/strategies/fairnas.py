"""FairNAS: a supernet trained under strict fairness (Chu, Zhang and Xu, ICCV 2021, arXiv 1907.01845)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pynas.fields import check_fields
from pynas.kernels.paths import fair_paths
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.derive import check_goals, derive_shared
from pynas.strategies.shared_weights import Length, SharedWeights, check_descent, option_counts
from pynas.supernet import mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric
from pynas.training.run import RunFolder

MOST_MODELS = 1000  # of a step


@STRATEGIES.register("fairnas")
@dataclass
class FairNAS(Strategy):
    """Strictly fair single paths (FairNAS, section 3.2 and Algorithm 1).

    A step draws, for every layer, an independent random permutation of its m options, and with them m networks in which
    every option stands exactly once. Their gradients are taken one after the other at the same weights, summed, and
    the weights descend the sum once. So after every step all options have had the same number of updates, and the order
    of the m networks makes no difference.

    Afterwards networks are judged with inherited weights, on images held out for the architecture, after a
    recalibration of batch norms. Without objectives they are sampled within the budget and ranked by accuracy; with
    objectives an evolution proposes them (`pynas.evolution`), and those that none dominates are kept.

    Epochs, batch, learning rate and decay are the paper's. That one batch serves all networks of a step, that gradients
    are summed and not averaged, and the recalibration are from memory of it, unverified. How many networks its
    evolution judged is not known: 2100, thirty times its population, is ours.

    Args:
        epochs: Passes over the training images; with `path_gradients` merely how the training is divided.
        batch_size: Images per batch.
        lr: Peak of the cosine schedule of SGD.
        momentum: Of SGD.
        weight_decay: On all parameters.
        batches: "shared" takes one batch a step for all its networks, "each" one for each of them.
        unequal: Where layers differ in their number of options. "deal" takes as many networks a step as the longest
            layer has options; every other layer deals its options from one shuffled deck after the other, so that after
            every step their counts differ by one at most, and are equal where their number divides m. "lcm" takes as
            many as the least common multiple, which keeps strict fairness in all layers.
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
    batches: Literal["shared", "each"] = "shared"
    unequal: Literal["deal", "lcm"] = "deal"
    path_gradients: int = 0
    samples: int = 64
    evaluations: int = 640
    calibrate: int = 512

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"samples": 960, "evaluations": 2100},
        "quick": {"epochs": 16, "batch_size": 64, "samples": 16, "evaluations": 80},
    }
    COST: ClassVar[str] = "10 GPU-days for the supernet and 2 for the search (from memory of the paper, unverified)"
    FAIR: ClassVar[tuple[str, str]] = ("yes", "yes")
    PURSUES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "strategy fairnas")
        check_descent("fairnas", self)

    def suit(self, space: SearchSpace) -> None:
        self.options = option_counts(space)
        self.models = max(self.options) if self.unequal == "deal" else math.lcm(*self.options)
        if self.models > MOST_MODELS:
            raise ValueError(
                f"The layers of space {space.name!r} have {sorted(set(self.options))} options; their least common "
                f"multiple, {self.models}, is too many networks for a step. Use unequal='deal'."
            )
        batches = 1 if self.batches == "shared" else self.models
        self.length = Length(self.epochs, self.models, batches, self.path_gradients)

    def check(self, problem: Problem) -> None:
        check_goals(problem, self.evaluations)

    def macs_per_image(self, space: SearchSpace) -> float:
        self.suit(space)
        return 3 * mean_macs(space, 1) * self.models

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.shared = SharedWeights(problem, self)
        self.counts = self.shared.counts

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        return self.models * self.steps(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        """Algorithm 1, lines 4 to 14."""
        step = self.length.step(feed, progress)
        paths = fair_round(self.options, self.models, self.shared.problem.seed, step)
        batches = self.shared.draw(feed, self.models, self.batches)
        models = [(self.shared.gates(path), batch) for path, batch in zip(paths.tolist(), batches, strict=True)]
        metrics = self.shared.update(models, feed, step)
        self.counts.add_paths(paths)
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return self.counts.report()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        return derive_shared(self.shared, self, feed, run, bars)

    def state_dict(self) -> dict[str, Any]:
        return self.shared.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared.load_state_dict(state)


def fair_round(options: Sequence[int], models: int, seed: int, step: int) -> Tensor:
    """The paths of one step: uint8, shape (models, layers), a function of seed and step alone.

    A layer of k options reads its column from an endless row of shuffled decks of k, `models` cards further at every
    step: one deck a step where k = models, and whole decks wherever k divides it.

    Args:
        options: Number of options of each layer.
        models: Paths of a step.
        seed: 0 .. 2^31.
        step: Of the whole training.

    >>> fair_round([3, 3, 2], 3, seed=0, step=0).sort(0).values.tolist()
    [[0, 0, 0], [1, 1, 0], [2, 2, 1]]
    """
    paths = torch.empty(models, len(options), dtype=torch.uint8)
    for k in sorted(set(options)):
        layers = [layer for layer, count in enumerate(options) if count == k]
        first = step * models
        decks = range(first // k, (first + models - 1) // k + 1)
        # Each number of options has a stream of its own, so that layers of different length are independent.
        dealt = torch.cat([fair_paths(1, [k] * len(layers), seed=seed + (k << 32), step=deck)[0] for deck in decks])
        paths[:, layers] = dealt[first - decks.start * k :][:models]
    return paths
