"""Where a network's latency goes, and what predictions, budgets and measurements say of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cost_models
from cost_models.spec import OpSpec
from pynas.architecture import Architecture
from pynas.plots import style
from pynas.registry import Vanishing
from pynas.results import Run
from pynas.supernet import deployed_specs
from pynas.timed_nets import net_specs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEM = 3  # ops before the layers at most; where there are more, a host has some between its blocks
OPACITY = {"measured": 1.0, "modelled": 0.8, "fitted": 0.45}


@dataclass(frozen=True)
class LayerCost:
    """What a part of a network is predicted to take.

    Args:
        name: Of the layer, or of the kind of op where many are summed.
        op: What runs there.
        latency_ms: On the run's device.
        source: "measured", "modelled" or "fitted".
        spread_ms: Interquartile range of the measurements of its rows, summed; none where nothing was measured.
        chosen: Whether the search had a choice there.
    """

    name: str
    op: str
    latency_ms: float
    source: str
    spread_ms: float | None
    chosen: bool


def read_layer_costs(run: Run | str | Path) -> list[LayerCost]:
    """Latency of the best network, part by part, by the table that lies in the run's folder.

    In spaces whose networks may lose more than an option, ops of one kind are summed. The parts add up to the predicted
    latency.

    Raises:
        ValueError: If the run's search has not finished, or its table is broken.
        FileNotFoundError: If its folder holds no table.
    """
    found = run if isinstance(run, Run) else Run.open(run)
    device = cost_models.load_folder(found.folder / "device")
    parts = _by_kind(found.best) if isinstance(found.best.search_space(), Vanishing) else _in_order(found.best)
    costs = [_cost(device, *part) for part in parts]
    if device.net_cost:
        source = device.provenance.source
        costs.append(LayerCost("whole network", "calibration offset", device.net_cost, source, None, False))
    return costs


Part = tuple[str, str, Sequence[OpSpec], bool]  # name, op, what runs, whether it was chosen


def _in_order(architecture: Architecture) -> list[Part]:
    """Stem, layers, head."""
    space = architecture.search_space()
    slots = space.slots()
    chosen: list[Part] = []
    for slot in slots:
        names = architecture.choices[slot.choice.name]
        text = "+".join(names) if slot.choice.pick == "one" else "folded"
        chosen.append((slot.name, text, deployed_specs(slot, names), True))
    fixed = list(net_specs(space, architecture))[sum(len(part[2]) for part in chosen) :]
    last = slots[-1]
    ends = [
        place for place, spec in enumerate(fixed) if (spec.in_channels, spec.size) == (last.out_channels, last.out_size)
    ]
    before = ends[0] if ends else len(fixed)
    name = "stem" if before <= STEM else "fixed"
    return [
        *(_fixed(spec, name) for spec in fixed[:before]),
        *chosen,
        *(_fixed(spec, "head") for spec in fixed[before:]),
    ]


def _fixed(spec: OpSpec, place: str) -> Part:
    name = {"pool": "pool", "linear": "classifier"}.get(spec.kind, "")
    return name or place, "" if name else _words(spec), [spec], False


def _by_kind(architecture: Architecture) -> list[Part]:
    """Ops of one kind and kernel together, the most numerous first."""
    groups: dict[str, list[OpSpec]] = {}
    names = {
        "relu_conv": "preparation of inputs",
        "reduce": "preparation, halving",
        "conv": "stem",
        "linear": "classifier",
    }
    for spec in net_specs(architecture.search_space(), architecture):
        if not spec.free:
            groups.setdefault(names.get(spec.kind, _words(spec)), []).append(spec)
    fixed = (*names.values(), "pool")
    return [
        (name, f"{len(specs)} op{'' if len(specs) == 1 else 's'}", specs, name not in fixed)
        for name, specs in groups.items()
    ]


def _words(spec: OpSpec) -> str:
    kernel = f" {spec.kernel}x{spec.kernel}" if spec.kernel > 1 or spec.kind == "conv" else ""
    return spec.kind.removesuffix("_bn").replace("_", " ") + kernel


def _cost(device: cost_models.LatencyTable, name: str, op: str, specs: Sequence[OpSpec], chosen: bool) -> LayerCost:
    sources = [device.source(spec) for spec in specs if not spec.free]
    source = "fitted" if "fitted" in sources else device.provenance.source
    rows = [device.rows.get(spec.deployed) for spec in specs if not spec.free]
    known = [device.scale * row.spread_ms for row in rows if row is not None]
    spread = math.fsum(known) if device.provenance.source == "measured" and known else None
    return LayerCost(name, op, math.fsum(device.cost(spec) for spec in specs), source, spread, chosen)


def plot_layers(run: Run | str | Path, width: float = 500) -> Figure:
    """Where the latency of the best network goes: a bar for each part, pale where its cost is fitted.

    Args:
        run: A finished search, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If the run's search has not finished, or its table is broken.
        FileNotFoundError: If its folder holds no table.
    """
    costs = read_layer_costs(run)
    total = math.fsum(cost.latency_ms for cost in costs)
    figure = style.new_figure(width, 17 * len(costs) + 64)
    axes = figure.add_subplot()
    for place, cost in enumerate(costs):
        given: dict[str, Any] = {"alpha": OPACITY.get(cost.source, 1.0), "height": 0.72, "linewidth": 0}
        axes.barh(place, cost.latency_ms, color=style.BLUE if cost.chosen else style.MUTED, **given)
        if cost.spread_ms:
            axes.errorbar(cost.latency_ms, place, xerr=cost.spread_ms / 2, color=style.INK, elinewidth=0.9)
        share = f"{cost.latency_ms / total:.0%}" if total else ""
        past = cost.latency_ms + (cost.spread_ms or 0) / 2
        axes.annotate(share, (past, place), (5, 0), textcoords="offset points", va="center", fontsize=9.5,
                      color=style.MUTED)  # fmt: skip
    labels = [cost.name if cost.op in ("folded", "") else f"{cost.name}  {cost.op}" for cost in costs]
    style.dress(axes, "predicted latency (ms)")
    style.name_bars(axes, labels, 0.12, fontsize=9.5)
    return figure


@dataclass(frozen=True)
class Latency:
    """A latency of the best network, or a bound on it.

    Args:
        name: What it is.
        latency_ms: The value.
        source: Where it comes from.
        spread_ms: Interquartile range; none where it was not measured several times.
    """

    name: str
    latency_ms: float
    source: str
    spread_ms: float | None = None


def read_latencies(run: Run | str | Path) -> list[Latency]:
    """Budget, prediction, measurement, and predictions for other devices, of the best network.

    Raises:
        ValueError: If the run's search has not finished, or its network was not trained.
    """
    found = run if isinstance(run, Run) else Run.open(run)
    figures: Mapping[str, Any] = found.figures
    if not figures:
        raise ValueError(
            f"{found.folder} has no result: its network was not trained. Train it: pynas retrain {found.folder}"
        )
    table, *_ = str(figures["device"]).split(":")
    known = []
    if figures.get("budget_ms") is not None:
        known.append(Latency("budget", figures["budget_ms"], "asked for"))
    known.append(Latency(f"predicted, {table}", figures["predicted_ms"], f"sum of rows: {figures['device']}"))
    if figures.get("measured_ms") is not None:
        told = "whole network, batch norm folded, 1 thread, batch 1, on this host"
        known.append(Latency("measured, this host", figures["measured_ms"], told, figures["measured_spread_ms"]))
    for price in figures.get("elsewhere", []):
        told = f"sum of rows, {price['source']} by {price['runner']}"
        known.append(Latency(f"predicted, {price['device']}", price["predicted_ms"], told))
    return known


def plot_latency(run: Run | str | Path, width: float = 500) -> Figure:
    """Predicted against measured latency of the best network, its budget, and other devices.

    Args:
        run: A finished search whose network was trained, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If there is no such network.
    """
    known = read_latencies(run)
    figure = style.new_figure(width, 36 * len(known) + 56)
    axes = figure.add_subplot()
    colours = {"budget": style.LINE, "measured": style.VERMILION, "predicted": style.BLUE}
    for place, latency in enumerate(known):
        colour = colours[latency.name.split(",")[0]]
        axes.barh(place, latency.latency_ms, height=0.6, color=colour, linewidth=0)
        spread = latency.spread_ms or 0.0
        if spread:
            axes.errorbar(latency.latency_ms, place, xerr=spread / 2, color=style.INK, elinewidth=1, capsize=3)
        axes.annotate(f"{latency.latency_ms:.3g} ms", (latency.latency_ms + spread / 2, place), (6, 0),
                      textcoords="offset points", va="center", fontsize=style.SMALL, color=style.INK)  # fmt: skip
    style.dress(axes, "latency (ms)")
    style.name_bars(axes, [latency.name for latency in known], 0.2)
    return figure


@dataclass(frozen=True)
class TrainedNet:
    """A network that was trained alone.

    Args:
        name: "found", "random 1", ...
        accuracy: On the test images, between 0 and 1.
        latency_ms: Predicted; none where nobody priced it.
        images: Number of test images.
    """

    name: str
    accuracy: float
    latency_ms: float | None
    images: int

    @property
    def error(self) -> float:
        """Standard error of the accuracy, by the number of test images alone."""
        return math.sqrt(max(0.0, self.accuracy * (1 - self.accuracy)) / max(1, self.images))


def read_trained_nets(run: Run | str | Path) -> list[TrainedNet]:
    """The found network and the random ones that were trained by the same recipe.

    Raises:
        ValueError: If the run's search has not finished, or its network was not trained.
    """
    found = run if isinstance(run, Run) else Run.open(run)
    figures = found.figures
    if not figures:
        raise ValueError(
            f"{found.folder} has no result: its network was not trained. Train it: pynas retrain {found.folder}"
        )
    images, branches = int(figures["test_images"]), "branches" in figures
    nets = [TrainedNet("found", figures["test_accuracy"], figures["predicted_ms"], images)]
    for number, net in enumerate(figures["baseline"], 1):
        cost = figures["predicted_ms"] if branches else net["cost"]  # folded, all cost the same
        nets.append(TrainedNet(f"random {number}", net["accuracy"], cost, images))
    return nets


def plot_trained(run: Run | str | Path, width: float = 500) -> Figure:
    """Test accuracy of the found network and of random ones of the same budget and recipe.

    Bars are 95 % intervals of an accuracy on so many test images; they say nothing of other seeds.

    Args:
        run: A finished search whose network was trained, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If there is no such network.
    """
    nets = sorted(read_trained_nets(run), key=lambda net: net.accuracy)
    figure = style.new_figure(width, 26 * len(nets) + 60)
    axes = figure.add_subplot()
    for place, net in enumerate(nets):
        colour, marker = (style.VERMILION, "*") if net.name == "found" else (style.BLUE, "o")
        axes.errorbar(100 * net.accuracy, place, xerr=196 * net.error, color=colour, elinewidth=1.4, capsize=0)
        axes.plot([100 * net.accuracy], [place], marker=marker, markersize=13 if marker == "*" else 7, color=colour)
    labels = [net.name if net.latency_ms is None else f"{net.name}, {net.latency_ms:.3g} ms" for net in nets]
    style.dress(axes, "test accuracy (%)")
    axes.set_yticks(range(len(nets)), labels)
    axes.set_ylim(-0.6, len(nets) - 0.4)
    axes.tick_params(axis="y", length=0)
    return figure
