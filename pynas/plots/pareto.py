"""The Pareto set of a search, amid all that was judged on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.names import unknown
from pynas.pareto import GOALS, SHORT, Goal
from pynas.plan import goals_of
from pynas.plots import style
from pynas.results import Run
from pynas.strategies import Candidate
from pynas.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 24  # networks of a front that are numbered; of a longer one some
FRONT, BEST, OTHERS, LIMIT = "#1f5fa8", "#d1495b", "#a8a8a8", "#444444"

# How the value of a goal on the horizontal axis is read off a network, and divided.
_VALUES: dict[str, tuple[Callable[[Candidate], float | None], float]] = {
    "macs": (lambda net: net.macs, 1e6),
    "params": (lambda net: net.params, 1e6),
    "latency_ms": (lambda net: net.cost, 1.0),
}


def plot_pareto(run: Run | str | Path, x: str | None = None, width: float = 460) -> Figure:
    """Accuracy against latency, MACs or parameters: the Pareto set, all else that was judged, and the limits.

    Accuracies are those with inherited weights. Numbers are those that `pynas.retrain(run, net=...)` takes.

    Args:
        run: A finished search with objectives, or its folder.
        x: "latency_ms" ("latency" for short), "macs" or "params"; by default the first of the objectives that is none
            of accuracy, else latency.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If the run was searched without objectives, or x is no such word.
    """
    from matplotlib.figure import Figure

    found = run if isinstance(run, Run) else Run.open(run)
    config = RunFolder(found.folder).config()
    budget = config["latency_ms"]
    wanted = goals_of({"limits": {}, "directions": {}, "objectives": None, **config}, budget)
    if not wanted:
        raise ValueError(f"{found.folder} has no Pareto set: it was searched without objectives.")
    others = [goal.name for goal in wanted if goal.pursued and goal.name != "accuracy"]
    name = SHORT.get(x or "", x) or (others[0] if others else "latency_ms")
    if name not in _VALUES:
        raise unknown("axis of a Pareto plot", name, _VALUES)
    figure = Figure(figsize=(width / 72, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _draw_networks(axes, found, name, wanted)
    _draw_limits(axes, name, wanted)
    axes.margins(y=0.08)  # for the numbers above the points
    axes.set_xlabel(_label(name, str(config["device"])))
    axes.set_ylabel("accuracy with inherited weights (%)")
    axes.set_title(_title(found, wanted, config), fontsize=9, wrap=True)
    axes.grid(alpha=0.25)
    style.quiet(axes)
    axes.legend(loc="best", fontsize=8, frameon=False)
    _thin(figure, axes)
    return figure


def _thin(figure: Figure, axes: Axes) -> None:
    """Takes away numbers that would stand on others; those of more accurate networks stay."""
    figure.draw_without_rendering()
    kept: list[Any] = []
    for text in list(axes.texts):
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)


def _draw_networks(axes: Axes, run: Run, name: str, wanted: Sequence[Goal]) -> None:
    def places(nets: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        read, unit = _VALUES[name]
        return [float(read(net) or 0) / unit for net in nets], [100 * net.accuracy for net in nets]

    limit = next((goal.limit for goal in wanted if goal.name == "accuracy"), None)
    rest = [net for net in run.judged if not net.front]
    beyond = [net for net in rest if limit is not None and net.accuracy < limit]
    dominated = [net for net in rest if net not in beyond]
    if dominated:
        label = f"dominated ({len(dominated)})"
        axes.scatter(*places(dominated), s=14, color=OTHERS, alpha=0.7, linewidths=0, label=label)
    if beyond:
        label = f"beyond a limit ({len(beyond)})"
        axes.scatter(*places(beyond), s=16, color=OTHERS, marker="x", linewidths=0.8, label=label)
    pursued = {goal.name for goal in wanted if goal.pursued}
    xs, ys = places(run.candidates)
    if pursued == {"accuracy", name}:
        order = sorted(range(len(xs)), key=lambda i: xs[i])
        up = _direction(name, wanted) == "min"
        drawn = ([xs[i] for i in order], [ys[i] for i in order])
        axes.step(*drawn, where="post" if up else "pre", color=FRONT, linewidth=1, alpha=0.6)
    axes.scatter(xs, ys, s=30, color=FRONT, zorder=3, label=f"Pareto set ({len(xs)})")
    axes.scatter(xs[:1], ys[:1], s=130, color=BEST, marker="*", zorder=4, label="best: the most accurate")
    every = -(-len(xs) // MOST_NUMBERS)
    for index in range(0, len(xs), every):
        place = (xs[index], ys[index])
        axes.annotate(
            str(index + 1), place, (0, 6), textcoords="offset points", fontsize=7, color=FRONT, ha="center", zorder=5
        )


def _draw_limits(axes: Axes, name: str, wanted: Sequence[Goal]) -> None:
    for goal in wanted:
        if goal.limit is None:
            continue
        if goal.name == name:
            place = goal.limit / _VALUES[name][1]
            axes.axvline(place, color=LIMIT, linestyle="--", linewidth=1, label=f"limit {place:g}")
        if goal.name == "accuracy":
            label = f"limit {100 * goal.limit:g} %"
            axes.axhline(100 * goal.limit, color=LIMIT, linestyle=":", linewidth=1, label=label)


def _direction(name: str, wanted: Sequence[Goal]) -> str:
    return next((goal.direction for goal in wanted if goal.name == name), GOALS[name].direction)


def _label(name: str, device: str) -> str:
    if name == "latency_ms":
        return f"predicted latency on {'this host' if device == 'host' else device} (ms)"
    return {"macs": "MACs (millions)", "params": "parameters (millions)"}[name]


def _title(run: Run, wanted: Sequence[Goal], config: dict[str, Any]) -> str:
    asked = ", ".join(f"{goal.name} ({goal.direction})" for goal in wanted if goal.pursued)
    return f"{config['space']} by {config['strategy']['name']}: {asked}; {len(run.judged)} networks judged"


def evenly(count: int, most: int) -> list[int]:
    """At most so many places of a list, evenly spaced, the first and the last among them."""
    last = min(count, most) - 1
    return [round(row * (count - 1) / last) if last else 0 for row in range(last + 1)]
