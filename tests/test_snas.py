"""SNAS: its schedule, its loss in every form, its credit (PAPERS B3 to B6, F10), and where DARTS differs (F14)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cell_search import begun, digits, problem, stepped
from torch import Tensor, nn

from pynas import SNAS, Architecture, Gates, Supernet
from pynas.credit import Credit
from pynas.ops.cell import MixedEdge
from pynas.resources import LATENCIES
from pynas.spaces.cell import CellSpace
from pynas.strategies.relaxed import gates_of
from pynas.training.data import Data

SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "drop_path": 0.2, "alpha_lr": 0.05}


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


def test_schedule_of_the_released_code() -> None:
    """PAPERS B3 and B6."""
    strategy = SNAS()
    assert [round(strategy.temperature(epoch), 4) for epoch in (0, 50, 100, 149)] == [1.0, 0.6767, 0.3533, 0.0365]
    assert (strategy.epochs, strategy.batch_size) == (150, 64)
    assert (strategy.weight_lr, strategy.weight_lr_end, strategy.weight_momentum) == (0.025, 0.001, 0.9)
    assert (strategy.weight_decay, strategy.weight_clip, strategy.drop_path) == (3e-4, 5.0, 0.3)
    assert (strategy.alpha_lr, strategy.alpha_decay, strategy.alpha_clip) == (3e-4, 1e-3, 10.0)
    assert (strategy.measure, strategy.combination, strategy.estimator, strategy.eta) == (
        "paper",
        "log",
        "reparametrization",
        1e-2,
    )


FORMS: list[dict[str, Any]] = [
    *(
        {"estimator": estimator, "combination": combination}
        for estimator, combination in (
            ("reparametrization", "log"),
            ("reparametrization", "linear"),
            ("discrete", "linear"),
            ("policy_gradient", "log"),
        )
    ),
    *({"measure": measure} for measure in ("size", "access", "latency")),
    {"measure": "latency", "combination": "linear", "estimator": "policy_gradient"},
    {"resample": "cell", "estimator": "policy_gradient"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_cost_prefers_cheap_edges(form: dict[str, Any], data: Data) -> None:
    """A strong enough eta takes probability from separable convolutions and gives it to `none`, whatever measures."""
    strategy = SNAS(**{**SHORT, **form}, objective="eta", eta=1e6)
    feed = begun(strategy, data, problem())
    before = strategy.theta.probabilities().detach()
    logged = stepped(strategy, feed, range(6))
    assert torch.tensor(list(logged.values())).isfinite().all()
    after = strategy.theta.probabilities().detach()
    assert float(after[:, 0].mean()) > float(before[:, 0].mean())
    assert float(after[:, 5].mean()) < float(before[:, 5].mean())


def test_one_step_trains_weights_and_alpha(data: Data) -> None:
    """On the same batch, in one backward pass; images held out for the architecture are not touched."""
    strategy = SNAS(**SHORT)
    feed = begun(strategy, data, problem())
    feed.arch = None  # type: ignore[method-assign, assignment]
    weights = [p.detach().clone() for p in strategy.net.parameters()]
    alpha = strategy.theta.logits.detach().clone()
    stepped(strategy, feed, range(2))
    assert not torch.equal(alpha, strategy.theta.logits)
    assert not all(map(torch.equal, weights, strategy.net.parameters()))


def test_cells_of_a_type_share_a_draw_unless_it_is_drawn_again(data: Data) -> None:
    for resample, same in (("batch", True), ("cell", False)):
        strategy = SNAS(**SHORT, resample=resample)  # type: ignore[arg-type]
        begun(strategy, data, problem(cells=5))
        gates = strategy._gates(strategy._draw(0, 1))
        assert torch.equal(gates["cell0_0_2"].values, gates["cell2_0_2"].values) is same
        assert not torch.equal(gates["cell0_0_2"].values, gates["cell0_1_2"].values)


@pytest.mark.parametrize("measure", ["latency", "measured"])
def test_expected_latency_comes_under_its_bound(measure: str, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """E[latency] < delta by a multiplier: by the table's gradient, and by score function on whole measured networks."""
    given = problem(0.3, nodes=1)
    monkeypatch.setitem(LATENCIES._things, "summed", given.table.cost)
    settings = {"epochs": 6, "alpha_lr": 0.3, "multiplier_rate": 0.5, "measured_by": "summed"}
    strategy = SNAS(**{**SHORT, **settings}, measure=measure)
    feed = begun(strategy, data, given)
    assert given.budget is not None
    first = stepped(strategy, feed, range(1))["cost"]
    assert first > given.budget
    last = stepped(strategy, feed, range(1, 24))
    assert last["cost"] < 0.5 * (first + given.budget)
    for candidate in strategy.derive(feed):
        assert candidate.cost <= given.budget


def test_a_bound_needs_a_budget(data: Data) -> None:
    with pytest.raises(ValueError, match="give latency_ms, or use objective='eta'"):
        begun(SNAS(**SHORT, objective="lagrange"), data, problem())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha_lr": 0.0}, "snas's alpha_lr must be a positive number"),
        ({"eta": -1.0}, "snas's eta must not be negative"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
        ({"measured_by": "hsot"}, "Did you mean 'host'"),
        ({"estimator": "score"}, "estimator of strategy snas"),
        ({"batch_size": 1}, "batch_size >= 2"),
    ],
    ids=str,
)
def test_impossible_hyper_parameters(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SNAS(**settings)


# Credit, PAPERS B4 and F10.


def test_credits_of_a_node_add_up() -> None:
    """sum_i R_ij = -dL/dx_j . x_j: what the loss falls by where all that reaches a node grows, against differences."""
    space = CellSpace(input_size=8, cells=3, channels=2, nodes=2)
    net = Supernet(space).double().eval()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    rows = torch.rand(len(net.slots), 8, dtype=torch.float64).softmax(1)

    def loss(scaled: tuple[str, ...] = (), factor: float = 1.0) -> Tensor:
        grown = torch.tensor([factor if slot.name in scaled else 1.0 for slot in net.slots], dtype=torch.float64)
        return nn.functional.cross_entropy(net(x, gates_of(net.slots, rows * grown[:, None])), y)

    with Credit(net) as credit:
        value = loss()
    value.backward()
    credits = credit.slots()
    assert set(credits) == {slot.name for slot in net.slots}
    for cell, node in itertools.product(range(3), (2, 3)):
        edges = tuple(f"cell{cell}_{source}_{node}" for source in range(node))
        with torch.no_grad():
            grows = float(loss(edges, 1 + 1e-5) - loss(edges, 1 - 1e-5)) / 2e-5
        assert sum(credits[edge] for edge in edges) == pytest.approx(-grows, rel=1e-6, abs=1e-9)
    by_choice = credit.choices()
    assert by_choice["normal_0_2"] == pytest.approx(credits["cell0_0_2"])
    assert by_choice["reduce_0_2"] == pytest.approx(credits["cell1_0_2"] + credits["cell2_0_2"])


def test_credit_goes_to_the_chosen_operation_alone() -> None:
    """As draws become one-hot: an edge that is `none` gets nothing, and a lone identity its own share."""
    space = CellSpace(input_size=8, cells=3, channels=2, nodes=2)
    net = Supernet(space).double().eval()
    chosen = {choice.name: ("skip_connect",) for choice in space.choices()} | {"normal_0_3": ("none",)}
    architecture = Architecture("cell", chosen, space.options())
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])

    def credits(gates: dict[str, Gates]) -> dict[str, float]:
        with Credit(net) as credit:
            value = nn.functional.cross_entropy(net(x, gates), y)
        value.backward()
        return credit.slots()

    alone = credits(net.one_hot(architecture))
    rows = torch.stack([net.one_hot(architecture)[slot.name].values for slot in net.slots]).double()
    soft = credits(gates_of(net.slots, rows))
    assert "cell0_0_3" not in alone
    assert soft.pop("cell0_0_3") == 0.0
    assert alone == pytest.approx(soft, rel=1e-9, abs=1e-12)


# SNAS against DARTS, PAPERS eqs 18 and 19, F14.


class Toy(nn.Module):
    """Two edges in a row."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.edges = nn.ModuleList(self._edge(relu) for _ in range(2))

    @staticmethod
    def _edge(relu: bool) -> MixedEdge:
        first, second = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(2))
        options: dict[str, nn.Module] = {"none": nn.Identity()}  # is never computed
        options |= {"skip_connect": nn.Identity(), "a": first, "b": second}
        return MixedEdge({k: nn.Sequential(nn.ReLU(), op) if relu and k in "ab" else op for k, op in options.items()})

    def forward(self, x: Tensor, gates: list[Gates]) -> Tensor:
        for edge, each in zip(self.edges, gates, strict=True):
            y = edge(x, each)
            x = torch.zeros_like(x) if y is None else y
        return x


@pytest.mark.parametrize("relu", [False, True])
def test_objectives_of_snas_and_darts_are_equal_for_linear_networks_alone(relu: bool) -> None:
    """E[L(Z)] over all paths against L(E[Z]), for a loss that is linear in the output."""
    net, x = Toy(relu).double(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    direction, p = torch.randn_like(x), torch.rand(2, 4, dtype=torch.float64).softmax(1)

    def loss(gates: list[Gates]) -> Tensor:
        return (net(x, gates) * direction).sum()

    every = tuple(range(4))
    darts = loss([Gates(row, every, every) for row in p])
    snas = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(every, every):
        snas = snas + p[0, path[0]] * p[1, path[1]] * loss([Gates.one_hot(4, option) for option in path])
    apart = float((darts - snas).detach().abs())
    assert apart > 1e-3 if relu else apart < 1e-10
