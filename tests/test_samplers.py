"""Gates from theta, and the losses that theta descends."""

from __future__ import annotations

import math

import pytest
import torch

from cost_models.base import CostModel
from pynas import SPACES, Supernet
from pynas.objective import LagrangeObjective, PaperObjective
from pynas.samplers import GumbelSampler, Theta
from pynas.supernet import cost_table


@pytest.fixture
def sampler(model: CostModel) -> GumbelSampler:
    space = SPACES.get("fbnet_tiny")()
    theta = Theta(space.choices())
    with torch.no_grad():
        theta.logits.normal_()
    return GumbelSampler(theta, space.slots(), cost_table(space, model).by_choice(), seed=3)


def test_soft_gates_are_a_distribution(sampler: GumbelSampler) -> None:
    sample = sampler.soft(tau=1.0, step=1)
    for gates in sample.gates.values():
        assert gates.values.sum().item() == pytest.approx(1, abs=1e-5)
        assert gates.run == gates.train == tuple(range(9))
    total = sum((g.values * sampler.costs[row]).sum() for row, g in enumerate(sample.gates.values()))
    torch.testing.assert_close(sample.cost[0], total)


def test_hard_gates_run_one_option(sampler: GumbelSampler) -> None:
    sample = sampler.hard(tau=1.0, step=1)
    for row, gates in enumerate(sample.gates.values()):
        assert gates.run == gates.train == (int(sample.index[0, row]),)
        assert gates.values.tolist() == torch.nn.functional.one_hot(sample.index[0, row], 9).tolist()
        assert not gates.values.requires_grad
    chosen = sampler.costs[torch.arange(6), sample.index[0]].sum()
    assert float(sample.hard_cost) == pytest.approx(float(chosen), rel=1e-6)


def test_straight_through_has_the_soft_gradient(sampler: GumbelSampler) -> None:
    weights = torch.randn(6, 9)
    grads = []
    for sample in (sampler.soft(0.7, 5), sampler.hard(0.7, 5, straight_through=True)):
        total = sum((g.values * weights[row]).sum() for row, g in enumerate(sample.gates.values()))
        grads.append(torch.autograd.grad(total, sampler.theta.logits)[0])
    torch.testing.assert_close(grads[0], grads[1])
    straight = sampler.hard(0.7, 5, straight_through=True).gates["layer1"]
    assert straight.run == tuple(range(9))
    assert len(straight.train) == 1


def test_one_draw_per_image(sampler: GumbelSampler) -> None:
    sample = sampler.soft(1.0, 2, draws=8)
    assert all(gates.values.shape == (8, 9) for gates in sample.gates.values())
    assert sample.index.shape == (8, 6)
    hard = sampler.hard(1.0, 2, draws=8)
    for row, gates in enumerate(hard.gates.values()):
        assert gates.run == tuple(sorted(set(hard.index[:, row].tolist())))
    net = Supernet(SPACES.get("fbnet_tiny")())
    assert net(torch.randn(8, 3, 16, 16), hard.gates).shape == (8, 10)


def test_masked_options_are_never_drawn(sampler: GumbelSampler) -> None:
    mask = sampler.theta.mask.clone()
    mask[:, 8] = False
    assert all((sampler.hard(1.0, step, mask=mask).index != 8).all() for step in range(200))


def test_score_function_agrees_with_the_exact_gradient(sampler: GumbelSampler) -> None:
    """Mean of reward times grad log-probability over many draws is the gradient of the expected cost."""
    sample = sampler.hard(1.0, 7, draws=40000)
    reward = sample.hard_cost - sample.hard_cost.mean()
    estimate = torch.autograd.grad((reward * sample.log_prob.sum(-1)).mean(), sampler.theta.logits)[0]
    expected = (sampler.theta.probabilities() * sampler.costs).sum()
    exact = torch.autograd.grad(expected, sampler.theta.logits)[0]
    assert torch.nn.functional.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.98


def theta_after(model: CostModel, beta: float, steps: int = 150) -> tuple[Theta, float]:
    """Descends the paper's loss with a constant cross-entropy; returns theta and its expected latency."""
    space = SPACES.get("fbnet_tiny")()
    table = cost_table(space, model)
    theta = Theta(space.choices())
    sampler = GumbelSampler(theta, space.slots(), table.by_choice(), seed=0)
    objective = PaperObjective(0.2, beta, 1000.0, table.fixed)
    optimizer = torch.optim.SGD([theta.logits], 2.0)
    for step in range(steps):
        drawn = sampler.soft(1.0, step).cost.mean() + table.fixed
        loss = objective.loss(torch.tensor(2.0), drawn, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta, (theta.probabilities() * sampler.costs).sum().item() + table.fixed


def test_paper_loss_prefers_fast_blocks(model: CostModel) -> None:
    """PAPERS F5: with a constant cross-entropy theta concentrates on the cheapest option; larger beta, lower
    latency."""
    theta, latency = theta_after(model, 1.0, steps=400)
    table = cost_table(SPACES.get("fbnet_tiny")(), model).by_choice()
    assert theta.probabilities().argmax(1).tolist() == table.argmin(1).tolist()
    assert [theta_after(model, beta)[1] for beta in (0.3, 0.6, 1.2)] == sorted(
        [theta_after(model, beta)[1] for beta in (0.3, 0.6, 1.2)], reverse=True
    )
    assert latency < theta_after(model, 0.3)[1]


def test_paper_loss_value() -> None:
    """CE * alpha * log(LAT)^beta with the power on the logarithm, LAT in microseconds."""
    objective = PaperObjective(0.2, 0.6, 1000.0, 1.0)
    drawn = torch.tensor(20.0)
    value = objective.loss(torch.tensor(1.5), drawn, drawn)
    assert float(value) == pytest.approx(1.5 * 0.2 * math.log(20000.0) ** 0.6, rel=1e-5)


def test_paper_loss_needs_microseconds_above_one() -> None:
    with pytest.raises(ValueError, match="objective='lagrange'"):
        PaperObjective(0.2, 0.6, 1000.0, cheapest=0.001)


def test_lagrangian_reaches_its_target(model: CostModel) -> None:
    space = SPACES.get("fbnet_tiny")()
    table = cost_table(space, model)
    theta = Theta(space.choices())
    costs = table.by_choice().float()
    uniform = (theta.probabilities() * costs).sum().item() + table.fixed
    for target in (0.6 * uniform, 1.2 * uniform):
        theta = Theta(space.choices())
        objective = LagrangeObjective(target)
        optimizer = torch.optim.Adam([theta.logits], 0.1)
        for _ in range(300):
            expected = (theta.probabilities() * costs).sum() + table.fixed
            loss = objective.loss(torch.tensor(1.0), expected, expected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.update(expected.item())
        assert expected.item() == pytest.approx(target, rel=0.03)
