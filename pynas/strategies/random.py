"""Random search: the baseline that every strategy is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pynas.architecture import Architecture
from pynas.budget import BudgetedPaths, cost_range, to_architecture
from pynas.fields import check_fields
from pynas.registry import STRATEGIES, SearchSpace
from pynas.strategies.base import Candidate, Problem, Strategy
from pynas.subsets import SubsetCosts, picks_any, random_subsets
from pynas.supernet import CostTable, mean_macs
from pynas.training.evaluate import accuracy
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric
from pynas.training.run import RunFolder
from pynas.training.train import Recipe, Training
from pynas.updates import UpdateCounts


def random_architectures(
    space: SearchSpace, table: CostTable, count: int, budget: float | None, slack: float, seed: int
) -> list[Architecture]:
    """Different architectures, uniform over all of the space whose cost lies in [(1 - slack) * budget, budget].

    Where subsets are chosen, options are taken in random order as long as they fit (`pynas.subsets`).

    May return fewer than `count` where the window holds fewer. Raises ValueError when the budget cannot be met.
    """
    if picks_any(table.choices):
        return random_subsets(space, table, count, SubsetCosts.of(table).high if budget is None else budget, seed)
    mask = table.choice_mask().numpy()
    uniform = np.where(mask, 0.0, -np.inf)
    limit = cost_range(table).high if budget is None else budget
    paths = BudgetedPaths(table, uniform, limit, 1.0 if budget is None else slack)
    found: dict[str, Architecture] = {}
    for path in paths.sample(20 * count, seed):
        architecture = to_architecture(space, table.choices, path)
        found.setdefault(architecture.fingerprint, architecture)
        if len(found) == count:
            break
    return list(found.values())


@STRATEGIES.register("random")
@dataclass
class RandomSearch(Strategy):
    """Trains random networks of the budget briefly, each alone, and keeps the best on held-out images.

    Args:
        epochs: Passes over the training images, all candidates together; a multiple of `candidates`.
        batch_size: Images per step.
        candidates: Networks that are tried.
        lr: Peak learning rate of each training.
    """

    epochs: int = 90
    batch_size: int = 192
    candidates: int = 6
    lr: float = 0.1

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "quick": {"epochs": 60, "batch_size": 64, "candidates": 6},
    }
    PICKS: ClassVar[tuple[str, ...]] = ("one", "any")
    COST: ClassVar[str] = "as many passes over the images as FBNet's paper preset, each of one path only"

    def __post_init__(self) -> None:
        check_fields(self, "strategy random")
        if self.candidates < 1 or self.epochs < self.candidates or self.epochs % self.candidates:
            raise ValueError(
                f"random needs epochs in a multiple of candidates, not {self.epochs} for {self.candidates}. Try epochs="
                f"{max(1, round(self.epochs / max(1, self.candidates))) * max(1, self.candidates)}."
            )
        self.recipe()
        self.tried = self.candidates  # fewer where the window holds fewer networks

    def macs_per_image(self, space: SearchSpace) -> float:
        return 3 * mean_macs(space, 1)

    def recipe(self) -> Recipe:
        """How one candidate is trained."""
        return Recipe(epochs=self.epochs // self.candidates, batch_size=self.batch_size, lr=self.lr)

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        self.architectures = random_architectures(
            problem.space, problem.table, self.candidates, problem.budget, problem.slack, problem.seed
        )
        self.tried = len(self.architectures)
        self.counts = UpdateCounts(problem.space.choices())
        self.accuracies: list[float] = []
        self._begin(0)

    def _begin(self, candidate: int) -> None:
        self.current = candidate
        torch.manual_seed(self.problem.seed + 1000 * (candidate + 1))
        net = self.architectures[candidate].build().to(self.problem.train_on)
        self.training = Training(net, self.recipe(), self.problem.amp)

    def _place(self, epoch: int) -> tuple[int, int]:
        return divmod(epoch, self.recipe().epochs)

    def steps(self, feed: Feed, epoch: int) -> int:
        return feed.steps_weights if self._place(epoch)[0] < self.tried else 0

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        candidate, epoch = self._place(progress.epoch)
        if epoch == 0 and progress.step == 0 and candidate > 0:
            self._begin(candidate)
        metrics = self.training.step(feed, Progress(epoch, progress.step))
        if epoch == self.training.epochs - 1 and progress.step == feed.steps_weights - 1:
            self.accuracies.append(accuracy(self.training.result(), feed.data.arch, feed.data, amp=self.problem.amp))
            times = self.training.epochs * feed.steps_weights
            self.counts.add(times * self._taken(candidate), times, times)
        return metrics

    def _taken(self, candidate: int) -> Tensor:
        """Options of a candidate, 0 or 1, shape (choices, options)."""
        chosen = self.architectures[candidate].choices
        taken = torch.zeros(self.counts.mask.shape, dtype=torch.float64)
        for row, choice in enumerate(self.counts.choices):
            taken[row, [choice.options.index(name) for name in chosen[choice.name]]] = 1
        return taken

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Counts are those of finished candidates; each has weights of its own, so they only show what was tried."""
        return {
            "candidate": self._place(epoch)[0],
            "accuracies": list(self.accuracies),
            **self.counts.report(),
        }

    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """All candidates, ranked by their accuracy on the images held out for the architecture."""
        found = [
            Candidate(architecture, right, self.problem.table.cost(architecture), "random")
            for architecture, right in zip(self.architectures, self.accuracies, strict=True)
        ]
        return sorted(found, key=lambda candidate: -candidate.accuracy)

    def state_dict(self) -> dict[str, Any]:
        return {
            "current": self.current,
            "accuracies": self.accuracies,
            "training": self.training.state_dict(),
            "counts": self.counts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin(state["current"])
        self.accuracies = list(state["accuracies"])
        self.counts.load_state_dict(state["counts"])
        self.training.load_state_dict(state["training"])
