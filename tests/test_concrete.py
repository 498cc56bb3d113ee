"""The concrete distribution and the search gradient through it (PAPERS B3, B5), against quadrature and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pynas import SPACES, Supernet
from pynas.concrete import draw, log_density
from pynas.samplers import Theta
from pynas.strategies.relaxed import gates_of

TEMPERATURES = (1.0, 0.5, 0.1)


def every(log_alpha: Tensor) -> Tensor:
    return torch.ones_like(log_alpha, dtype=torch.bool)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_density_of_two_options_integrates_to_one(temperature: float) -> None:
    log_alpha = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    # z1 = sigmoid(t), so dz1 = z1 z2 dt; the density in t falls like exp(-lambda |t|).
    t = torch.linspace(-40 / temperature, 40 / temperature, 400_001, dtype=torch.float64)
    log_z = torch.stack([torch.nn.functional.logsigmoid(t), torch.nn.functional.logsigmoid(-t)], -1)
    density = (log_density(log_alpha, log_z[:, None], every(log_alpha), temperature)[:, 0] + log_z.sum(-1)).exp()
    assert float(torch.trapezoid(density, t)) == pytest.approx(1.0, abs=1e-6)


def test_density_is_the_formula_of_eight_options() -> None:
    """ln(7!) + 7 ln lambda + sum_k(log alpha_k - (lambda+1) ln Z_k) - 8 ln sum_k alpha_k Z_k^-lambda."""
    log_alpha = torch.randn(1, 8, dtype=torch.float64)
    z, temperature = torch.rand(8, dtype=torch.float64).softmax(0), 0.35
    expected = math.log(math.factorial(7)) + 7 * math.log(temperature)
    expected += float((log_alpha[0] - (temperature + 1) * z.log()).sum())
    expected -= 8 * math.log(float((log_alpha[0].exp() * z**-temperature).sum()))
    assert float(log_density(log_alpha, z.log()[None], every(log_alpha), temperature)) == pytest.approx(expected)


def test_density_leaves_out_what_is_no_option() -> None:
    log_alpha, z = torch.randn(1, 3, dtype=torch.float64), torch.rand(1, 3, dtype=torch.float64).softmax(1)
    wide = torch.cat([log_alpha, torch.full((1, 2), 9.0, dtype=torch.float64)], 1)
    wide_z = torch.cat([z.log(), torch.full((1, 2), -torch.inf, dtype=torch.float64)], 1)
    mask = torch.tensor([[True] * 3 + [False] * 2])
    torch.testing.assert_close(log_density(wide, wide_z, mask, 0.4), log_density(log_alpha, z.log(), mask[:, :3], 0.4))
    wide.requires_grad_()
    (slope,) = torch.autograd.grad(log_density(wide, wide_z, mask, 0.4).sum(), wide)
    assert slope.isfinite().all()
    assert (slope[:, 3:] == 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_the_density(temperature: float) -> None:
    log_alpha = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    log_z = draw(log_alpha.detach(), every(log_alpha), temperature, 0, 1).log_z
    mask = every(log_alpha)
    assert torch.autograd.gradcheck(lambda a: log_density(a, log_z, mask, temperature), (log_alpha,))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_draws_have_that_distribution(temperature: float) -> None:
    """Of two options: P(Z1 <= z) = sigmoid(lambda logit(z) - log(alpha1 / alpha2)); the largest is categorical."""
    from scipy import stats

    log_alpha = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    drawn = draw(log_alpha, every(log_alpha), temperature, seed=1, step=0, draws=20_000)
    logit = drawn.log_z[:, 0, 0] - drawn.log_z[:, 0, 1]
    below = torch.sigmoid(temperature * logit - 1.1)
    assert stats.kstest(below.numpy(), "uniform").pvalue > 0.01
    first = int((drawn.index == 0).sum())
    assert stats.binomtest(first, 20_000, float(torch.sigmoid(torch.tensor(1.1)))).pvalue > 0.01
    torch.testing.assert_close(drawn.z, drawn.log_z.exp())
    torch.testing.assert_close(drawn.z.sum(-1), torch.ones(20_000, 1, dtype=torch.float64))


def test_draws_are_functions_of_seed_and_step() -> None:
    log_alpha = torch.randn(2, 4)
    mask = every(log_alpha)
    assert torch.equal(draw(log_alpha, mask, 0.5, 3, 7).z, draw(log_alpha, mask, 0.5, 3, 7).z)
    assert not torch.equal(draw(log_alpha, mask, 0.5, 3, 7).z, draw(log_alpha, mask, 0.5, 3, 8).z)
    both = draw(log_alpha, mask, 0.5, 3, 7, draws=2).z
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_search_gradient(temperature: float) -> None:
    """Through a network of cells, against differences, and against B3: Z_k / lambda sum_k' (delta - Z_k') s_k', where
    s is the slope of the loss with respect to the gates, summed over the cells that share a choice."""
    space = SPACES.get("cell")(input_size=8, cells=3, channels=2, nodes=2)
    net = Supernet(space).double().eval()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    mask = Theta(net.choices).mask
    of = torch.tensor([net.choices.index(slot.choice) for slot in net.slots])
    log_alpha = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)

    def loss(alpha: Tensor) -> tuple[Tensor, Tensor]:
        z = draw(alpha, mask, temperature, 0, 5).z[0]
        return torch.nn.functional.cross_entropy(net(x, gates_of(net.slots, z[of])), y), z

    value, z = loss(log_alpha)
    slope, through = torch.autograd.grad(value, (log_alpha, z))
    by_formula = z / temperature * (through - (z * through).sum(-1, keepdim=True))
    torch.testing.assert_close(slope, by_formula.detach(), atol=1e-12, rtol=1e-9)
    step = 1e-6
    with torch.no_grad():
        for place in [(0, 0), (2, 3), (4, 5), (7, 7), (9, 1)]:
            moved = torch.zeros_like(log_alpha)
            moved[place] = step
            by_difference = float(loss(log_alpha + moved)[0] - loss(log_alpha - moved)[0]) / (2 * step)
            assert float(slope[place]) == pytest.approx(by_difference, rel=1e-3, abs=1e-9)
