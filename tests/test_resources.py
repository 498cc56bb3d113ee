"""SNAS's resource costs: the three measures, their combination, the three estimators, whole networks (PAPERS B5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cost_models.snas import MEASURES
from pynas import SPACES, Architecture, published
from pynas.concrete import draw, log_density
from pynas.resources import LATENCIES, PAPER_WEIGHTS, Estimator, SlotCosts, WholeNets, estimate
from pynas.supernet import CostTable, cost_table

# PAPERS B5 for C = 16, 32x32: size, flops, access.
STRIDE_1 = {
    "none": (0, 0, 0),
    "max_pool_3x3": (0, 147_456, 32_768),
    "avg_pool_3x3": (0, 147_456, 32_768),
    "skip_connect": (0, 0, 32_768),
    "sep_conv_3x3": (800, 819_200, 131_872),
    "sep_conv_5x5": (1312, 1_343_488, 132_384),
    "dil_conv_3x3": (400, 409_600, 65_936),
    "dil_conv_5x5": (656, 671_744, 66_192),
}
STRIDE_2 = {"sep_conv_3x3": (800, 204_800, 45_856), "skip_connect": (256, 65_536, 37_120)} | dict.fromkeys(
    ("max_pool_3x3", "avg_pool_3x3"), (0, 36864, 20480)
)
SMALL = {"input_size": 8, "cells": 4, "channels": 4, "nodes": 2}


@pytest.mark.parametrize(("stride", "rows"), [(1, STRIDE_1), (2, STRIDE_2)])
@pytest.mark.parametrize("affine", [False, True])
def test_cost_table_of_the_article(stride: int, rows: dict[str, tuple[int, int, int]], affine: bool) -> None:
    from pynas.ops.cell import CellFamily

    first = SPACES.get("cell")(affine=affine).slots()[0]
    assert (first.in_channels, first.size) == (16, 32)
    slot = dataclasses.replace(first, stride=stride)
    for name, expected in rows.items():
        spec = CellFamily().spec(slot, name)
        assert tuple(MEASURES[measure]().cost(spec) for measure in ("size", "flops", "access")) == expected, name


def tables(choices: int = 1) -> tuple[list[CostTable], list[float]]:
    space = SPACES.get("cell")(**SMALL)
    return [cost_table(space, MEASURES[name]()) for name in MEASURES], [PAPER_WEIGHTS[name] for name in MEASURES]


def test_combinations() -> None:
    """Linear: 0.43 (2 size + flops / 4000 + access / 100); log: the mean of three logarithms of expected costs, at
    least 1; both over the cells of a type, divided by their number."""
    found, weights = tables()
    gates = torch.rand(len(found[0].slots), 8, dtype=torch.float64).softmax(1)
    linear = SlotCosts(found, weights, "linear", averaged=True).slots(gates)
    log = SlotCosts(found, [1.0] * 3, "log", averaged=True).slots(gates)
    cells = {"normal": 2, "reduce": 2}
    for slot in range(len(gates)):
        size, flops, access = (float((table.values[slot] * gates[slot]).sum()) for table in found)
        share = cells[found[0].choices[found[0].choice_of[slot]].name.split("_")[0]]
        assert float(linear[slot]) == pytest.approx(0.43 * (2 * size + flops / 4000 + access / 100) / share)
        logs = [math.log(max(1.0, value)) for value in (size, flops, access)]
        assert float(log[slot]) == pytest.approx(sum(logs) / 3 / share)


def test_a_slot_of_none_costs_nothing() -> None:
    found, weights = tables()
    nothing = torch.zeros(len(found[0].slots), 8, dtype=torch.float64)
    nothing[:, 0] = 1.0
    for combination, scale in (("linear", weights), ("log", [1.0] * 3)):
        assert float(SlotCosts(found, scale, combination, averaged=True).slots(nothing).abs().sum()) == 0.0


DRAWS = 40_000


def gradients(temperature: float, estimator: Estimator, combination: str = "linear", baseline: bool = True) -> Tensor:
    """Of the cost of one edge, of many draws: (DRAWS, options)."""
    values = torch.tensor([0.0, 1.0, 1.5, 4.0, 6.0], dtype=torch.float64) + 1.0
    table = CostTable((), (), tuple(range(DRAWS)), values.expand(DRAWS, -1), torch.ones(DRAWS, 5) > 0, 0.0, "", {})
    costs = SlotCosts([table], [1.0], combination, averaged=False)  # type: ignore[arg-type]
    costs.values = costs.values.double()
    log_alpha = torch.tensor([0.3, -0.2, 0.9, 0.0, -0.5], dtype=torch.float64).repeat(DRAWS, 1).requires_grad_()
    mask = torch.ones_like(log_alpha, dtype=torch.bool)
    drawn = draw(log_alpha, mask, temperature, seed=2, step=0)
    density = log_density(log_alpha, drawn.log_z[0].detach(), mask, temperature)
    found = estimate(costs, estimator, drawn.z[0], log_alpha.softmax(-1), density, baseline)
    (slope,) = torch.autograd.grad(found, log_alpha)
    return slope


def agree(a: Tensor, b: Tensor, extra: float = 0.0) -> bool:
    """Whether means are equal to within four standard errors (and a bias)."""
    error = ((a.var(0) + b.var(0)) / DRAWS).sqrt()
    return bool(((a.mean(0) - b.mean(0)).abs() <= 4 * error + extra + 1e-12).all())


@pytest.mark.parametrize("combination", ["linear", "log"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05])
def test_score_function_and_reparametrization_agree(
    temperature: float, combination: str, record_property: Callable[[str, object], None]
) -> None:
    """At every temperature both are unbiased for the same expectation; the variances are reported."""
    through = gradients(temperature, "reparametrization", combination)
    score = gradients(temperature, "policy_gradient", combination)
    bare = gradients(temperature, "policy_gradient", combination, baseline=False)
    assert agree(through, score)
    assert agree(through, bare)
    variances = [float(slope.var(0).sum()) for slope in (through, score, bare)]
    record_property("variances of reparametrization, policy gradient, and that without baseline", variances)
    if temperature >= 0.3:  # towards zero the variance of the reparametrization grows like 1 / lambda
        assert variances[0] < variances[1] < variances[2]


def test_estimators_agree_as_the_temperature_falls(record_property: Callable[[str, object], None]) -> None:
    """The expectation of a linear cost is "discrete", which the others come to as draws become one-hot."""
    exact = gradients(1.0, "discrete")
    assert float(exact.var(0).sum()) < 1e-20
    gaps = []
    for temperature in (1.0, 0.3, 0.02):
        through, score = (gradients(temperature, name) for name in ("reparametrization", "policy_gradient"))
        gaps.append(float((through.mean(0) - exact[0]).norm()))
        record_property(f"variances at {temperature}", [float(slope.var(0).sum()) for slope in (through, score)])
    assert gaps[0] > gaps[1]
    assert agree(through, exact)
    assert agree(score, exact)
    at_one = gradients(1.0, "reparametrization")
    assert not agree(at_one, exact)  # the test can tell


def test_a_cost_has_the_value_of_its_draw() -> None:
    found, weights = tables()
    costs = SlotCosts(found, weights, "linear", averaged=True)
    log_alpha = torch.randn(len(found[0].slots), 8, requires_grad=True)
    mask = torch.ones_like(log_alpha, dtype=torch.bool)
    drawn = draw(log_alpha, mask, 0.4, 0, 0)
    density = log_density(log_alpha, drawn.log_z[0].detach(), mask, 0.4)
    values = {
        name: float(estimate(costs, name, drawn.z[0], log_alpha.softmax(-1), density).detach())
        for name in ("reparametrization", "policy_gradient", "discrete")
    }
    assert values["policy_gradient"] == pytest.approx(values["reparametrization"], rel=1e-5)
    assert values["discrete"] == pytest.approx(float(costs.slots(log_alpha.detach().softmax(-1)).sum()), rel=1e-5)


def network(option: str) -> Architecture:
    space = SPACES.get("cell")(**SMALL)
    return Architecture("cell", {choice.name: (option,) for choice in space.choices()}, space.options())


def test_every_network_is_timed_once() -> None:
    asked = []

    def latency_ms(architecture: Architecture) -> float:
        asked.append(architecture.fingerprint)
        return 2.0 + len(asked)

    nets, log_p = WholeNets(latency_ms), torch.zeros((), requires_grad=True)
    for option in ("skip_connect", "sep_conv_3x3", "skip_connect", "sep_conv_3x3"):
        nets.estimate(network(option), log_p)
    assert len(asked) == 2
    again = WholeNets(latency_ms)
    again.load_state_dict(nets.state_dict())
    again.estimate(network("skip_connect"), log_p)
    assert len(asked) == 2
    assert again.mean == pytest.approx(0.9 * (nets.mean or 0) + 0.1 * 3.0)


def test_gradient_of_a_measured_latency_is_that_of_its_expectation() -> None:
    """On a device that is not additive: a network is slow only where both choices take option 1."""
    log_alpha = torch.tensor([[0.2, 0.5], [-0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    p = log_alpha.softmax(-1)
    expected = 1.0 + 5.0 * p[0, 1] * p[1, 1]
    (exact,) = torch.autograd.grad(expected, log_alpha)
    names = {
        (i, j): network(("skip_connect", "sep_conv_3x3", "dil_conv_3x3", "none")[2 * i + j])
        for i in (0, 1)
        for j in (0, 1)
    }
    slow = {names[pair].fingerprint: 1.0 + 5.0 * (pair == (1, 1)) for pair in names}
    nets, mask, total = WholeNets(lambda net: slow[net.fingerprint]), torch.ones(2, 2, dtype=torch.bool), []
    for step in range(2500):
        index: list[int] = draw(log_alpha.detach(), mask, 1.0, 0, step).index[0].tolist()
        log_p = log_alpha.log_softmax(-1)[torch.arange(2), index].sum()
        total.append(torch.autograd.grad(nets.estimate(names[index[0], index[1]], log_p), log_alpha)[0])
    slopes = torch.stack(total)[50:]
    error = slopes.std(0) / len(slopes) ** 0.5
    assert ((slopes.mean(0) - exact).abs() <= 4 * error).all()
    assert (exact.abs() > 4 * error).all()  # the test can tell


def test_impossible_latencies_are_refused() -> None:
    for answer in (0.0, -1.0, float("nan"), float("inf"), True, "fast"):
        with pytest.raises(ValueError, match="positive number of milliseconds"):
            WholeNets(lambda net, told=answer: told).latency_ms(network("none"))  # type: ignore[misc]


def test_this_host_times_whole_networks() -> None:
    before = torch.get_rng_state()
    assert 0 < LATENCIES.get("host")(network("skip_connect")) < 1000
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="Did you mean 'host'"):
        LATENCIES.get("hots")


def test_costs_of_published_networks_fall_with_the_constraint() -> None:
    """Mild to aggressive by the article's own measures."""
    names = ("snas_moderate", "snas_aggressive")
    for measure in MEASURES.values():
        costs = [cost_table(published(name).search_space(), measure()).cost(published(name)) for name in names]
        assert costs[0] > costs[1]
