"""SNAS: stochastic neural architecture search (Xie, Zheng, Liu and Lin, ICLR 2019, arXiv 1812.09926)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cost_models.snas import MEASURES
from pynas import concrete
from pynas.budget import cost_range, to_architecture
from pynas.choices import Gates
from pynas.credit import Credit
from pynas.fields import check_fields
from pynas.objective import LagrangeObjective, Objective, WeighedObjective
from pynas.ops.cell import set_drop_path
from pynas.registry import STRATEGIES, SearchSpace
from pynas.resources import (
    LATENCIES,
    PAPER_WEIGHTS,
    Combination,
    Estimator,
    SlotCosts,
    WholeNets,
    estimate,
    with_gradient,
)
from pynas.samplers import Theta
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.children import RULES, Rule, derived, judged, log_probabilities, watched
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
from pynas.supernet import Supernet, cost_table, mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, fast_layout
from pynas.training.run import RunFolder
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts

Measure = Literal["paper", "size", "flops", "access", "latency", "measured"]
WATCH = 1 << 40  # numbers of the draws that only look, apart from those of the search


@STRATEGIES.register("snas")
@dataclass
class SNAS(Strategy):
    """Weights and architecture in one backward pass on the same batch (SNAS, sections 2.1 to 2.3, Algorithm 1).

    Every edge's operations are weighed by a draw from the concrete distribution with parameters alpha; the generic loss
    E[L(Z)] + eta E[C(Z)] is differentiated through the draw, and weights and log alpha descend it together. The
    temperature falls linearly, so draws come near to one-hot vectors, and the child, in which every edge takes its most
    probable operation, `none` included, keeps its weights and needs no retraining.

    Hyper-parameters are those of the released code. Its eta for the mild, moderate and aggressive constraint is
    published nowhere. Defaults of eta there: 1e-2 (reparametrization, log), 1e-5 (reparametrization, linear), 1e-4 and
    1e-5 (policy gradient, log and linear), 1e-2 and 1e-4 (discrete, log and linear).

    Ours: images held out for the architecture train nothing, and children are judged on them; the article searches on
    all training images and judges on the test images. A budget is met, by a Lagrange multiplier on the expected latency
    during the search and exactly at the end.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        weight_lr: Of the weights' SGD at the beginning of its cosine.
        weight_lr_end: At its end.
        weight_momentum: Of that SGD.
        weight_decay: Of that SGD.
        weight_clip: Largest norm of the weights' gradient; 0 for none.
        alpha_lr: Of log alpha's Adam, whose betas are 0.5 and 0.999.
        alpha_decay: Weight decay of log alpha's Adam.
        alpha_clip: Largest norm of log alpha's gradient; 0 for none.
        temperature_start: Temperature (lambda) of the first epoch.
        temperature_end: That its linear fall would reach after the last.
        resample: One draw for the whole "batch", which all cells of a type share, or one for every "cell".
        measure: What C is. "paper" combines "size", "flops" and memory "access" (`cost_models.snas`); each of them can
            stand alone. "latency" is the device's table. "measured" times whole drawn networks (policy gradient).
        measured_by: What times them: a name in `pynas.resources.LATENCIES`.
        combination: "log" takes the mean of the measures' logarithms, edge by edge, "linear" 0.43 (2 size + flops /
            4000 + access / 100); a latency is in microseconds for "log", in milliseconds for "linear".
        estimator: Of the gradient of E[C(Z)]; see `pynas.resources.estimate`.
        baseline: Whether the policy gradient subtracts the mean cost of the operations of an edge.
        eta: Weight of C.
        objective: "eta" weighs C by it; "lagrange" steers the expected latency to the budget; "auto" takes the latter
            when there is a budget.
        multiplier_rate: Step size of the Lagrange multiplier.
        drop_path: Probability at the end of a linear rise that an edge is left out for an image (the code's command
            names 0.3; that it rises in the search, too, is unverified).
        rule: Of derivation: "argmax", or DARTS's "top2".
        samples: Networks drawn from alpha besides the child.
        calibrate: Images for the batch norms of children; 0 for none.
        path_gradients: Gradients of single paths in the whole training; 0 leaves it to `epochs`.
        watch_images: Held-out images on which search network and child are judged after every epoch; 0 for none.
        credit: Whether the credit of every edge is logged, from the first step of every epoch.
    """

    epochs: int = 150
    batch_size: int = 64
    weight_lr: float = 0.025
    weight_lr_end: float = 0.001
    weight_momentum: float = 0.9
    weight_decay: float = 3e-4
    weight_clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_decay: float = 1e-3
    alpha_clip: float = 10.0
    temperature_start: float = 1.0
    temperature_end: float = 0.03
    resample: Literal["batch", "cell"] = "batch"
    measure: Measure = "paper"
    measured_by: str = "host"
    combination: Combination = "log"
    estimator: Estimator = "reparametrization"
    baseline: bool = True
    eta: float = 1e-2
    objective: Literal["auto", "eta", "lagrange"] = "auto"
    multiplier_rate: float = 0.1
    drop_path: float = 0.3
    rule: Rule = "argmax"
    samples: int = 0
    calibrate: int = 512
    path_gradients: int = 0
    watch_images: int = 0
    credit: bool = True

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {"epochs": 24, "weight_lr": 0.05, "alpha_lr": 0.02, "drop_path": 0.0, "samples": 7},
    }
    COST: ClassVar[str] = "1.5 GPU-days in the paper (CIFAR-10, 8 cells of 16 channels)"

    def __post_init__(self) -> None:
        check_fields(self, "strategy snas")
        positive = ("weight_lr", "alpha_lr", "temperature_start", "temperature_end", "multiplier_rate")
        rest = ("weight_lr_end", "weight_decay", "weight_clip", "alpha_decay", "alpha_clip", "eta")
        counts = ("samples", "calibrate", "path_gradients", "watch_images")
        check_positive("snas", self, positive, (*rest, *counts))
        if not (0 <= self.weight_momentum < 1 and 0 <= self.drop_path < 1):
            raise ValueError("snas's weight_momentum and drop_path must lie in [0, 1).")
        LATENCIES.get(self.measured_by)

    def suit(self, space: SearchSpace) -> None:
        self.length = Length(self.epochs, mean_options(space), 1, self.path_gradients)

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space)

    def check(self, problem: Problem) -> None:
        super().check(problem)
        if self.objective == "lagrange" and problem.budget is None:
            raise ValueError("objective='lagrange' steers to a budget: give latency_ms, or use objective='eta'.")

    def prepare(self, problem: Problem) -> None:
        self.check(problem)
        self.suit(problem.space)
        self.problem, self.table = problem, problem.table
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.theta = Theta(self.net.choices)
        torch.nn.init.normal_(self.theta.logits, 1.0, 0.01)  # log alpha; the same on a GPU
        self.theta.to(problem.train_on)
        self.weights = WeightDescent(self.net, self)
        self.alpha_optimizer = torch.optim.Adam(
            [self.theta.logits], self.alpha_lr, betas=(0.5, 0.999), weight_decay=self.alpha_decay
        )
        self.target = self._objective()
        self.costs = self._slot_costs()
        self.whole_nets = WholeNets(LATENCIES.get(self.measured_by))
        self.choice_of = torch.tensor(self.table.choice_of, device=problem.train_on)
        # Which slot of its choice each slot is, so that with resample="cell" every one has a draw of its own.
        before = [self.table.choice_of[:slot].count(choice) for slot, choice in enumerate(self.table.choice_of)]
        turn = before if self.resample == "cell" else [0] * len(before)
        self.turn, self.turns = torch.tensor(turn, device=problem.train_on), max(turn) + 1
        self.counts, self.tally = UpdateCounts(self.net.choices), Tally()
        self.draws = 0
        self.history: list[Tensor] = []
        self.credits: dict[str, float] = {}

    def _objective(self) -> Objective:
        budget, table = self.problem.budget, self.table
        self.steered = self.objective == "lagrange" or (self.objective == "auto" and budget is not None)
        if not self.steered or budget is None:
            return WeighedObjective(self.eta)
        if budget >= cost_range(table).high:  # no network can violate it, so there is nothing to steer
            return LagrangeObjective(budget, rate=0.0, damping=0.0)
        return LagrangeObjective(budget * (1 - self.problem.slack / 2), self.multiplier_rate)

    def _slot_costs(self) -> SlotCosts:
        if self.steered:
            return SlotCosts([self.table], [1.0], "linear", averaged=False, device=self.net.device)
        if self.measure in ("latency", "measured"):
            log = self.combination == "log"
            scale = 1000.0 if log else 1.0
            return SlotCosts([self.table], [scale], self.combination, averaged=log, device=self.net.device)
        names = tuple(MEASURES) if self.measure == "paper" else (self.measure,)
        tables = [cost_table(self.problem.space, MEASURES[name]()) for name in names]
        weights = [PAPER_WEIGHTS[name] if self.combination == "linear" else 1.0 for name in names]
        return SlotCosts(tables, weights, self.combination, averaged=True, device=self.net.device)

    def temperature(self, epoch: int) -> float:
        """lambda of an epoch."""
        return (1 - epoch / self.epochs) * (self.temperature_start - self.temperature_end) + self.temperature_end

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        """Algorithm 1: one draw, one forward pass, one backward pass for weights and log alpha, one step of both."""
        step, steps = self.length.step(feed, progress), self.length.total(feed)
        x, y = feed.weights()
        lr = self.weights.begin(step, steps)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        set_drop_path(self.net, self.drop_path * step / steps)
        self.net.train()
        self.draws += 1
        drawn = self._draw(progress.epoch, self.draws)
        watch = Credit(self.net) if self.credit and progress.step == 0 else None
        with watch or contextlib.nullcontext(), autocast(self.problem.amp, self.net.device):
            logits = self.net(fast_layout(x), self._gates(drawn))
            cross_entropy = functional.cross_entropy(logits, y)
        cost = self._cost(drawn, progress.epoch)
        loss = self.target.loss(cross_entropy, cost, cost)
        loss.backward()
        if self.alpha_clip:
            torch.nn.utils.clip_grad_norm_([self.theta.logits], self.alpha_clip)
        self.weights.step()
        self.alpha_optimizer.step()
        self.credits = watch.choices() if watch is not None else self.credits
        self.counts.add_gates(by_choice(self.net, self._gates(drawn)))
        self.tally.add(self.length.gradients)
        metrics = {"loss": float(loss.detach()), "lr": lr, "cost": float(cost.detach())}
        metrics |= {"weight_loss": float(cross_entropy.detach()), "train_accuracy": right(logits, y)}
        metrics |= self.target.update(metrics["cost"])
        if self.watch_images and progress.step == self.steps(feed, progress.epoch) - 1:
            metrics |= self._watched(feed, progress.epoch)
        return metrics

    def _draw(self, epoch: int, number: int) -> concrete.Concrete:
        theta, temperature = self.theta, self.temperature(epoch)
        return concrete.draw(theta.logits, theta.mask, temperature, self.problem.seed, number, self.turns)

    def _gates(self, drawn: concrete.Concrete) -> dict[str, Gates]:
        return gates_of(self.net.slots, drawn.z[self.turn, self.choice_of])

    def _cost(self, drawn: concrete.Concrete, epoch: int) -> Tensor:
        """C: its gradient is that of the estimator; in milliseconds, whole and expected, where it is steered."""
        log_p = self.theta.log_probabilities()
        if self.measure == "measured":
            picked: list[int] = drawn.index[0].tolist()
            network = to_architecture(self.problem.space, self.net.choices, picked)
            return self.whole_nets.estimate(network, log_p[torch.arange(len(picked)), picked].sum())
        density = concrete.log_density(
            self.theta.logits, drawn.log_z.detach(), self.theta.mask, self.temperature(epoch)
        )[self.turn, self.choice_of]
        gates, p = drawn.z[self.turn, self.choice_of], log_p.exp()[self.choice_of]
        found = estimate(self.costs, self.estimator, gates, p, density, self.baseline)
        if not self.steered:
            return found
        return with_gradient(float(self.costs.slots(p.detach()).sum()) + self.table.fixed, found)

    def _looking(self, epoch: int) -> dict[str, Gates]:
        """Gates of a draw that trains nothing."""
        with torch.no_grad():
            return self._gates(self._draw(epoch, WATCH + epoch))

    def _watched(self, feed: Feed, epoch: int) -> dict[str, float]:
        child = RULES[self.rule](self.problem.space, log_probabilities(self.theta))
        return watched(self.net, self._looking(epoch), child, feed, self.watch_images, self.problem)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.history.append(self.theta.logits.detach().clone().cpu())
        return {
            "temperature": self.temperature(epoch),
            **theta_report(self.theta, self.table),
            "computed": self.tally.report(),
            "credit": {name: float(f"{value:.6g}") for name, value in self.credits.items()},
            **self.counts.report(),
        }

    def theta_history(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Log alpha after every epoch, shape (epochs, choices, options)."""
        return torch.stack(self.history).numpy()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """The child, and further draws from alpha, judged with the weights that they inherit."""
        found = derived(self.problem, log_probabilities(self.theta), self.rule, self.samples)
        set_drop_path(self.net, 0.0)
        gates = self._looking(self.epochs - 1)
        return judged(self.net, self.problem, feed, found, self.calibrate, run, bars, gates)

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "theta": self.theta.state_dict(),
            "weight_optimizer": self.weights.optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "objective": self.target.state_dict(),
            "whole_nets": self.whole_nets.state_dict(),
            "counts": self.counts.state_dict(),
            "tally": self.tally.state_dict(),
            "draws": self.draws,
            "credits": dict(self.credits),
            "history": torch.stack(self.history) if self.history else None,
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.theta.load_state_dict(state["theta"])
        self.weights.optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.target.load_state_dict(state["objective"])
        self.whole_nets.load_state_dict(state["whole_nets"])
        self.counts.load_state_dict(state["counts"])
        self.tally.load_state_dict(state["tally"])
        self.draws, self.credits = state["draws"], dict(state["credits"])
        self.history = [] if state["history"] is None else list(state["history"])
        set_random_state(state["rng"], self.net.device)
