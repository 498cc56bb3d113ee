"""DARTS: differentiable architecture search (Liu, Simonyan and Yang, ICLR 2019, arXiv 1806.09055)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pynas.choices import Gates
from pynas.fields import check_fields
from pynas.registry import STRATEGIES, SearchSpace
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
from pynas.strategies.shared_weights import Batch, Length
from pynas.supernet import Supernet, mean_macs
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, fast_layout
from pynas.training.run import RunFolder
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts

Loss = Callable[[], Tensor]
PASSES = {"first": 2, "second": 5, "single": 1}  # differentiated ones of a step


@STRATEGIES.register("darts")
@dataclass
class DARTS(Strategy):
    """Every edge is the sum of all its operations, weighed by softmax(alpha) (DARTS, sections 2.2 to 2.4).

    Each step first lets alpha descend the loss on a batch of held-out images, then the weights the loss on one of
    theirs (Algorithm 1). Afterwards every node keeps its two strongest edges, each with its best operation but `none`.

    Hyper-parameters are those of the released code. It splits the training images in halves; here four fifths train the
    weights. As alpha is trained on the images that children are judged on, their accuracies there flatter a little; the
    test images stay unseen. A budget is met when networks are derived; during the search nothing steers to it.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        order: How alpha's gradient sees that weights follow it. "first": not at all. "second": through one unrolled
            step of the weights (section 2.3). "single": weights and alpha descend the loss on the same training batch,
            in one backward pass (the single-level variant that SNAS compares with).
        weight_lr: Of the weights' SGD at the beginning of its cosine.
        weight_lr_end: At its end.
        weight_momentum: Of that SGD.
        weight_decay: Of that SGD.
        weight_clip: Largest norm of the weights' gradient; 0 for none.
        alpha_lr: Of alpha's Adam, whose betas are 0.5 and 0.999.
        alpha_decay: Weight decay of alpha's Adam.
        rule: Of derivation: "top2", or "argmax" with `none`, as in SNAS.
        samples: Networks drawn from softmax(alpha) besides the child.
        calibrate: Images for the batch norms of children; 0 for none.
        path_gradients: Gradients of single paths in the whole training, alpha's included; 0 leaves it to `epochs`.
        watch_images: Held-out images on which search network and child are judged after every epoch; 0 for none.
    """

    epochs: int = 50
    batch_size: int = 64
    order: Literal["first", "second", "single"] = "second"
    weight_lr: float = 0.025
    weight_lr_end: float = 0.001
    weight_momentum: float = 0.9
    weight_decay: float = 3e-4
    weight_clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_decay: float = 1e-3
    rule: Rule = "top2"
    samples: int = 0
    calibrate: int = 512
    path_gradients: int = 0
    watch_images: int = 0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {"epochs": 16, "order": "first", "weight_lr": 0.05, "alpha_lr": 0.02, "samples": 7},
    }
    COST: ClassVar[str] = "1 GPU-day in the paper, 0.4 in first order (CIFAR-10, 8 cells of 16 channels)"
    FAIR: ClassVar[tuple[str, str]] = ("no", "no")

    def __post_init__(self) -> None:
        check_fields(self, "strategy darts")
        rest = ("weight_lr_end", "weight_decay", "weight_clip", "alpha_decay")
        counts = ("samples", "calibrate", "path_gradients", "watch_images")
        check_positive("darts", self, ("weight_lr", "alpha_lr"), (*rest, *counts))
        if not 0 <= self.weight_momentum < 1:
            raise ValueError(f"darts's weight_momentum must lie in [0, 1), not {self.weight_momentum!r}.")

    def suit(self, space: SearchSpace) -> None:
        gradients = PASSES[self.order] * mean_options(space)
        self.length = Length(self.epochs, gradients, 1, self.path_gradients)

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space) * PASSES[self.order]

    def prepare(self, problem: Problem) -> None:
        self.suit(problem.space)
        self.problem, self.table = problem, problem.table
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.theta = Theta(self.net.choices)
        torch.nn.init.normal_(self.theta.logits, 0.0, 1e-3)  # alpha; the same on a GPU
        self.theta.to(problem.train_on)
        self.weights = WeightDescent(self.net, self)
        self.alpha_optimizer = torch.optim.Adam(
            [self.theta.logits], self.alpha_lr, betas=(0.5, 0.999), weight_decay=self.alpha_decay
        )
        self.choice_of = torch.tensor(self.table.choice_of, device=problem.train_on)
        self.counts, self.tally = UpdateCounts(self.net.choices), Tally()
        self.history: list[Tensor] = []

    def steps(self, feed: Feed, epoch: int) -> int:
        return self.length.of(feed, epoch)

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        """One a step in one level. In two levels alpha's and the weights', and in second order three more: the unrolled
        step of the weights, and two for the finite difference."""
        return PASSES[self.order] * self.steps(feed, epoch)

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        step, steps = self.length.step(feed, progress), self.length.total(feed)
        train = _ready(feed.weights())
        metrics: dict[str, float] = {}
        self.net.train()
        if self.order != "single":
            metrics = self._alpha_step(train, _ready(feed.arch()), self.weights.begin(step, steps))
        lr = self.weights.begin(step, steps)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        gates = self._gates() if self.order == "single" else self._fixed_gates()
        logits, loss = self._forward(train, gates)
        loss.backward()
        self.weights.step()
        if self.order == "single":
            self.alpha_optimizer.step()
        self.counts.add_gates(by_choice(self.net, gates))
        self.tally.add(mean_options(self.problem.space), PASSES[self.order])
        metrics |= {"loss": float(loss.detach()), "lr": lr, "train_accuracy": right(logits, train[1])}
        if self.watch_images and progress.step == self.steps(feed, progress.epoch) - 1:
            child = RULES[self.rule](self.problem.space, log_probabilities(self.theta))
            metrics |= watched(self.net, self._fixed_gates(), child, feed, self.watch_images, self.problem)
        return metrics

    def _alpha_step(self, train: Batch, held_out: Batch, lr: float) -> dict[str, float]:
        logits: list[Tensor] = []

        def loss_on(batch: Batch) -> Tensor:
            found, loss = self._forward(batch, self._gates())
            logits.append(found.detach())
            return loss

        alpha = self.theta.logits
        if self.order == "first":
            loss = loss_on(held_out)
            (gradient,) = torch.autograd.grad(loss, [alpha])
        else:
            buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
            loss, gradient = unrolled_gradient(
                lambda: loss_on(train),
                lambda: loss_on(held_out),
                self.weights.parameters,
                alpha,
                lr,
                self._velocities(),
                self.weight_decay,
            )
            for name, buffer in self.net.named_buffers():  # statistics are those of steps that weights really took
                buffer.copy_(buffers[name])
        alpha.grad = gradient
        self.alpha_optimizer.step()
        on_held_out = logits[0] if self.order == "first" else logits[1]
        return {"alpha_loss": float(loss.detach()), "alpha_accuracy": right(on_held_out, held_out[1])}

    def _velocities(self) -> list[Tensor | None]:
        """What momentum adds to the next step of each weight."""
        state = self.weights.optimizer.state
        kept = [state[p].get("momentum_buffer") if p in state else None for p in self.weights.parameters]
        return [None if velocity is None else self.weight_momentum * velocity for velocity in kept]

    def _gates(self) -> dict[str, Gates]:
        return gates_of(self.net.slots, self.theta.probabilities()[self.choice_of])

    def _fixed_gates(self) -> dict[str, Gates]:
        with torch.no_grad():
            return self._gates()

    def _forward(self, batch: Batch, gates: Mapping[str, Gates]) -> tuple[Tensor, Tensor]:
        with autocast(self.problem.amp, self.net.device):
            logits = self.net(batch[0], gates)
            return logits, functional.cross_entropy(logits, batch[1])

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.history.append(self.theta.logits.detach().clone().cpu())
        return {**theta_report(self.theta, self.table), "computed": self.tally.report(), **self.counts.report()}

    def theta_history(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Alpha after every epoch, shape (epochs, choices, options)."""
        return torch.stack(self.history).numpy()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """The child of the rule, and draws from softmax(alpha), judged with the weights that they inherit."""
        found = derived(self.problem, log_probabilities(self.theta), self.rule, self.samples)
        return judged(self.net, self.problem, feed, found, self.calibrate, run, bars, self._fixed_gates())

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "theta": self.theta.state_dict(),
            "weight_optimizer": self.weights.optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "counts": self.counts.state_dict(),
            "tally": self.tally.state_dict(),
            "history": torch.stack(self.history) if self.history else None,
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.theta.load_state_dict(state["theta"])
        self.weights.optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.counts.load_state_dict(state["counts"])
        self.tally.load_state_dict(state["tally"])
        self.history = [] if state["history"] is None else list(state["history"])
        set_random_state(state["rng"], self.net.device)


def unrolled_gradient(
    train_loss: Loss,
    held_out_loss: Loss,
    weights: Sequence[Tensor],
    alpha: Tensor,
    lr: float,
    velocities: Sequence[Tensor | None],
    decay: float,
    radius: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Gradient of the held-out loss after one step of the weights, with respect to alpha (DARTS, eqs. 6 to 8).

    With w' = w - lr (momentum + grad_w L_train(w) + decay w), it is grad_alpha L_val(w') - lr * (product of the mixed
    second derivative of L_train and grad_w' L_val(w')). The product is a difference of grad_alpha L_train between
    w + eps v and w - eps v, eps = radius / |v|.

    Args:
        train_loss: Computes the training loss with weights and alpha as they are.
        held_out_loss: The held-out loss.
        weights: Changed on the way, and put back bit for bit.
        alpha: Parameters of the architecture.
        lr: Of the unrolled step.
        velocities: What momentum adds to the step of each weight, already multiplied by the momentum.
        decay: Of the weights.
        radius: Norm of the difference of weights.

    Returns:
        The held-out loss at w', and the gradient.
    """
    kept = [weight.detach().clone() for weight in weights]
    slopes = _slopes(train_loss(), weights)
    with torch.no_grad():
        for weight, slope, velocity in zip(weights, slopes, velocities, strict=True):
            step = slope + decay * weight
            weight.sub_(step if velocity is None else step + velocity, alpha=lr)
    loss = held_out_loss()
    gradient, *directions = _slopes(loss, [alpha, *weights])
    length = torch.stack([direction.norm() for direction in directions]).norm()
    epsilon = radius / float(length.clamp_min(1e-12))
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for weight, start, direction in zip(weights, kept, directions, strict=True):
                weight.copy_(start).add_(direction, alpha=sign * epsilon)
        sides += _slopes(train_loss(), [alpha])
    with torch.no_grad():
        for weight, start in zip(weights, kept, strict=True):
            weight.copy_(start)
    return loss.detach(), gradient - lr * (sides[0] - sides[1]) / (2 * epsilon)


def _slopes(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(of), allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(of, found, strict=True)]


def _ready(batch: Batch) -> Batch:
    return fast_layout(batch[0]), batch[1]
