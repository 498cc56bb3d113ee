"""What a device's table changes: MACs as a stand-in for latency, and winners of one device on another."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from cost_models import OpSpec
from cost_models.analytic import Macs, Roofline
from pynas.device_claims import devices_claim, macs_claim
from pynas.plan import make_space
from pynas.registry import SearchSpace
from pynas.supernet import cost_table
from pynas.timed_nets import net_specs

SPACE = make_space("fbnet_tiny", {})
SMALL = make_space("fbnet_tiny", {"stages": [[8, 2, 1], [16, 2, 2]]})
DEVICES = {
    "compute": Roofline(2, 100, 0),
    "memory": Roofline(200, 2, 0),
    "launch": Roofline(50, 50, 20),
}


def every_net(space: SearchSpace, cost: Callable[[OpSpec], float]) -> np.ndarray:
    """Cost of all networks, the first choice varying slowest."""
    table = cost_table(space, type("Model", (Macs,), {"cost": lambda self, spec: cost(spec)})())
    values = table.by_choice().numpy()
    paths = itertools.product(*(range(len(choice.options)) for choice in table.choices))
    return np.array([values[np.arange(len(values)), path].sum() for path in paths]) + table.fixed


def test_ranges_at_equal_cost_are_those_of_all_networks() -> None:
    for name, model in DEVICES.items():
        claim = macs_claim(SMALL, name, model, nets=500)
        latency, macs = every_net(SMALL, model.cost), every_net(SMALL, Macs().cost)
        low, high = claim.same_macs_ms
        assert latency.min() <= low <= high <= latency.max()
        window = [macs[np.isclose(latency, value, rtol=1e-9)] for value in (low, high)]
        limit = max(values.max() for values in window)
        inside = latency[(macs <= limit) & (macs >= 0.99 * limit)]
        assert low <= np.quantile(inside, 0.1)
        assert high >= np.quantile(inside, 0.9)
        assert 0 <= claim.discordant <= 1
        assert claim.worst.macs[0] <= claim.worst.macs[1]
        sums = [sum(map(model.cost, net_specs(SMALL, net))) for net in (claim.worst.fewer, claim.worst.more)]
        assert sums == pytest.approx(claim.worst.latency_ms)
        assert "fewer MACs is slower" in str(claim)


def test_macs_are_the_latency_of_a_machine_that_only_computes() -> None:
    claim = macs_claim(SMALL, "ideal", Roofline(2, 1e9, 0), nets=500)
    assert claim.kendall == pytest.approx(1, abs=1e-3)  # sums in another order tie or not
    assert claim.discordant == 0
    assert claim.worst.latency_ms[0] <= claim.worst.latency_ms[1] * (1 + 1e-9)
    assert claim.same_macs_ms[1] / claim.same_macs_ms[0] < 1.011
    assert claim.reserve == pytest.approx(0, abs=1e-9)


def test_discordant_pairs_are_what_tau_counts() -> None:
    claim = macs_claim(SPACE, "launch", DEVICES["launch"], nets=400)
    assert claim.discordant == pytest.approx((1 - claim.kendall) / 2, abs=0.02)
    assert claim.worst.latency_ms[0] > claim.worst.latency_ms[1]


def test_winners_and_losses_are_those_of_all_networks() -> None:
    claim = devices_claim(SMALL, DEVICES, nets=500)
    macs = every_net(SMALL, Macs().cost)
    latency = [every_net(SMALL, model.cost) for model in DEVICES.values()]
    for row in range(3):
        best = macs[latency[row] <= claim.budgets_ms[row]].max()
        assert 0.995 * best <= claim.macs[row] <= best * (1 + 1e-9)
        assert claim.latency_ms[row, row] <= claim.budgets_ms[row]
        for column in range(3):
            fastest = latency[column][macs >= claim.macs[row] * (1 - 1e-9)].min()
            assert claim.slower[row, column] == pytest.approx(claim.latency_ms[row, column] / fastest - 1, abs=5e-3)
    assert claim.slower.max() > 0.05
    assert "launch" in str(claim)


def test_equal_devices_share_their_winner() -> None:
    claim = devices_claim(SPACE, {"a": DEVICES["memory"], "b": DEVICES["memory"]}, nets=200)
    assert claim.winners[0] == claim.winners[1]
    assert claim.slower == pytest.approx(np.zeros((2, 2)), abs=5e-3)
