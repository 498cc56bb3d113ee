"""Whether the options of a choice had equal chances: counts of their gradients, and what they say.

Definitions (FairNAS, arXiv 1907.01845, section 3), for the number of updates Y_li of option i of choice l: *expectation
fairness* is E(Y_l1) = ... = E(Y_lm), *strict fairness* is Y_l1 = ... = Y_lm after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pynas.choices import Choice, Gates

DOUBT = 0.001  # of the hypothesis that expectations are equal; below it we say that they are not


@dataclass(frozen=True)
class Verdict:
    """What the counts of a training say.

    Args:
        path_gradients: What was computed, in gradients of single paths: a pass that differentiates several options of a
            choice counts as so many.
        paths: Options of a choice that were differentiated in one pass, on average.
        least: The smallest count of an option, over all choices.
        most: The largest.
        strict: Whether counts were equal in every choice after every step.
        p: Probability of counts at least as unequal where expectations are equal and draws independent (chi-square);
            1 where counts never differed.
    """

    path_gradients: float
    paths: float
    least: float
    most: float
    strict: bool
    p: float

    @property
    def expectation(self) -> bool:
        """Whether equal expectations are in keeping with the counts."""
        return self.p >= DOUBT


class UpdateCounts:
    """How many gradients the weights of each option of each choice have had: Y of the definitions above.

    A gradient that reaches an option through a gate counts as much as the gate, so that soft gates compare with single
    paths.

    Args:
        choices: Of the space, in order.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)
        widths = torch.tensor([len(choice.options) for choice in choices])
        self.mask = torch.arange(int(widths.max())) < widths[:, None]
        self._widths = widths
        self.counts = torch.zeros(self.mask.shape, dtype=torch.float64)
        self._squares = torch.zeros(len(self.choices), dtype=torch.float64)
        self.passes = 0
        self.path_gradients = 0.0
        self.strict = True

    def add(self, updates: Tensor, passes: int, path_gradients: float) -> None:
        """Takes note of one step, or of several on the same independent draw of the strategy.

        Args:
            updates: Of each option, shape (choices, options); zero where a choice has no such option.
            passes: Forward passes that gave them.
            path_gradients: What that amounts to in gradients of single paths.
        """
        updates = updates.to(torch.float64)
        self.counts += updates
        away = (updates - self._mean(updates)) * self.mask
        self._squares += away.square().sum(1)
        self.passes += passes
        self.path_gradients += path_gradients
        # Exact for whole numbers; gates that add up to the same only by rounding count as unequal, which they are.
        self.strict = self.strict and bool((self.counts == self.counts[:, :1])[self.mask].all())

    def add_paths(self, paths: Tensor, times: int = 1) -> None:
        """Takes note of a step on single paths, shape (paths, choices), each of which had so many gradients."""
        options = torch.arange(self.mask.shape[1])
        updates = (paths.long()[:, :, None] == options).sum(0) * times
        self.add(updates, times * len(paths), times * len(paths))

    def add_gates(self, gates: Mapping[str, Gates]) -> None:
        """Takes note of a step of one pass under the gates of every choice, by its name."""
        updates = torch.zeros(self.mask.shape, dtype=torch.float64)
        means = [gates[choice.name].values.detach().double() for choice in self.choices]
        means = [values.mean(0) if values.dim() == 2 else values for values in means]
        rows = torch.cat(means).cpu().split([len(values) for values in means])  # from a GPU in one go
        for row, (choice, values) in enumerate(zip(self.choices, rows, strict=True)):
            train = list(gates[choice.name].train)
            updates[row, train] = values[train]
        computed = sum(len(gates[choice.name].train) for choice in self.choices)
        self.add(updates, 1, computed / len(self.choices))

    def _mean(self, values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True) / self._widths[:, None]

    def table(self) -> dict[str, dict[str, float]]:
        """Count of every option, by choice and option."""
        rows = self.counts.tolist()
        return {
            choice.name: dict(zip(choice.options, (_whole(value) for value in row), strict=False))
            for choice, row in zip(self.choices, rows, strict=True)
        }

    def verdict(self) -> Verdict:
        """What the counts say. With few draws `p` is a rough figure."""
        from scipy.stats import chi2

        unequal = ((self.counts - self._mean(self.counts)) * self.mask).square().sum(1)
        moved = self._squares > 0
        freedom = (self._widths - 1).double()
        statistic = float((freedom * unequal)[moved].div(self._squares[moved]).sum())
        p = float(chi2.sf(statistic, float(freedom[moved].sum()))) if moved.any() else 1.0
        inside = self.counts[self.mask]
        return Verdict(
            round(self.path_gradients, 6),
            self.path_gradients / self.passes if self.passes else 0.0,
            float(inside.min()),
            float(inside.max()),
            self.strict,
            p,
        )

    def report(self) -> dict[str, Any]:
        """Counts and verdict, for logs."""
        verdict = self.verdict()
        return {"updates": self.table(), "fairness": vars(verdict) | {"expectation": verdict.expectation}}

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts.clone(),
            "squares": self._squares.clone(),
            "passes": self.passes,
            "path_gradients": self.path_gradients,
            "strict": self.strict,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"].clone()
        self._squares = state["squares"].clone()
        self.passes, self.strict = int(state["passes"]), bool(state["strict"])
        self.path_gradients = float(state["path_gradients"])


def _whole(value: float) -> float:
    return int(value) if value == int(value) else round(value, 4)


def uniform_variance(draws: int, options: int) -> float:
    """Variance of an option's count after so many uniform draws: n (m - 1) / m^2."""
    return draws * (options - 1) / options**2


def uniform_equal_probability(draws: int, options: int) -> float:
    """Probability that all options of a choice have equal counts after so many uniform draws.

    n! / ((n/m)!^m m^n), and zero where m does not divide n.
    """
    if draws % options:
        return 0.0
    log = math.lgamma(draws + 1) - options * math.lgamma(draws // options + 1) - draws * math.log(options)
    return math.exp(log)
