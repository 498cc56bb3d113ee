"""Samplers: theta in, gates out. Gates are the only thing that a sampler makes and a supernet reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pynas.choices import Choice, Gates, Slot
from pynas.kernels.gumbel import GumbelGates, gumbel_gates


class Theta(nn.Module):
    """Logits of a factorised distribution over architectures: P(option i of choice l) = softmax(theta_l)_i.

    Args:
        choices: Of the space. Starts uniform (all zero): FBNet's paper does not give its initial value, and public code
            sets 1/9 everywhere, which is the same distribution.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        super().__init__()
        self.choices = tuple(choices)
        width = max(len(choice.options) for choice in choices)
        self.logits = nn.Parameter(torch.zeros(len(choices), width))
        mask = torch.zeros(len(choices), width, dtype=torch.bool)
        for row, choice in enumerate(choices):
            mask[row, : len(choice.options)] = True
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def log_probabilities(self) -> Tensor:
        """(choices, options), minus infinity where a choice has no such option."""
        return self.logits.masked_fill(~self.mask, -torch.inf).log_softmax(-1)

    def probabilities(self) -> Tensor:
        """(choices, options), differentiable."""
        return self.logits.masked_fill(~self.mask, -torch.inf).softmax(-1)

    def entropy(self) -> Tensor:
        """Entropy of every choice in nats, shape (choices,), differentiable."""
        p = self.probabilities()
        return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


@dataclass(frozen=True)
class Sample:
    """One draw of gates for all slots.

    Args:
        gates: By slot name.
        index: Drawn option of each choice, int64, shape (draws, choices).
        log_prob: Log-probability of each drawn option under theta, shape (draws, choices), differentiable.
        cost: Cost of the gates without the fixed part, shape (draws,), differentiable; for straight-through gates the
            value is that of the drawn options.
        hard_cost: Cost of the drawn options without the fixed part, shape (draws,).
    """

    gates: Mapping[str, Gates]
    index: Tensor
    log_prob: Tensor
    cost: Tensor
    hard_cost: Tensor


class GumbelSampler:
    """Gates by Gumbel-softmax (FBNet eqs. 4-8, arXiv 1611.01144), one kernel call for all layers.

    Args:
        theta: The distribution; gates come out where it is.
        slots: Of the supernet.
        costs: Cost of every option of every choice, shape (choices, options).
        seed: Together with the step it determines the draw.
    """

    def __init__(self, theta: Theta, slots: Sequence[Slot], costs: Tensor, seed: int) -> None:
        self.theta = theta
        self.seed = seed
        self.costs = costs.to(theta.logits)
        self._rows = {choice.name: row for row, choice in enumerate(theta.choices)}
        self._slots = tuple(slots)

    def soft(self, tau: float, step: int, draws: int = 1, mask: Tensor | None = None) -> Sample:
        """All options run, weighted by the soft mask; one draw for the batch or one per image (`draws` = B)."""
        drawn = self._draw(tau, step, draws, mask)
        gates = {}
        for slot in self._slots:
            row, width = self._rows[slot.choice.name], len(slot.choice.options)
            every = tuple(range(width))
            gates[slot.name] = Gates(_squeeze(drawn.soft[:, row, :width]), every, every)
        return self._sample(gates, drawn)

    def hard(
        self, tau: float, step: int, draws: int = 1, mask: Tensor | None = None, straight_through: bool = False
    ) -> Sample:
        """Only drawn options count in the forward pass.

        Args:
            tau: Temperature of the soft gates behind the straight-through gradient.
            step: Number of the draw.
            draws: 1 for the batch, or B for one per image (then the union of the drawn options runs).
            mask: Options that may be drawn; all by default.
            straight_through: Gates carry the gradient of the soft gates, for which all options must run, the ones that
                were not drawn without a graph. Otherwise only drawn options run and gates carry no gradient.
        """
        drawn = self._draw(tau, step, draws, mask)
        one_hot = nn.functional.one_hot(drawn.index, drawn.soft.shape[-1]).to(drawn.soft.dtype)
        values = one_hot + (drawn.soft - drawn.soft.detach()) if straight_through else one_hot
        picked: list[list[int]] = drawn.index.T.tolist()
        gates = {}
        for slot in self._slots:
            row, width = self._rows[slot.choice.name], len(slot.choice.options)
            train = tuple(sorted(set(picked[row])))
            run = tuple(range(width)) if straight_through else train
            gates[slot.name] = Gates(_squeeze(values[:, row, :width]), run, train)
        sample = self._sample(gates, drawn)
        through = sample.hard_cost + (sample.cost - sample.cost.detach())
        return dataclasses.replace(sample, cost=through) if straight_through else sample

    def _draw(self, tau: float, step: int, draws: int, mask: Tensor | None) -> GumbelGates:
        allowed = self.theta.mask if mask is None else mask
        return gumbel_gates(self.theta.logits, allowed, self.costs, tau, self.seed, step, draws)

    def _sample(self, gates: Mapping[str, Gates], drawn: GumbelGates) -> Sample:
        rows = torch.arange(len(self.theta.choices), device=self.costs.device)
        hard_cost = self.costs[rows, drawn.index].sum(-1)
        return Sample(gates, drawn.index, drawn.log_prob, drawn.cost, hard_cost)


def _squeeze(values: Tensor) -> Tensor:
    return values[0] if values.shape[0] == 1 else values
