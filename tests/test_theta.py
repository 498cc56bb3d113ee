"""What FBNet's theta learns, from a supernet whose accuracy is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_strategies import SHORT, problem

from cost_models.base import CostModel
from pynas import FBNet
from pynas.training.loop import Progress


class Stub(torch.nn.Module):
    """Stands for a supernet whose logit of class 0 counts the layers that chose the good option."""

    GOOD = 3
    device = torch.device("cpu")

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor, gates: Any) -> torch.Tensor:
        chosen = sum(gate.values[..., self.GOOD] for gate in gates.values())
        first = (self.gain * chosen).expand(len(x))
        return torch.stack([first, torch.zeros_like(first)], 1)


class OneClass:
    """Images that all belong to class 0."""

    steps_weights = steps_arch = 1

    def arch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)


SAMPLINGS = [
    {"sampling": "soft"},
    {"sampling": "soft", "draw": "image"},
    {"sampling": "hard"},
    {"sampling": "hard", "hard_gradient": "score"},
    {"sampling": "hard", "hard_gradient": "score", "draw": "image"},
]


def on_stub(model: CostModel, gain: float, share: float = 0.5, **settings: Any) -> FBNet:
    strategy = FBNet(**{**SHORT["fbnet"], "theta_lr": 0.1, "theta_decay": 0.0, "tau_start": 1.0, **settings})
    strategy.prepare(problem(model, share))
    strategy.net = Stub(gain)  # type: ignore[assignment]
    return strategy


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
def test_theta_learns_from_accuracy(settings: dict[str, Any], model: CostModel) -> None:
    """With latency weightless (beta = 0), the option that lowers the cross-entropy must win in every layer."""
    strategy = on_stub(model, gain=1.0, objective="paper", beta=0.0, alpha=1.0, **settings)
    for step in range(200):
        strategy.step(OneClass(), Progress(1, 1 + step))  # type: ignore[arg-type]
    p = strategy.theta.probabilities().detach()
    assert (p.argmax(1) == Stub.GOOD).all()
    assert (p[:, Stub.GOOD] > 0.6).all()


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_theta_is_steered_to_the_budget(share: float, settings: dict[str, Any], model: CostModel) -> None:
    """With accuracy constant, the expected latency must come to the middle of the allowed window."""
    strategy = on_stub(model, gain=0.0, share=share, objective="lagrange", **settings)
    for step in range(300):
        logged = strategy.step(OneClass(), Progress(1, 1 + step))  # type: ignore[arg-type]
    budget = strategy.problem.budget
    assert budget is not None
    assert 0.9 * budget <= logged["expected_cost"] <= budget


def test_score_gradient_equals_enumeration(model: CostModel) -> None:
    """The mean REINFORCE gradient over many draws against the exact gradient over all 729 networks."""
    strategy = on_stub(model, gain=1.0, objective="paper", **SAMPLINGS[4])
    with torch.no_grad():
        strategy.theta.logits.normal_()
    theta, costs, fixed = strategy.theta, strategy.sampler.costs, strategy.table.fixed
    paths = torch.cartesian_prod(*[torch.arange(9)] * 3)
    log_p = theta.log_probabilities()[torch.arange(3), paths].sum(1)
    counts = (paths == Stub.GOOD).sum(1).float()
    cost = costs[torch.arange(3), paths].sum(1) + fixed
    losses = torch.nn.functional.softplus(-counts)
    rewards = torch.stack([strategy.target.loss(ce, c, c) for ce, c in zip(losses, cost, strict=True)])
    exact = torch.autograd.grad((log_p.exp() * rewards).sum(), theta.logits)[0]
    sample = strategy.sampler.hard(1.0, 1, draws=20000)
    logits = strategy.net(torch.zeros(20000, 3, 8, 8), sample.gates)
    drawn = torch.nn.functional.cross_entropy(logits, torch.zeros(20000, dtype=torch.int64), reduction="none")
    mean = sample.hard_cost.mean() + fixed
    surrogate = strategy._score_function(drawn, sample, mean, mean)
    estimate = torch.autograd.grad(surrogate, theta.logits)[0]
    assert torch.nn.functional.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.97
    assert estimate.norm() == pytest.approx(float(exact.norm()), rel=0.15)
