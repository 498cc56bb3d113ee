"""FBNet: differentiable search over a stochastic supernet (Wu et al., CVPR 2019, arXiv 1812.03443)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pynas.budget import cost_range
from pynas.fields import check_fields
from pynas.objective import LagrangeObjective, Objective, PaperObjective
from pynas.registry import STRATEGIES, SearchSpace
from pynas.samplers import GumbelSampler, Sample, Theta
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.derive import ranked, sampled, submodels
from pynas.supernet import Supernet, mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, cosine, fast_layout, set_lr
from pynas.training.run import RunFolder
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts

CALIBRATE = 512  # images for the batch norms of a derived network


@STRATEGIES.register("fbnet")
@dataclass
class FBNet(Strategy):
    """Gumbel-softmax supernet with latency in the loss (FBNet, sections 3.1-3.3 and 4.1).

    Every epoch trains the weights on 80 % of the training images with theta fixed, then theta on the other 20 % with
    the weights fixed (first order). Afterwards networks are derived from theta. Defaults are the paper's schedule where
    it is known; learning rates, temperature and loss constants are those of public re-implementations.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step (24 on each of 8 GPUs in the paper).
        warmup_epochs: First epochs that train only weights.
        weight_lr: Peak of the cosine schedule of the weights' SGD.
        weight_momentum: Of that SGD.
        weight_decay: Of that SGD.
        theta_lr: Of theta's Adam.
        theta_decay: Weight decay of theta's Adam.
        tau_start: First temperature.
        tau_end: Temperature that the geometric fall reaches after the last epoch; 5 exp(-0.045 * 80) is a factor of
            exp(-0.045) in each of the 80 epochs that train theta (with anneal_from="start", 5 exp(-0.045 * 90) is).
        anneal_from: Whether tau falls from the first epoch or only while theta is trained; the paper does not say.
        sampling: "soft" runs all options, weighted by the mask (the trainable relaxation). "hard" computes one option a
            layer (the stochastic supernet itself).
        hard_gradient: Where theta's gradient comes from in hard sampling: "straight_through" computes the other options
            without weight gradients in theta steps; "score" uses the log-probability and a moving baseline.
        draw: One Gumbel draw for the whole "batch" or one per "image".
        objective: "paper" is CE * alpha * log(LAT)^beta, "lagrange" steers E[LAT] to the budget; "auto" takes the
            latter when there is a budget.
        alpha: Factor of the paper's loss.
        beta: Power of the paper's loss.
        multiplier_rate: Step size of the Lagrange multiplier.
        skip_dropout: Remedy against collapse to skips, off by default: probability, falling linearly to zero over
            the search, that a layer may not draw its skip in a step.
        entropy_weight: Another remedy, off by default: weight of a bonus on theta's mean entropy.
        samples: Networks drawn from theta besides the most probable one.
    """

    epochs: int = 90
    batch_size: int = 192
    warmup_epochs: int = 10
    weight_lr: float = 0.1
    weight_momentum: float = 0.9
    weight_decay: float = 1e-4
    theta_lr: float = 0.01
    theta_decay: float = 5e-4
    tau_start: float = 5.0
    tau_end: float = 5.0 * math.exp(-0.045 * 80)
    anneal_from: Literal["start", "theta"] = "theta"
    sampling: Literal["soft", "hard"] = "soft"
    hard_gradient: Literal["straight_through", "score"] = "straight_through"
    draw: Literal["batch", "image"] = "batch"
    objective: Literal["auto", "paper", "lagrange"] = "auto"
    alpha: float = 0.2
    beta: float = 0.6
    multiplier_rate: float = 0.1
    skip_dropout: float = 0.0
    entropy_weight: float = 0.0
    samples: int = 6

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {"epochs": 16, "batch_size": 64, "warmup_epochs": 4, "theta_lr": 0.1, "samples": 8},
    }
    FAIR: ClassVar[tuple[str, str]] = ("no", "no")
    COST: ClassVar[str] = "216 GPU-hours in the paper (8 GPUs, 27 hours, 100 classes of ImageNet)"

    def __post_init__(self) -> None:
        check_fields(self, "strategy fbnet")
        if self.epochs < 1 or self.batch_size < 2 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"fbnet needs epochs >= 1, batch_size >= 2 and 0 <= warmup_epochs < epochs, not {self.epochs}, "
                f"{self.batch_size} and {self.warmup_epochs}; for a short search set warmup_epochs too."
            )
        for name in ("weight_lr", "theta_lr", "tau_start", "tau_end", "alpha", "multiplier_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fbnet's {name} must be a positive number, not {getattr(self, name)!r}.")
        for name in ("weight_decay", "theta_decay", "beta", "entropy_weight", "samples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"fbnet's {name} must not be negative, but is {getattr(self, name)!r}.")
        if not (0 <= self.weight_momentum < 1 and 0 <= self.skip_dropout <= 1):
            raise ValueError("fbnet's weight_momentum must lie in [0, 1) and skip_dropout in [0, 1].")

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space, None if self.sampling == "soft" else 1)

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        self.table = problem.table
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.theta = Theta(self.net.choices).to(problem.train_on)
        self.sampler = GumbelSampler(self.theta, self.net.slots, self.table.by_choice(), problem.seed)
        self.target = self._objective()
        momentum, decay = self.weight_momentum, self.weight_decay
        self.weight_optimizer = torch.optim.SGD(self.net.parameters(), self.weight_lr, momentum, weight_decay=decay)
        self.theta_optimizer = torch.optim.Adam([self.theta.logits], self.theta_lr, weight_decay=self.theta_decay)
        self.counts = UpdateCounts(self.net.choices)
        self._first = {slot.choice.name: slot.name for slot in reversed(self.net.slots)}
        self.draws = 0  # number of Gumbel draws so far: the step of the counter-based generator
        self.baseline: float | None = None
        self.history: list[Tensor] = []
        self._skips = [
            choice.options.index("skip") if "skip" in choice.options else None for choice in self.net.choices
        ]

    def _objective(self) -> Objective:
        budget, table = self.problem.budget, self.table
        kind = self.objective if self.objective != "auto" else ("paper" if budget is None else "lagrange")
        if kind == "paper":
            return PaperObjective(self.alpha, self.beta, 1000.0 if table.unit == "ms" else 1.0, cost_range(table).low)
        if budget is None:
            raise ValueError("objective='lagrange' steers to a budget: give latency_ms, or use objective='paper'.")
        if budget >= cost_range(table).high:  # no network can violate it, so there is nothing to steer
            return LagrangeObjective(budget, rate=0.0, damping=0.0)
        return LagrangeObjective(budget * (1 - self.problem.slack / 2), self.multiplier_rate)

    def tau(self, epoch: int) -> float:
        """Temperature of an epoch."""
        first = self.warmup_epochs if self.anneal_from == "theta" else 0
        share = max(0, epoch - first) / max(1, self.epochs - first)
        return float(self.tau_start * (self.tau_end / self.tau_start) ** share)

    def steps(self, feed: Feed, epoch: int) -> int:
        return feed.steps_weights + (feed.steps_arch if epoch >= self.warmup_epochs else 0)

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        """One a step, of weights or of theta; the score function takes none for theta."""
        forward_only = self.sampling == "hard" and self.hard_gradient == "score"
        return feed.steps_weights if forward_only else self.steps(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        if progress.step < feed.steps_weights:
            return self._weight_step(feed, progress)
        return self._theta_step(feed, progress)

    def _weight_step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        done = progress.epoch * feed.steps_weights + progress.step
        lr = cosine(self.weight_lr, done, self.epochs * feed.steps_weights)
        set_lr(self.weight_optimizer, lr)
        x, y = feed.weights()
        self.net.train()
        with torch.no_grad():
            sample = self._draw(progress.epoch, len(x), straight_through=False)
        with autocast(self.problem.amp, self.net.device):
            logits = self.net(fast_layout(x), sample.gates)
            loss = functional.cross_entropy(logits, y)
        self.weight_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.weight_optimizer.step()
        self.counts.add_gates({choice: sample.gates[slot] for choice, slot in self._first.items()})
        value = float(loss.detach())
        return {"loss": value, "lr": lr, "weight_loss": value, "weight_accuracy": _right(logits, y)}

    def _theta_step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        x, y = feed.arch()
        self.net.train()
        score = self.sampling == "hard" and self.hard_gradient == "score"
        sample = self._draw(progress.epoch, len(x), straight_through=self.sampling == "hard" and not score)
        with autocast(self.problem.amp, self.net.device), torch.set_grad_enabled(not score):
            logits = self.net(fast_layout(x), sample.gates)
            losses = functional.cross_entropy(logits, y, reduction="none")
        cross_entropy = losses.mean()
        fixed = self.table.fixed
        expected = (self.theta.probabilities() * self.sampler.costs).sum() + fixed
        drawn = (sample.hard_cost if score else sample.cost).mean() + fixed
        loss = self.target.loss(cross_entropy, drawn, expected)
        surrogate = loss
        if score:
            surrogate = self._score_function(losses, sample, drawn, expected)
        if self.entropy_weight:
            surrogate = surrogate - self.entropy_weight * self.theta.entropy().mean()
        self.theta_optimizer.zero_grad(set_to_none=True)
        # Naming theta keeps autograd from computing weight gradients, about half of the backward pass.
        surrogate.backward(inputs=[self.theta.logits])
        self.theta_optimizer.step()
        logged = self.target.update(float(expected.detach()))
        return {
            "loss": float(loss.detach()),
            "theta_loss": float(loss.detach()),
            "theta_cross_entropy": float(cross_entropy.detach()),
            "theta_accuracy": _right(logits, y),
            "expected_cost": float(expected.detach()),
            **logged,
        }

    def _score_function(self, losses: Tensor, sample: Sample, drawn: Tensor, expected: Tensor) -> Tensor:
        """REINFORCE with a moving-average baseline; the cost's own gradient, where it has one, is exact."""
        per_draw = losses.detach() if len(sample.index) > 1 else losses.detach().mean()[None]
        costs = sample.hard_cost.detach() + self.table.fixed
        fixed_expected = expected.detach()
        reward = torch.stack(
            [self.target.loss(ce, cost, fixed_expected) for ce, cost in zip(per_draw, costs, strict=True)]
        )
        mean = float(reward.mean())
        before = mean if self.baseline is None else self.baseline
        advantage = reward - before
        self.baseline = 0.9 * before + 0.1 * mean
        log_prob = sample.log_prob.sum(-1)
        constant = losses.detach().mean()
        return (advantage * log_prob).mean() + self.target.loss(constant, drawn.detach(), expected)

    def _draw(self, epoch: int, images: int, straight_through: bool) -> Sample:
        self.draws += 1
        draws = images if self.draw == "image" else 1
        tau, mask = self.tau(epoch), self._allowed(epoch)
        if self.sampling == "soft":
            return self.sampler.soft(tau, self.draws, draws, mask)
        return self.sampler.hard(tau, self.draws, draws, mask, straight_through)

    def _allowed(self, epoch: int) -> Tensor | None:
        """Mask of the options that may be drawn: skip dropout takes some skips out."""
        probability = self.skip_dropout * (1 - epoch / self.epochs)
        if probability <= 0:
            return None
        mask = self.theta.mask.clone()
        random = np.random.default_rng((self.problem.seed, self.draws))
        for row, (skip, drop) in enumerate(
            zip(self._skips, random.random(len(self._skips)) < probability, strict=True)
        ):
            if skip is not None and drop:
                mask[row, skip] = False
        return mask

    def skip_share(self) -> float:
        """Mean probability of the skip over the layers that have one: near 1 is a collapse."""
        p = self.theta.probabilities().detach().cpu()
        shares = [float(p[row, skip]) for row, skip in enumerate(self._skips) if skip is not None]
        return math.fsum(shares) / len(shares) if shares else 0.0

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.history.append(self.theta.logits.detach().clone().cpu())
        with torch.no_grad():
            expected = float((self.theta.probabilities() * self.sampler.costs).sum()) + self.table.fixed
        entropy = [round(value, 4) for value in self.theta.entropy().tolist()]
        return {
            "tau": self.tau(epoch),
            "expected_cost": expected,
            "skip_share": self.skip_share(),
            "entropy": entropy,
            "mean_entropy": math.fsum(entropy) / len(entropy),
            **self.counts.report(),
        }

    def theta_history(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Theta after every epoch, shape (epochs, choices, options)."""
        return (
            torch.stack(self.history).numpy() if self.history else np.zeros((0, *self.theta.logits.shape), np.float32)
        )

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """The most probable network and samples from theta, all within the budget, ranked by their accuracy.

        Accuracy is that of inherited weights after batch-norm recalibration, on the images held out for theta. The
        paper trains several samples from scratch and keeps the best; `pynas.retrain(run, net=...)` trains others too.
        """
        log_p = self.theta.log_probabilities().detach().double().cpu().numpy()
        found = sampled(self.problem, log_p, self.samples)
        with bars("judging", len(found)) as bar:
            return ranked(self.problem, found, submodels(self.net, self.problem, feed, CALIBRATE, run), bar)

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "theta": self.theta.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "theta_optimizer": self.theta_optimizer.state_dict(),
            "objective": self.target.state_dict(),
            "counts": self.counts.state_dict(),
            "draws": self.draws,
            "baseline": self.baseline,
            "history": torch.stack(self.history) if self.history else None,
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.theta.load_state_dict(state["theta"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.theta_optimizer.load_state_dict(state["theta_optimizer"])
        self.target.load_state_dict(state["objective"])
        self.counts.load_state_dict(state["counts"])
        self.draws, self.baseline = state["draws"], state["baseline"]
        self.history = [] if state["history"] is None else list(state["history"])
        set_random_state(state["rng"], self.net.device)


def _right(logits: Tensor, y: Tensor) -> float:
    return float((logits.detach().argmax(1) == y).float().mean())
