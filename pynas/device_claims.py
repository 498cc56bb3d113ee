"""What a device's table changes: choice by table against choice by MACs, and winners of one device on another.

FBNet's article argues for both (Wu et al. 2019, sections 1 and 4): multiply-adds are a poor stand-in for latency, and
the best network for one device is not the best for another. No accuracy is known here, so MACs stand in for capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models import Macs
from cost_models.agreement import kendall
from cost_models.base import CostModel
from pynas.architecture import Architecture
from pynas.budget import BudgetedPaths, to_architecture
from pynas.registry import SearchSpace
from pynas.supernet import CostTable, cost_table

Floats = NDArray[np.float64]

NETS = 4000  # random ones, to describe a space
EQUAL = 0.01  # costs that differ by less count as equal
SURE = 0.95


@dataclass(frozen=True)
class Pair:
    """Two networks, of which `fewer` has no more MACs than `more` and is slower."""

    fewer: Architecture
    more: Architecture
    macs: tuple[float, float]
    latency_ms: tuple[float, float]


@dataclass(frozen=True)
class MacsClaim:
    """How far MACs go as a stand-in for the latency of one device.

    Args:
        device: Its name.
        nets: Random networks of the space.
        kendall: Tau between MACs and latency.
        discordant: Share of pairs of networks in which the one with fewer MACs is slower.
        worst: Of all pairs of random networks, the one with the largest ratio of latencies.
        same_macs_ms: Fastest and slowest network of the whole space with MACs within 1 % below the median.
        same_latency_macs: Fewest and most MACs of a network of the whole space within 1 % below the median latency.
        reserve: Who limits MACs so that 95 % of random networks meet a latency leaves this share of it unused on
            average.
    """

    device: str
    nets: int
    kendall: float
    discordant: float
    worst: Pair
    same_macs_ms: tuple[float, float]
    same_latency_macs: tuple[float, float]
    reserve: float

    def __str__(self) -> str:
        pair, (fast, slow), (few, most) = self.worst, self.same_macs_ms, self.same_latency_macs
        ratio = pair.latency_ms[0] / pair.latency_ms[1]
        first, second = (
            f"{macs * 1e-6:.4g} M MACs take {latency:.4g} ms"
            for macs, latency in zip(pair.macs, pair.latency_ms, strict=True)
        )
        macs_range = f"{few * 1e-6:.4g} to {most * 1e-6:.4g} M MACs, {most / few:.2f} times"
        lines = [
            f"{self.device}: {self.nets} random networks, Kendall tau of MACs and latency {self.kendall:.3f}",
            f"  pairs in which fewer MACs is slower          {self.discordant:.1%}",
            f"  the worst of them                            {first}, {second}: {ratio:.2f} times",
            f"  equal MACs (1 %), in the whole space         {fast:.4g} to {slow:.4g} ms, {slow / fast:.2f} times",
            f"  equal latency (1 %), in the whole space      {macs_range}",
            f"  a MACs limit safe for 95 % leaves unused     {self.reserve:.1%} of the latency",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class DevicesClaim:
    """The best network for each device, on each device. Row i is the network chosen for device i.

    Args:
        devices: Their names.
        budgets_ms: Of each device: the latency of a typical random network on it.
        winners: For each device the network with the most MACs within its budget.
        macs: Of the winners.
        latency_ms: Winner i on device j.
        slower: How much slower winner i is on device j than the fastest network there with at least as many MACs, as a
            fraction; 0 would mean that choosing for i was as good as choosing for j.
    """

    devices: tuple[str, ...]
    budgets_ms: tuple[float, ...]
    winners: tuple[Architecture, ...]
    macs: tuple[float, ...]
    latency_ms: Floats
    slower: Floats

    def __str__(self) -> str:
        width = max(14, *(len(name) + 2 for name in self.devices))
        head = "".join(f"{name:>{width}}" for name in self.devices)
        lines = [
            "network with the most MACs within a budget, for each device (row), on each device (column)",
            f"{'':{width}}{'M MACs':>9}{head}",
            f"{'budget, ms':{width}}{'':9}" + "".join(f"{budget:{width}.4g}" for budget in self.budgets_ms),
        ]
        lines += [
            f"{name:{width}}{self.macs[row] * 1e-6:9.1f}"
            + "".join(f"{latency:{width}.4g}" for latency in self.latency_ms[row])
            for row, name in enumerate(self.devices)
        ]
        lines += [
            "slower than the fastest network of that device with at least as many MACs, by",
            f"{'':{width + 9}}{head}",
        ]
        lines += [
            f"{name:{width + 9}}" + "".join(f"{loss:{width}.1%}" for loss in self.slower[row])
            for row, name in enumerate(self.devices)
        ]
        return "\n".join(lines)


def macs_claim(space: SearchSpace, device: str, model: CostModel, *, nets: int = NETS, seed: int = 0) -> MacsClaim:
    """Compares MACs with the latency of a device over random networks and, exactly, over the whole space.

    Args:
        space: Of the networks.
        device: Name for the report.
        model: Latency of ops.
        nets: Random networks to draw.
        seed: Of the draw.

    Raises:
        ValueError: The model cannot price the space.
    """
    latency, macs = cost_table(space, model), cost_table(space, Macs())
    paths = _random_paths(latency, nets, seed)
    times, sizes = _costs(latency, paths), _costs(macs, paths)
    tau = kendall(times, sizes)
    limit_ms, limit_macs = float(np.median(times)), float(np.median(sizes))
    return MacsClaim(
        device,
        nets,
        tau,
        _discordant(times, sizes),
        _worst_pair(space, latency, paths, times, sizes),
        _extremes(macs, latency, limit_macs),
        _extremes(latency, macs, limit_ms),
        _reserve(times, sizes),
    )


def devices_claim(
    space: SearchSpace, models: Mapping[str, CostModel], *, proxy: CostModel | None = None, nets: int = NETS
) -> DevicesClaim:
    """Chooses a network for each device and prices every winner on all devices; exact, by dynamic programming.

    Args:
        space: Of the networks.
        models: Latency of ops by device.
        proxy: What stands in for capacity and is maximised; MACs by default.
        nets: Random networks whose median latency is a device's budget.

    Raises:
        ValueError: A model cannot price the space.
    """
    tables = {name: cost_table(space, model) for name, model in models.items()}
    worth = cost_table(space, proxy or Macs())
    paths = _random_paths(worth, nets, seed=0)
    budgets = [float(np.median(_costs(table, paths))) for table in tables.values()]
    winners = [
        _best(table, worth.by_choice().numpy(), budget, 1.0)
        for table, budget in zip(tables.values(), budgets, strict=True)
    ]
    latency = np.array([[_cost(table, winner) for table in tables.values()] for winner in winners])
    fastest = np.array([[_fastest_ms(table, worth, winner) for table in tables.values()] for winner in winners])
    architectures = tuple(to_architecture(space, worth.choices, winner) for winner in winners)
    values = tuple(_cost(worth, winner) for winner in winners)
    return DevicesClaim(tuple(tables), tuple(budgets), architectures, values, latency, latency / fastest - 1)


def _random_paths(table: CostTable, count: int, seed: int) -> NDArray[np.int64]:
    """Option indices of uniformly random networks, shape (count, choices)."""
    widths = table.choice_mask().sum(1).numpy()
    return np.random.default_rng(seed).integers(widths, size=(count, len(widths)))


def _costs(table: CostTable, paths: NDArray[np.int64]) -> Floats:
    values = table.by_choice().numpy()
    return np.asarray(values[np.arange(paths.shape[1]), paths].sum(1) + table.fixed, dtype=np.float64)


def _cost(table: CostTable, path: Sequence[int]) -> float:
    return float(_costs(table, np.asarray([path]))[0])


def _best(table: CostTable, worth: Floats, budget: float, slack: float) -> list[int]:
    """The path with the largest sum of `worth` whose cost lies in [(1 - slack) * budget, budget]."""
    scaled = np.where(table.choice_mask().numpy(), worth / max(np.abs(worth).max(), 1e-300), -np.inf)
    return BudgetedPaths(table, scaled, budget, slack).most_likely()


def _extremes(given: CostTable, asked: CostTable, budget: float) -> tuple[float, float]:
    """Least and greatest cost in `asked` of networks whose cost in `given` lies within 1 % below the budget."""
    worth = asked.by_choice().numpy()
    low, high = (_cost(asked, _best(given, sign * worth, budget, EQUAL)) for sign in (-1.0, 1.0))
    return low, high


def _fastest_ms(latency: CostTable, worth: CostTable, path: Sequence[int]) -> float:
    """Least latency of a network that is worth at least as much as this one.

    A network has such a worth if what it falls short of the most a network can be worth stays within a budget, so the
    search is the one for budgets. Its rounding may lose the best, but never answers with more than this network takes.
    """
    missing = _shortfall(worth)
    found = _best(missing, -latency.by_choice().numpy(), _cost(missing, path) * (1 + 1e-9), 1.0)
    enough = _cost(worth, found) >= _cost(worth, path) * (1 - 1e-9)
    return min(_cost(latency, path), _cost(latency, found)) if enough else _cost(latency, path)


def _shortfall(worth: CostTable) -> CostTable:
    """For each option, how much less it is worth than the best option of its choice; plus a small positive rest."""
    values, mask = worth.by_choice(), worth.choice_mask()
    most = values.masked_fill(~mask, float("-inf")).max(1, keepdim=True).values
    missing = (most - values).masked_fill(~mask, 0.0)
    slots = tuple(choice.name for choice in worth.choices)
    rest = 1e-9 * float(missing.max(1).values.sum())
    return CostTable(slots, worth.choices, tuple(range(len(slots))), missing, mask, rest, worth.unit, worth.sources)


def _discordant(times: Floats, sizes: Floats) -> float:
    """Share of pairs with different MACs of which the smaller is slower."""
    order = np.argsort(sizes, kind="stable")
    times, sizes = times[order], sizes[order]
    slower = differ = 0
    for index in range(1, len(times)):
        smaller = sizes[:index] < sizes[index]
        differ += int(smaller.sum())
        slower += int((smaller & (times[:index] > times[index])).sum())
    return slower / max(differ, 1)


def _worst_pair(space: SearchSpace, table: CostTable, paths: NDArray[np.int64], times: Floats, sizes: Floats) -> Pair:
    """The pair with the largest ratio of latencies of which the slower network has no more MACs."""
    fastest, worst, pair = -1, 0.0, (0, 0)
    for index in np.lexsort((times, -sizes)).tolist():  # most MACs first, of equal ones the fastest
        if fastest >= 0 and times[index] / times[fastest] > worst:
            worst, pair = float(times[index] / times[fastest]), (index, fastest)
        if fastest < 0 or times[index] < times[fastest]:
            fastest = index
    fewer, more = (to_architecture(space, table.choices, paths[index].tolist()) for index in pair)
    few, many = pair
    return Pair(fewer, more, (float(sizes[few]), float(sizes[many])), (float(times[few]), float(times[many])))


def _reserve(times: Floats, sizes: Floats) -> float:
    """How much longer than average for their MACs the slowest networks take, as a share of what they take."""
    slope, start = np.polyfit(sizes, times, 1)
    return float(np.quantile(1 - (start + slope * sizes) / times, SURE))
