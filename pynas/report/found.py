"""What was found: the Pareto set, candidates, baselines; the network itself and where its latency goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pynas.choices import Choice
from pynas.plots import latency, network, plot_pareto
from pynas.plots.pareto import evenly
from pynas.report.parts import HALF, Absent, Listing, Part, Picture, Table, number, percent
from pynas.report.told import Told
from pynas.results import Run
from pynas.strategies import Candidate
from pynas.subsets import picks_any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 40


def finished(told: Told) -> Run:
    """The run, once it has found something. Raises Absent before."""
    if told.run is None:
        raise Absent("the search has not finished")
    return told.run


def pareto(told: Told) -> Part:
    """The Pareto set amid all that was judged."""
    run = finished(told)
    if not told.config.get("objectives"):
        raise Absent("the run was searched for one network within a budget, without objectives")
    best, last = run.candidates[0], run.candidates[-1]
    alt = (
        f"Scatter of {len(run.judged)} judged networks, accuracy with inherited weights against cost. The Pareto set "
        f"has {len(run.candidates)}, from {best.accuracy:.2%} at {best.cost:.3g} ms to {last.accuracy:.2%} at "
        f"{last.cost:.3g} ms."
    )
    caption = "Numbers are those that pynas retrain --net takes. Accuracies are of inherited weights."
    return Picture("The Pareto set", alt, lambda width: _untitled(plot_pareto(run, width=width)), _nets(run), caption)


def _untitled(figure: Figure) -> Figure:
    figure.axes[0].set_title("")
    return figure


def _nets(run: Run) -> Table:
    trained = {alone.architecture.fingerprint: percent(alone.accuracy) for alone in run.trained}
    shown = evenly(len(run.candidates), MOST_ROWS)
    rows = [(str(place + 1), *_net(run.candidates[place], trained)) for place in shown]
    note = "" if len(shown) == len(run.candidates) else f"{len(shown)} of {len(run.candidates)}, evenly spaced."
    return Table(
        ("net", "accuracy, inherited", "predicted ms", "MACs", "params", "trained alone", "origin"), rows, note
    )


def _net(net: Candidate, trained: dict[str, str]) -> tuple[str, ...]:
    alone = trained.get(net.architecture.fingerprint, "–")
    counts = (number(net.macs, ","), number(net.params, ","))
    return percent(net.accuracy), f"{net.cost:.4g}", *counts, alone, net.origin


def candidates(told: Told) -> Part:
    """All networks that were derived, where no Pareto set is asked for."""
    run = finished(told)
    if told.config.get("objectives"):
        raise Absent("the Pareto set has them")
    columns = ("net", "accuracy held out", f"cost ({_unit(run)})", "MACs", "params", "trained alone", "origin")
    note = "Net 1 was trained, tested and exported." if told.figures else ""
    return Listing("Networks that were derived", Table(columns, _nets(run).rows, note))


def _unit(run: Run) -> str:
    return "branches" if picks_any(run.best.search_space().choices()) else "ms"


def tested(told: Told) -> Part:
    """The found network against random ones of the same recipe."""
    nets = latency.read_trained_nets(finished(told))
    if len(nets) < 2:
        raise Absent("no random networks were trained (baseline=0)")
    rows = [
        (net.name, percent(net.accuracy), f"{100 * net.error:.2f} points", number(net.latency_ms), f"{net.images:,}")
        for net in nets
    ]
    columns = ("network", "test accuracy", "standard error", "predicted ms", "test images")
    alt = f"Test accuracy of the found network, {nets[0].accuracy:.2%}, and of {len(nets) - 1} random ones."
    caption = "All trained from scratch by one recipe. Bars: 95 % intervals for so many test images, of one seed."
    draw = lambda width: latency.plot_trained(finished(told), width)  # noqa: E731
    return Picture("Found against random", alt, draw, Table(columns, rows), caption)


def drawn(told: Told) -> Part:
    """The network layer by layer."""
    run = finished(told)
    space = run.best.search_space()
    branches = picks_any(space.choices())
    if hasattr(space, "wiring"):
        table, what = _edges(run, space.choices()), "Graphs of its cells: an arc for every edge with its operation."
    elif branches:
        table, what = _branches(run, space.choices()), "Grid of blocks and branches; kept ones are filled."
    else:
        table, what = _layers(run), "Boxes from input to output: colour is the kernel, height the expansion."
    alt = f"The found network. {what}"
    return Picture("Layer by layer", alt, lambda width: network.plot_network(run, width), table, whole=True)


def _layers(run: Run) -> Table:
    rows = []
    for layer in network.read_layers(run.best):
        spec = layer.spec
        block = spec is not None and spec.kind == "mbconv"
        cells = (str(spec.kernel), str(spec.expansion), str(spec.groups)) if block and spec else ("–", "–", "–")
        size = f"{layer.size} to {-(-layer.size // layer.stride)}"
        rows.append((layer.name, layer.option, *cells, f"{layer.in_channels} to {layer.out_channels}", size))
    return Table(("layer", "option", "kernel", "expansion", "groups", "channels", "pixels"), rows)


def _edges(run: Run, choices: Sequence[Choice]) -> Table:
    rows = [(choice.name.replace("_", " "), run.best.choices[choice.name][0].replace("_", " ")) for choice in choices]
    return Table(("cell, from, to", "operation"), rows, "0 and 1 are the cell's inputs, nodes count from 2.")


def _branches(run: Run, choices: Sequence[Choice]) -> Table:
    rows = [
        (str(place), choice.name, ", ".join(run.best.choices[choice.name]) or "none, runs its KxK")
        for place, choice in enumerate(choices, 1)
    ]
    return Table(("block", "name", "branches kept"), rows)


def layers(told: Told) -> Part:
    """Where the latency goes."""
    run = finished(told)
    if told.device is None:
        raise Absent("the run's folder holds no latency table")
    costs = latency.read_layer_costs(run)
    total = sum(cost.latency_ms for cost in costs) or 1.0
    rows = [
        (c.name, c.op, f"{c.latency_ms:.4g}", f"{c.latency_ms / total:.1%}", c.source, number(c.spread_ms, ".2g"))
        for c in costs
    ]
    most = max(costs, key=lambda cost: cost.latency_ms)
    share = f"{most.latency_ms / total:.0%} of {total:.3g} ms"
    alt = f"Bars of predicted latency by part. The largest is {most.name} with {share}."
    fitted = sum(cost.source == "fitted" for cost in costs)
    caption = f"Blue: chosen by the search; grey: fixed. Sum {total:.4g} ms, {told.device.provenance.source}"
    caption += f", {fitted} parts fitted (pale)." if fitted else "."
    columns = ("part", "op", "ms", "share", "source", "spread (IQR, ms)")
    return Picture(
        "Where the latency goes", alt, lambda width: latency.plot_layers(run, width), Table(columns, rows), caption
    )


def whole(told: Told) -> Part:
    """Predicted against measured."""
    run = finished(told)
    known = latency.read_latencies(run)
    if not any(each.name.startswith("measured") for each in known) and len(known) < 2:
        raise Absent("it was not measured: the table's device is not this host")
    rows = [(each.name, f"{each.latency_ms:.4g}", number(each.spread_ms, ".2g"), each.source) for each in known]
    alt = "Bars: " + ", ".join(f"{each.name} {each.latency_ms:.3g} ms" for each in known) + "."
    measured = [each for each in known if each.name.startswith("measured")]
    caption = (
        "A sum of rows knows nothing of caches and of what a runtime does between ops; the measurement does."
        if measured
        else "Not measured: the table's device is not the machine that searched."
    )
    columns = ("latency", "ms", "spread (IQR, ms)", "source")
    draw = lambda width: latency.plot_latency(run, min(width, HALF))  # noqa: E731
    return Picture("Predicted and measured", alt, draw, Table(columns, rows), caption)
