"""DARTS: the gradient through one unrolled step against the exact product (PAPERS F19), and its three forms; searches
of cells by any strategy resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cell_search import begun, digits, problem, stepped
from test_strategies import equal
from torch import Tensor

from pynas import DARTS, ENAS, SNAS, Uniform
from pynas.strategies import Strategy
from pynas.strategies.darts import unrolled_gradient
from pynas.training.data import Data
from pynas.training.feed import Feed

SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "alpha_lr": 0.05}


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


class Toy:
    """A small network whose hidden layer is mixed by alpha, in float64."""

    def __init__(self) -> None:
        self.weights = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 8), (6, 8), (8, 3))
        ]
        self.alpha = torch.randn(2, dtype=torch.float64, requires_grad=True)
        self.batches = [(torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))) for _ in range(2)]

    def loss(self, batch: int, weights: list[Tensor] | None = None) -> Tensor:
        (x, y), (first, second, last) = self.batches[batch], weights or self.weights
        mix = self.alpha.softmax(0)
        hidden = mix[0] * torch.tanh(x @ first) + mix[1] * torch.sigmoid(x @ second)
        return torch.nn.functional.cross_entropy(hidden @ last, y)


@pytest.mark.parametrize("lr", [0.025, 0.3])
def test_second_order_against_the_exact_product(lr: float) -> None:
    """F19: through w' = w - lr (momentum + grad_w L_train + decay w), differentiated twice by autograd."""
    toy, decay = Toy(), 3e-4
    velocities: list[Tensor | None] = [0.05 * torch.randn_like(weight) for weight in toy.weights]
    velocities[1] = None
    slopes = torch.autograd.grad(toy.loss(0), toy.weights, create_graph=True)
    moved = [
        weight - lr * (slope + decay * weight + (0 if velocity is None else velocity))
        for weight, slope, velocity in zip(toy.weights, slopes, velocities, strict=True)
    ]
    (exact,) = torch.autograd.grad(toy.loss(1, moved), toy.alpha)
    before = [weight.detach().clone() for weight in toy.weights]
    loss, found = unrolled_gradient(
        lambda: toy.loss(0), lambda: toy.loss(1), toy.weights, toy.alpha, lr, velocities, decay
    )
    assert float(loss) == pytest.approx(float(toy.loss(1, moved).detach()))
    (first_order,) = torch.autograd.grad(toy.loss(1, [w.detach() for w in moved]), toy.alpha)
    product = first_order - exact  # what the second order adds
    assert float(product.norm()) > 1e-6
    assert float((first_order - found - product).norm() / product.norm()) < 1e-2
    assert all(map(torch.equal, before, toy.weights))
    assert all(weight.grad is None for weight in toy.weights)


def test_schedule_of_the_released_code() -> None:
    """PAPERS E."""
    strategy = DARTS()
    assert (strategy.epochs, strategy.batch_size, strategy.order) == (50, 64, "second")
    assert (strategy.weight_lr, strategy.weight_lr_end, strategy.weight_momentum) == (0.025, 0.001, 0.9)
    assert (strategy.weight_decay, strategy.weight_clip) == (3e-4, 5.0)
    assert (strategy.alpha_lr, strategy.alpha_decay, strategy.rule) == (3e-4, 1e-3, "top2")


@pytest.mark.parametrize("order", ["first", "second", "single"])
def test_orders(order: Any, data: Data) -> None:
    """Bi-level takes held-out images for alpha; single-level none. Neither changes running statistics on the way."""
    strategy = DARTS(**SHORT, order=order)
    feed = begun(strategy, data, problem())
    drawn = []
    arch = feed.arch
    feed.arch = lambda: drawn.append(0) or arch()  # type: ignore[method-assign, func-returns-value]
    alpha = strategy.theta.logits.detach().clone()
    assert float(alpha.abs().max()) < 0.01
    logged = stepped(strategy, feed, range(3))
    assert torch.tensor(list(logged.values())).isfinite().all()
    assert not torch.equal(alpha, strategy.theta.logits)
    assert len(drawn) == (0 if order == "single" else 3)
    batches = 3 * (1 if order in ("single", "second") else 2)
    norm = strategy.net.net.stem[1]
    assert int(norm.num_batches_tracked) == batches
    passes = {"first": 2, "second": 5, "single": 1}[order]
    assert strategy.tally.gradient_passes == 3 * passes


def test_path_gradients_make_orders_comparable(data: Data) -> None:
    steps = {}
    for order in ("first", "second", "single"):
        strategy = DARTS(**SHORT, order=order, path_gradients=800)  # type: ignore[arg-type]
        strategy.suit(problem().space)
        feed = Feed(data, batch_size=16, seed=0)
        steps[order] = sum(strategy.steps(feed, epoch) for epoch in range(2))
    assert steps == {"first": 50, "second": 20, "single": 100}


STRATEGIES: list[Strategy] = [
    SNAS(**SHORT, drop_path=0.3, resample="cell", watch_images=32),
    DARTS(**SHORT, order="second"),
    ENAS(epochs=2, batch_size=16, controller_steps=2, controller_samples=2, samples=3),
    Uniform(epochs=2, batch_size=16, relaxation="concrete", samples=3),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=[f"{type(s).__name__}-{i}" for i, s in enumerate(STRATEGIES)])
def test_a_search_of_cells_resumes_bit_for_bit(strategy: Strategy, data: Data) -> None:
    given = problem(0.5, nodes=1)
    whole, broken, again = (copy.deepcopy(strategy) for _ in range(3))
    feed = begun(whole, data, given)
    last = whole.steps(feed, 0) + 1
    stepped(whole, feed, range(last))
    whole.end_epoch(0)
    other = begun(broken, data, given)
    stepped(broken, other, range(last - 2))
    state, position = copy.deepcopy(broken.state_dict()), copy.deepcopy(other.state_dict())
    rest = begun(again, data, given)
    torch.manual_seed(99)
    again.load_state_dict(state)
    rest.load_state_dict(position)
    stepped(again, rest, range(last - 2, last))
    again.end_epoch(0)
    assert equal(again.state_dict(), whole.state_dict())
    found = whole.derive(feed)
    assert again.derive(rest) == found
    assert given.budget is not None
    assert all(candidate.cost <= given.budget for candidate in found)
