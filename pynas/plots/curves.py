"""What a run logged, as curves: loss, accuracy, temperature, expected latency, and whatever else its strategy has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynas.plots import style
from pynas.results import Run
from pynas.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is logged under which name, how it reads, and what it is multiplied by; a panel for each title.
LOGGED: Mapping[str, tuple[tuple[str, str, float], ...]] = {
    "Loss": (
        ("weight_loss", "weights", 1),
        ("theta_loss", "theta", 1),
        ("theta_cross_entropy", "theta, cross-entropy alone", 1),
        ("alpha_loss", "alpha", 1),
        ("controller_loss", "controller", 1),
    ),
    "Accuracy": (
        ("weight_accuracy", "training batches", 100),
        ("train_accuracy", "training batches", 100),
        ("theta_accuracy", "batches for theta", 100),
        ("alpha_accuracy", "batches for alpha", 100),
        ("reward", "reward of the controller", 100),
        ("search_accuracy", "search network, held out", 100),
        ("child_accuracy", "child, held out", 100),
    ),
    "Temperature": (("tau", "tau", 1), ("temperature", "lambda", 1)),
    "Expected latency": (("expected_cost", "under theta", 1),),
    "Lagrange multiplier": (("multiplier", "multiplier", 1),),
    "Share of skips": (("skip_share", "share", 100),),
    "Branches that run": (("branches", "branches", 1), ("empty_blocks", "blocks without one", 1)),
    "Logits of branches": (("logit_least", "least", 1), ("logit_most", "largest", 1), ("logit_spread", "deviation", 1)),
}
UNITS = {
    "Loss": "nats",
    "Accuracy": "%",
    "Expected latency": "ms",
    "Share of skips": "% of theta's probability",
    "Accuracy of training alone": "% of training batches",
    "Hypervolume": "of the Pareto set",
}
CURVES = 8  # networks trained alone that are drawn at most


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name: As it reads in a legend.
        x: Epochs from 1, or evaluations.
        y: In the panel's unit.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """Curves of one kind.

    Args:
        title: What they show.
        unit: Of the vertical axis.
        lines: The curves.
        across: What the horizontal axis counts.
        bounds: Horizontal lines by name, such as a budget.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    across: str = "epoch"
    bounds: Mapping[str, float] = field(default_factory=dict)
    log: bool = False


def read_panels(run: Run | str | Path) -> list[Panel]:
    """Everything worth a curve that a run has logged so far; nothing before its first epoch ends."""
    folder = style.folder_of(run)
    lines = folder.metrics("search")
    panels = []
    for title, wanted in LOGGED.items():
        curves = [_line(lines, *entry) for entry in wanted]
        if title == "Loss" and not any(curves):
            curves = [_line(lines, "loss", "training", 1)]
        if title == "Accuracy":
            curves.append(_tried(lines))
        found = tuple(curve for curve in curves if curve is not None)
        if found and not (title == "Lagrange multiplier" and not any(found[0].y)):
            bounds = _bounds(folder) if title == "Expected latency" else {}
            panels.append(Panel(title, UNITS.get(title, ""), found, bounds=bounds, log=title == "Temperature"))
    panels += _evolution(folder.metrics("evolution"))
    return panels + _alone(folder)


def _line(lines: Sequence[Mapping[str, Any]], key: str, name: str, times: float) -> Line | None:
    points = [
        (line["epoch"] + 1.0, times * line[key]) for line in lines if key in line and math.isfinite(float(line[key]))
    ]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return Line(name, xs, ys)


def _tried(lines: Sequence[Mapping[str, Any]]) -> Line | None:
    """Of random search: the best of the networks that were tried so far."""
    points = [(line["epoch"] + 1.0, 100 * max(line["accuracies"])) for line in lines if line.get("accuracies")]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return Line("best network so far, held out", xs, ys)


def _bounds(folder: RunFolder) -> dict[str, float]:
    budget = folder.config().get("latency_ms")
    return {f"budget {budget:g} ms": float(budget)} if isinstance(budget, int | float) else {}


def _evolution(lines: Sequence[Mapping[str, Any]]) -> list[Panel]:
    if not lines:
        return []
    done = tuple(float(line["evaluations"]) for line in lines)
    volume = Line("hypervolume", done, tuple(float(line["hypervolume"]) for line in lines))
    best = Line("best, inherited weights", done, tuple(100.0 * line["best_accuracy"] for line in lines))
    front = Line("networks of the set", done, tuple(float(line["front"]) for line in lines))
    across = "networks judged"
    return [
        Panel("Hypervolume", UNITS["Hypervolume"], (volume,), across),
        Panel("Best accuracy so far", "%", (best,), across),
        Panel("Size of the Pareto set", "networks", (front,), across),
    ]


def _alone(folder: RunFolder) -> list[Panel]:
    """Trainings of single networks: the found one, and random ones."""
    stages = list(dict.fromkeys(line["stage"] for line in folder.metrics()))
    alone = [stage for stage in stages if stage.split("-")[0] in ("retrain", "random")][:CURVES]
    panels = []
    for title, key, times in (
        ("Loss of training alone", "loss", 1),
        ("Accuracy of training alone", "train_accuracy", 100),
    ):
        curves = [_line(folder.metrics(stage), key, _stage_name(stage), times) for stage in alone]
        found = tuple(curve for curve in curves if curve is not None)
        if found:
            panels.append(Panel(title, UNITS.get(title, "nats"), found))
    return panels


def _stage_name(stage: str) -> str:
    if stage == "retrain":
        return "found"
    kind, _, rest = stage.partition("-")
    return f"random {rest}" if kind == "random" else f"trained again, {rest}"


def plot_curves(run: Run | str | Path, width: float = 1040) -> Figure:
    """All that a run logged, a panel for each kind.

    Args:
        run: A run, finished or not, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If no epoch is finished.
    """
    panels = read_panels(run)
    if not panels:
        raise ValueError(f"{style.folder_of(run).path} has no curves yet: no epoch is finished.")
    columns = max(1, min(len(panels), int(width // 320)))
    rows = math.ceil(len(panels) / columns)
    figure = style.new_figure(width, 250 * rows)
    for place, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(rows, columns, place), panel, titled=True)
    return figure


def plot_panel(panel: Panel, width: float = 500) -> Figure:
    """One panel alone, without its title."""
    figure = style.new_figure(width, 232)
    axes = figure.add_subplot()
    draw_panel(axes, panel)
    if len(panel.lines) + len(panel.bounds) > 1:
        style.legend_above(axes, width)
    return figure


def draw_panel(axes: Axes, panel: Panel, titled: bool = False) -> None:
    """Draws the curves of a panel."""
    few = max(len(line.x) for line in panel.lines) <= 30
    for place, line in enumerate(panel.lines):
        given: dict[str, Any] = {"color": style.SERIES[place % len(style.SERIES)], "label": line.name}
        given |= {"linestyle": style.STYLES[place % len(style.STYLES)], "linewidth": 1.8}
        axes.plot(line.x, line.y, marker="o" if few else "", markersize=3, **given)
    for name, value in panel.bounds.items():
        axes.axhline(value, color=style.VERMILION, linestyle=(0, (2, 2)), linewidth=1.2, label=name)
    style.dress(axes, panel.across, panel.unit, panel.title if titled else "")
    if panel.log and min(min(line.y) for line in panel.lines) > 0:
        _logarithmic(axes)
    style.whole_numbers(axes)
    if titled and len(panel.lines) + len(panel.bounds) > 1:
        style.legend(axes)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers: powers of ten would be set as formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
