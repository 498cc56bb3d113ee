"""The frozen uniform distribution: weights trained under a distribution over networks that nothing optimises.

The baseline that the SNAS article (arXiv 1812.09926) sets against DARTS in one level, which does worse than it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from pynas import concrete
from pynas.choices import Gates
from pynas.fields import check_fields
from pynas.registry import STRATEGIES, SearchSpace
from pynas.samplers import Theta
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.children import judged
from pynas.strategies.random import random_architectures
from pynas.strategies.relaxed import (
    Tally,
    WeightDescent,
    by_choice,
    check_positive,
    gates_of,
    mean_options,
    right,
    theta_report,
)
from pynas.strategies.shared_weights import Length
from pynas.supernet import Supernet, mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, fast_layout
from pynas.training.run import RunFolder
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts


@STRATEGIES.register("uniform")
@dataclass
class Uniform(Strategy):
    """All operations of every edge, weighed as in DARTS or SNAS, but with a distribution that stays uniform.

    Networks are drawn uniformly within the budget and judged with the weights that they inherit.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        relaxation: "mean" weighs all operations alike, as DARTS with alpha at zero; "concrete" draws weights as SNAS
            does, with its falling temperature.
        weight_lr: Of the weights' SGD at the beginning of its cosine.
        weight_lr_end: At its end.
        weight_momentum: Of that SGD.
        weight_decay: Of that SGD.
        weight_clip: Largest norm of the weights' gradient; 0 for none.
        temperature_start: Temperature of the first epoch.
        temperature_end: That its linear fall would reach after the last.
        samples: Networks that are drawn and judged at the end.
        calibrate: Images for the batch norms of each; 0 for none.
        path_gradients: Gradients of single paths in the whole training; 0 leaves it to `epochs`.
    """

    epochs: int = 150
    batch_size: int = 64
    relaxation: Literal["mean", "concrete"] = "mean"
    weight_lr: float = 0.025
    weight_lr_end: float = 0.001
    weight_momentum: float = 0.9
    weight_decay: float = 3e-4
    weight_clip: float = 5.0
    temperature_start: float = 1.0
    temperature_end: float = 0.03
    samples: int = 16
    calibrate: int = 512
    path_gradients: int = 0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {"epochs": 24, "weight_lr": 0.05, "samples": 8},
    }
    COST: ClassVar[str] = "as many passes over the images as SNAS's paper preset"
    FAIR: ClassVar[tuple[str, str]] = ("no", "no")

    def __post_init__(self) -> None:
        check_fields(self, "strategy uniform")
        positive = ("weight_lr", "temperature_start", "temperature_end", "samples")
        rest = ("weight_lr_end", "weight_decay", "weight_clip", "calibrate", "path_gradients")
        check_positive("uniform", self, positive, rest)
        if not 0 <= self.weight_momentum < 1:
            raise ValueError(f"uniform's weight_momentum must lie in [0, 1), not {self.weight_momentum!r}.")

    def suit(self, space: SearchSpace) -> None:
        self.length = Length(self.epochs, mean_options(space), 1, self.path_gradients)

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space)

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.problem, self.table = problem, problem.table
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.theta = Theta(self.net.choices).requires_grad_(False).to(problem.train_on)  # stays at zero
        self.weights = WeightDescent(self.net, self)
        self.choice_of = torch.tensor(self.table.choice_of, device=problem.train_on)
        self.counts, self.tally = UpdateCounts(self.net.choices), Tally()
        self.draws = 0

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        lr = self.weights.begin(self.length.step(feed, progress), self.length.total(feed))
        x, y = feed.weights()
        self.net.train()
        self.draws += 1
        gates = self._gates(progress.epoch, self.draws)
        with autocast(self.problem.amp, self.net.device):
            logits = self.net(fast_layout(x), gates)
            loss = functional.cross_entropy(logits, y)
        loss.backward()
        self.weights.step()
        self.counts.add_gates(by_choice(self.net, gates))
        self.tally.add(self.length.gradients)
        return {"loss": float(loss.detach()), "lr": lr, "train_accuracy": right(logits, y)}

    def _gates(self, epoch: int, number: int) -> dict[str, Gates]:
        rows = self.theta.probabilities()
        if self.relaxation == "concrete":
            fall = (1 - epoch / self.epochs) * (self.temperature_start - self.temperature_end)
            temperature = fall + self.temperature_end
            rows = concrete.draw(self.theta.logits, self.theta.mask, temperature, self.problem.seed, number).z[0]
        return gates_of(self.net.slots, rows[self.choice_of])

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {**theta_report(self.theta, self.table), "computed": self.tally.report(), **self.counts.report()}

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """Uniform draws within the budget, judged with the weights that they inherit."""
        given = self.problem
        drawn = random_architectures(given.space, given.table, self.samples, given.budget, given.slack, given.seed)
        found = [("sample", architecture) for architecture in drawn]
        gates = self._gates(self.epochs - 1, 0)
        return judged(self.net, given, feed, found, self.calibrate, run, bars, gates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "weight_optimizer": self.weights.optimizer.state_dict(),
            "counts": self.counts.state_dict(),
            "tally": self.tally.state_dict(),
            "draws": self.draws,
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.weights.optimizer.load_state_dict(state["weight_optimizer"])
        self.counts.load_state_dict(state["counts"])
        self.tally.load_state_dict(state["tally"])
        self.draws = state["draws"]
        set_random_state(state["rng"], self.net.device)
