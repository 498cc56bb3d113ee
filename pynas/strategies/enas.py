"""ENAS: efficient architecture search via parameter sharing (Pham, Guan, Zoph, Le and Dean, ICML 2018,
arXiv 1802.03268)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pynas.budget import to_architecture
from pynas.choices import Gates
from pynas.fields import check_fields
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.strategies.children import Found, fits, judged
from pynas.strategies.controller import Controller, Rollout
from pynas.strategies.derive import sampled
from pynas.strategies.relaxed import Tally, check_positive, right
from pynas.strategies.shared_weights import Length
from pynas.supernet import Supernet, mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, cosine, fast_layout, set_lr
from pynas.training.run import RunFolder
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts

TRIES = 50  # draws for each network that is to lie within a budget
MARGINALS = 200  # draws that tell how often the controller takes each option


@STRATEGIES.register("enas")
@dataclass
class ENAS(Strategy):
    """Shared weights, and a controller that REINFORCE trains on how its networks do with them (ENAS, section 2).

    Every epoch trains the weights, a network that the controller draws for each batch, and then the controller: its
    reward is the accuracy of a drawn network on one batch of held-out images. At the end networks are drawn and judged.

    Hyper-parameters are those of the released script for cells, but for the LSTM's size, which is the article's (from
    memory, unverified). Cells, widths and operations are those of the space; there is no drop-path and no auxiliary
    head. That the two operations with a favoured start (`op_bias`) are the separable convolutions is from memory,
    unverified.

    Where there is a budget the controller does not know of it: networks outside are drawn again, and where it draws
    none inside, they come from how often it takes each option.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        weight_lr: Of the weights' SGD at the beginning of every cosine.
        weight_lr_end: At its end.
        restart_epochs: Length of the first cosine, in epochs.
        restart_factor: By which each following cosine is longer.
        weight_momentum: Of that SGD, Nesterov's.
        weight_decay: Of that SGD.
        weight_clip: Largest norm of the weights' gradient; 0 for none.
        controller_lr: Of the controller's Adam, whose betas are 0 and 0.999.
        controller_steps: Of the controller, after every epoch.
        controller_samples: Networks that a step of the controller averages over.
        entropy_weight: Of the entropy of the controller's decisions in the reward.
        baseline_decay: Of the moving average that is subtracted from rewards; it starts at the first reward.
        hidden: Units of the LSTM.
        temperature: Divides the controller's logits.
        tanh_constant: Bounds them.
        op_tanh_reduce: Divides that bound for operations.
        op_bias: That the logits of separable convolutions start with; in a space of cells.
        samples: Networks that are drawn and judged at the end.
        calibrate: Images for the batch norms of each; 0 for none.
        path_gradients: Gradients of single paths in the whole training; 0 leaves it to `epochs`.
    """

    epochs: int = 150
    batch_size: int = 160
    weight_lr: float = 0.05
    weight_lr_end: float = 5e-4
    restart_epochs: int = 10
    restart_factor: int = 2
    weight_momentum: float = 0.9
    weight_decay: float = 1e-4
    weight_clip: float = 5.0
    controller_lr: float = 0.0035
    controller_steps: int = 30
    controller_samples: int = 10
    entropy_weight: float = 1e-4
    baseline_decay: float = 0.999
    hidden: int = 100
    temperature: float = 1.0
    tanh_constant: float = 1.1
    op_tanh_reduce: float = 2.5
    op_bias: float = 10.0
    samples: int = 10
    calibrate: int = 512
    path_gradients: int = 0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {
            "epochs": 70,
            "batch_size": 64,
            "controller_steps": 10,
            "controller_samples": 4,
            "baseline_decay": 0.95,
        },
    }
    COST: ClassVar[str] = "0.5 GPU-days in the paper (CIFAR-10)"
    FAIR: ClassVar[tuple[str, str]] = ("no", "no")

    def __post_init__(self) -> None:
        check_fields(self, "strategy enas")
        positive = ("weight_lr", "controller_lr", "temperature", "tanh_constant", "op_tanh_reduce")
        whole = ("restart_epochs", "restart_factor", "controller_samples", "hidden", "samples")
        rest = ("weight_lr_end", "weight_decay", "weight_clip", "entropy_weight", "controller_steps", "calibrate")
        check_positive("enas", self, (*positive, *whole), (*rest, "path_gradients"))
        if not (0 <= self.weight_momentum < 1 and 0 <= self.baseline_decay < 1):
            raise ValueError("enas's weight_momentum and baseline_decay must lie in [0, 1).")

    def suit(self, space: SearchSpace) -> None:
        self.length = Length(self.epochs, 1, 1, self.path_gradients)

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space, 1)

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.problem = problem
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.controller = Controller(problem.space, self)  # on the CPU in any case: its decisions are the host's
        nesterov = self.weight_momentum > 0
        self.weight_optimizer = torch.optim.SGD(
            self.net.parameters(), self.weight_lr, self.weight_momentum, 0.0, self.weight_decay, nesterov
        )
        self.controller_optimizer = torch.optim.Adam(
            self.controller.parameters(), self.controller_lr, betas=(0.0, 0.999)
        )
        self.counts, self.tally = UpdateCounts(self.net.choices), Tally()
        self.baseline: float | None = None
        self.entropy, self.decisions = 0.0, 0

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch) + self.controller_steps

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        """One a step of the weights; the controller learns from forward passes alone."""
        return self.length.of(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        if progress.step < self.length.of(feed, progress.epoch):
            return self._weight_step(feed, progress)
        return self._controller_step(feed)

    def _weight_step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        lr = self.lr(progress.epoch + progress.step / self.length.of(feed, progress.epoch))
        set_lr(self.weight_optimizer, lr)
        with torch.no_grad():
            rollout = self.controller.sample()
        x, y = feed.weights()
        self.net.train()
        with autocast(self.problem.amp, self.net.device):
            logits = self.net(fast_layout(x), self._gates(rollout))
            loss = functional.cross_entropy(logits, y)
        self.weight_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.weight_clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.weight_clip)
        self.weight_optimizer.step()
        self.counts.add_paths(torch.tensor([rollout.path]))
        self.tally.add(1.0)
        value = float(loss.detach())
        return {"loss": value, "lr": lr, "weight_loss": value, "train_accuracy": right(logits, y)}

    def _controller_step(self, feed: Feed) -> dict[str, float]:
        """REINFORCE on several networks, each rewarded by its accuracy on a batch of its own."""
        self.net.train()
        self.controller_optimizer.zero_grad(set_to_none=True)
        losses, rewards, entropies = [], [], []
        for _ in range(self.controller_samples):
            rollout = self.controller.sample()
            x, y = feed.arch()
            with torch.no_grad(), autocast(self.problem.amp, self.net.device):
                accuracy = right(self.net(fast_layout(x), self._gates(rollout)), y)
            self.tally.forward_passes += 1
            entropy = float(rollout.entropy.detach())
            reward = accuracy + self.entropy_weight * entropy
            before = reward if self.baseline is None else self.baseline
            self.baseline = self.baseline_decay * before + (1 - self.baseline_decay) * reward
            loss = -rollout.log_probability * (reward - self.baseline)
            (loss / self.controller_samples).backward()
            losses.append(float(loss.detach()))
            rewards.append(reward)
            entropies.append(entropy)
            self.decisions = rollout.decisions
        self.controller_optimizer.step()
        self.entropy = _mean(entropies)
        return {"loss": _mean(losses), "controller_loss": _mean(losses), "reward": _mean(rewards)}

    def lr(self, epoch: float) -> float:
        """Learning rate at a moment of the search: cosines, each longer than the one before."""
        start, length = 0.0, float(self.restart_epochs)
        while epoch >= start + length:
            start, length = start + length, length * self.restart_factor
        share = (epoch - start) / length
        low = self.weight_lr_end
        return low + cosine(self.weight_lr - low, round(share * 1_000_000), 1_000_000)

    def _gates(self, rollout: Rollout) -> dict[str, Gates]:
        architecture = to_architecture(self.problem.space, self.net.choices, list(rollout.path))
        return self.net.one_hot(architecture)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {
            "controller_entropy": self.entropy,
            "controller_decisions": self.decisions,
            "computed": self.tally.report(),
            **self.counts.report(),
        }

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """Networks drawn from the controller within the budget, judged with the weights that they share."""
        space, wanted = self.problem.space, self.samples
        found: dict[str, tuple[str, Any]] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.problem.seed)
            drawn = [self.controller.sample(greedy=True)]
            drawn += [self.controller.sample() for _ in range(TRIES * wanted - 1)]
        for place, rollout in enumerate(drawn):
            network = to_architecture(space, self.net.choices, list(rollout.path))
            if len(found) < wanted and fits(self.problem, network):
                found.setdefault(network.fingerprint, ("sample" if place else "most probable decisions", network))
        children: Found = list(found.values()) or list(sampled(self.problem, self._marginals(drawn), wanted - 1))
        return judged(self.net, self.problem, feed, children, self.calibrate, run, bars)

    def _marginals(self, drawn: list[Rollout]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-frequency of every option among networks that were drawn, each seen once more than it was."""
        choices = self.net.choices
        counts = np.ones((len(choices), max(len(choice.options) for choice in choices)))
        for row, choice in enumerate(choices):
            counts[row, len(choice.options) :] = 0
        for rollout in drawn[-MARGINALS:]:
            counts[np.arange(len(choices)), rollout.path] += 1
        with np.errstate(divide="ignore"):
            found: np.ndarray[Any, np.dtype[np.float64]] = np.log(counts / counts.sum(1, keepdims=True))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "controller": self.controller.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "controller_optimizer": self.controller_optimizer.state_dict(),
            "counts": self.counts.state_dict(),
            "tally": self.tally.state_dict(),
            "baseline": self.baseline,
            "entropy": (self.entropy, self.decisions),
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.controller.load_state_dict(state["controller"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.controller_optimizer.load_state_dict(state["controller_optimizer"])
        self.counts.load_state_dict(state["counts"])
        self.tally.load_state_dict(state["tally"])
        self.baseline = state["baseline"]
        self.entropy, self.decisions = state["entropy"]
        set_random_state(state["rng"], self.net.device)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
