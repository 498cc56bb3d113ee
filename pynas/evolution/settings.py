"""Hyper-parameters of the evolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pynas.fields import check_fields


@dataclass(frozen=True)
class EvolutionSettings:
    """Hyper-parameters of multi-objective reinforced evolution.

    Values marked (unverified) are remembered of FairNAS and MoreMNAS (arXiv 1901.01074), whose search code was never
    released; what they mean in detail is our reading. The others are ours, chosen on oracles (see the README).

    Args:
        population: Networks that survive a generation, and that the search begins with (unverified).
        children: New networks of a generation. NSGA-II makes as many as the population; few children let selection
            and policy react to every evaluation, which saves evaluations where each is dear.
        entrants: Of the tournament that a parent wins: 2 in NSGA-II; more where few children leave a generation's
            survivors little changed.
        start: "spread" begins with networks spread evenly over what is known before evaluation (MACs, parameters, a
            latency table), "random" with uniform ones.
        crossover: Share of children that mix two parents, cell by cell; the others begin as a copy of one.
        mutation: Share of children that are mutated (unverified). A child that would repeat a known network is mutated
            in any case.
        p_random: Share of natural mutations: any choice, any other option (unverified).
        p_reinforced: Share of mutations proposed by the policy (unverified).
        p_prior: Share of mutations by roulette wheel on prior weights, by default on known costs (unverified).
        p_evaluated: Share of reinforced mutations led by the goals that need evaluation, p_M of the paper (unverified).
        p_known: Share led by the goals that are known before, p_{K-M} of the paper (unverified).
        hidden: Width of the policy's hidden layer.
        policy_lr: Of the policy's Adam.
        policy_steps: REINFORCE updates after a generation, on the mutations remembered.
        policy_memory: Mutations remembered.
        policy_entropy: Weight of the policy's entropy, which keeps it trying.
        baseline_decay: Of the moving baseline, per generation.

    Raises:
        ValueError: For a value out of range.
    """

    population: int = 70
    children: int = 10
    entrants: int = 4
    start: Literal["spread", "random"] = "spread"
    crossover: float = 1.0
    mutation: float = 0.8
    p_random: float = 0.2
    p_reinforced: float = 0.65
    p_prior: float = 0.15
    p_evaluated: float = 0.7
    p_known: float = 0.3
    hidden: int = 64
    policy_lr: float = 0.01
    policy_steps: int = 5
    policy_memory: int = 200
    policy_entropy: float = 0.01
    baseline_decay: float = 0.8

    def __post_init__(self) -> None:
        check_fields(self, "evolution")
        for name in ("population", "children", "entrants", "hidden", "policy_steps", "policy_memory"):
            least = 2 if name == "population" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} of evolution must be at least {least}, not {getattr(self, name)}.")
        for name in ("crossover", "mutation", "baseline_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of evolution must lie in [0, 1], not {getattr(self, name)!r}.")
        for names in (("p_random", "p_reinforced", "p_prior"), ("p_evaluated", "p_known")):
            shares = [getattr(self, name) for name in names]
            if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
                raise ValueError(f"{', '.join(names)} of evolution are shares and must add up to 1, not {shares}.")
        if not self.policy_lr > 0 or self.policy_entropy < 0:
            raise ValueError("policy_lr of evolution must be positive, policy_entropy not negative.")
