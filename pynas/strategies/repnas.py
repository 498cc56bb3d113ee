"""RepNAS: branches of every block, searched in the run that trains the network (arXiv 2109.03508)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.analytic import Macs
from pynas.branch_sampler import BranchDraw, BranchSampler
from pynas.fields import check_fields
from pynas.ops.rep import RepBlock
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.subsets import SubsetCosts, subset_architecture
from pynas.supernet import Supernet, cost_table
from pynas.training.evaluate import Norm, accuracy
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.optim import autocast, cosine, fast_layout, set_lr
from pynas.training.run import RunFolder
from pynas.training.train import Recipe
from pynas.training.where import random_state, set_random_state
from pynas.updates import UpdateCounts


@STRATEGIES.register("repnas")
@dataclass
class RepNAS(Strategy):
    """One-stage search of branches under a budget over the whole network (schedule and gates of the released code).

    Every step ranks the noisy logits of all branches of the net, runs those within the budget, and updates weights and
    logits by the same batch. First the logits stand still, so that random subsets train; then both are trained; then
    the branches of largest logits are fixed, running statistics begin anew, and the network trains to its end. What
    comes out is trained: it is tested and exported as it is. The article's own formula for the importance of a branch
    and its table of settings are not known; defaults are the released code's.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        frozen_epochs: First epochs, in which random branches train.
        joint_epochs: Epochs after these, in which logits are trained as well.
        lr: Peak of the cosine schedule, to zero over all epochs, of the weights' SGD.
        momentum: Of that SGD.
        weight_decay: Of that SGD; not on batch norms and biases.
        clip: Largest norm of the weights' gradient; 0 for none.
        logit_lr: Of the logits' Adam (the first version of the released code has 1e-3).
        logit_beta: First beta of that Adam; the second is 0.999.
        logit_decay: Weight decay of that Adam, which falls to zero over the joint epochs by a cosine.
        label_smoothing: Of the cross-entropy.
        at_fix: Where branches shared a kernel: whether they go on doing so ("shared") or get copies of their slices
            ("separate") when they are fixed.
    """

    epochs: int = 150
    batch_size: int = 256
    frozen_epochs: int = 15
    joint_epochs: int = 35
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 5.0
    logit_lr: float = 1e-4
    logit_beta: float = 0.5
    logit_decay: float = 5e-4
    label_smoothing: float = 0.0
    at_fix: Literal["shared", "separate"] = "shared"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {},
        "quick": {"epochs": 30, "batch_size": 64, "frozen_epochs": 3, "joint_epochs": 7, "logit_lr": 0.01},
    }
    SPACE_OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"preset": "released", "sharing": False}}
    PICKS: ClassVar[tuple[str, ...]] = ("any",)
    TRAINS: ClassVar[bool] = True
    COST: ClassVar[str] = "one training of the host, 150 epochs, with as many branches as the budget allows"

    def __post_init__(self) -> None:
        check_fields(self, "strategy repnas")
        if self.batch_size < 2 or self.frozen_epochs < 0 or self.joint_epochs < 0:
            raise ValueError("repnas needs batch_size >= 2, frozen_epochs >= 0 and joint_epochs >= 0.")
        if self.epochs <= self.frozen_epochs + self.joint_epochs:
            raise ValueError(
                f"repnas needs an epoch at least for the fixed branches: epochs > frozen_epochs + joint_epochs, not "
                f"{self.epochs} for {self.frozen_epochs} and {self.joint_epochs}; for a short search lower these too."
            )
        for name in ("lr", "logit_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"repnas's {name} must be a positive number, not {getattr(self, name)!r}.")
        for name in ("weight_decay", "logit_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"repnas's {name} must not be negative, but is {getattr(self, name)!r}.")
        for name in ("momentum", "logit_beta", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"repnas's {name} must lie in [0, 1), not {getattr(self, name)!r}.")
        self._share = 1.0  # of the branches that run; known once there is a problem

    def recipe(self) -> Recipe:
        """How a network whose branches are given is trained likewise."""
        return Recipe(
            self.epochs,
            self.batch_size,
            self.lr,
            0.0,
            self.momentum,
            self.weight_decay,
            self.label_smoothing,
            ema_decay=0.0,
            clip=self.clip,
            nesterov=False,
            decay="weights",
        )

    def check(self, problem: Problem) -> None:
        super().check(problem)
        costs = SubsetCosts.of(problem.table)
        budget = self._budget(problem)
        costs.check(budget)
        self._share = min(1.0, (budget - costs.fixed) / max(costs.high - costs.fixed, 1e-12))

    def _budget(self, problem: Problem) -> float:
        return SubsetCosts.of(problem.table).high if problem.budget is None else problem.budget

    def macs_per_image(self, space: SearchSpace) -> float:
        costs = SubsetCosts.of(cost_table(space, Macs()))
        return 3 * (costs.fixed + self._share * (costs.high - costs.fixed))

    def prepare(self, problem: Problem) -> None:
        self.check_space(problem.space)
        self.check(problem)
        self.problem = problem
        self.net = fast_layout(Supernet(problem.space).to(problem.train_on))
        self.sampler = BranchSampler(
            self.net.choices, self.net.slots, problem.table, self._budget(problem), problem.seed
        ).to(problem.train_on)
        self.counts = UpdateCounts(self.net.choices)
        self.logit_optimizer = torch.optim.Adam(
            [self.sampler.logits], self.logit_lr, (self.logit_beta, 0.999), weight_decay=self.logit_decay
        )
        self.weight_optimizer = self._descent()
        self.kept: Tensor | None = None  # branches that were fixed, bool, (choices, options)
        self.draws = 0
        self.history: list[Tensor] = []

    def _descent(self) -> torch.optim.SGD:
        decayed = [p for p in self.net.parameters() if p.dim() > 1]
        free = [p for p in self.net.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": free, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, self.lr, self.momentum)

    def steps(self, feed: Feed, epoch: int) -> int:
        return feed.steps_weights

    def phase(self, epoch: int) -> Literal["frozen", "joint", "fixed"]:
        """What an epoch trains: random branches, logits and weights, or the branches that were kept."""
        if epoch < self.frozen_epochs:
            return "frozen"
        return "joint" if epoch < self.frozen_epochs + self.joint_epochs else "fixed"

    def step(self, feed: Feed, progress: Progress) -> dict[str, float]:
        phase = self.phase(progress.epoch)
        if phase == "fixed" and self.kept is None:
            self._fix(self.sampler.best())
        done, total = progress.epoch * feed.steps_weights + progress.step, self.epochs * feed.steps_weights
        lr = cosine(self.lr, done, total)
        set_lr(self.weight_optimizer, lr)
        draw = self._draw()
        x, y = feed.weights()
        self.net.train()
        with autocast(self.problem.amp, self.net.device):
            logits = self.net(fast_layout(x), draw.gates)
            loss = functional.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.weight_optimizer.zero_grad(set_to_none=True)
        self.logit_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.weight_optimizer.step()
        if phase == "joint":
            before = (progress.epoch - self.frozen_epochs) * feed.steps_weights + progress.step
            decay = cosine(self.logit_decay, before, self.joint_epochs * feed.steps_weights)
            self.logit_optimizer.param_groups[0]["weight_decay"] = decay
            self.logit_optimizer.step()
        self.counts.add_gates({slot.choice.name: draw.gates[slot.name] for slot in reversed(self.net.slots)})
        right = float((logits.detach().argmax(1) == y).float().mean())
        on = {"branches": float(draw.taken.sum()), "empty_blocks": float(draw.empty)}
        return {"loss": float(loss.detach()), "train_accuracy": right, "lr": lr, **on}

    def _draw(self) -> BranchDraw:
        if self.kept is not None:
            return self.sampler.fixed(self.kept)
        self.draws += 1
        return self.sampler.draw(self.draws)

    def _fix(self, kept: Tensor) -> None:
        """Decides the branches, and begins running statistics anew, which had mixed all subsets."""
        self._keep(kept)
        for module in self.net.modules():
            if isinstance(module, Norm):
                module.reset_running_stats()

    def _keep(self, kept: Tensor) -> None:
        self.kept = kept
        if self.at_fix == "separate":
            for module in self.net.modules():
                if isinstance(module, RepBlock):
                    module.separate()
            fast_layout(self.net)
            self.weight_optimizer = self._descent()

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        logits = self.sampler.logits.detach().clone().cpu()
        self.history.append(logits)
        inside = logits[self.sampler.costs.mask]
        return {
            "phase": self.phase(epoch),
            "logit_least": float(inside.min()),
            "logit_most": float(inside.max()),
            "logit_spread": float(inside.std()),
            **self.counts.report(),
        }

    def theta_history(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits after every epoch, shape (epochs, choices, options)."""
        if not self.history:
            return np.zeros((0, *self.sampler.logits.shape), np.float32)
        return torch.stack(self.history).numpy()

    def result(self) -> nn.Module:
        assert self.kept is not None
        return self.net.inherit(subset_architecture(self.problem.space, self.kept)).eval()

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """The network whose branches were fixed, as trained.

        Its accuracy is on the images "for the architecture", which in a run are among those that it was trained on.
        """
        assert self.kept is not None
        architecture = subset_architecture(self.problem.space, self.kept)
        right = accuracy(self.result().to(self.net.device), feed.data.arch, feed.data, amp=self.problem.amp)
        return [Candidate(architecture, right, self.problem.table.cost(architecture), "kept branches")]

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "logits": self.sampler.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "logit_optimizer": self.logit_optimizer.state_dict(),
            "counts": self.counts.state_dict(),
            "kept": self.kept,
            "draws": self.draws,
            "history": torch.stack(self.history) if self.history else None,
            "rng": random_state(self.net.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kept"] is not None:
            self._keep(state["kept"])
        self.net.load_state_dict(state["net"])
        self.sampler.load_state_dict(state["logits"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.logit_optimizer.load_state_dict(state["logit_optimizer"])
        self.counts.load_state_dict(state["counts"])
        self.draws = state["draws"]
        self.history = [] if state["history"] is None else list(state["history"])
        set_random_state(state["rng"], self.net.device)
