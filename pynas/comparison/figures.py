"""A comparison as pictures. matplotlib loads when one is drawn, not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pynas.comparison.rows import TRAINING, Point, Row
from pynas.comparison.tables import labels, of
from pynas.draw import draw_strip, save_figure
from pynas.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's bright palette, told apart by colour-blind readers.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#000000")


def draw_curves(rows: Sequence[Row], target: float | None = None, columns: int = 3) -> Figure:
    """Accuracy of the search over gradient computations and over time, and entropy; a line for each run.

    Args:
        rows: Of the comparison.
        target: An accuracy to mark, between 0 and 1.
        columns: Side by side: 3, or 1 for narrow pages.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 * columns / 3, 4.2 * 3 / columns), layout="constrained")
    left, middle, right = figure.subplots(3 // columns, columns).flat
    _lines(left, rows, lambda p: p.gradients / 1000, lambda p: _percent(p.accuracy))
    _lines(middle, rows, lambda p: p.seconds, lambda p: _percent(p.accuracy))
    _lines(right, rows, lambda p: p.gradients / 1000, lambda p: p.entropy)
    for axes, x in ((left, "gradient computations (thousands)"), (middle, "seconds of the search"), (right, "")):
        axes.set_xlabel(x or "gradient computations (thousands)", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    for axes in (left, middle):
        axes.set_ylabel("accuracy during the search (%)", fontsize=9)
        if target is not None:
            axes.axhline(100 * target, color="#444444", linestyle=":", linewidth=1)
    right.set_ylabel("entropy (nats a choice; enas: a decision)", fontsize=9)
    dashed = sorted({row.label for row in rows if row.curve_source == TRAINING})
    told = f"dashed, on training batches: {', '.join(dashed)}; the others on held-out images" if dashed else ""
    left.set_title(told, fontsize=8)
    left.legend(fontsize=8)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], x: Callable[[Point], float], y: Callable[[Point], float | None]) -> None:
    for place, label in enumerate(labels(rows)):
        for run in of(rows, label):
            points = [(x(p), value) for p in run.curve if (value := y(p)) is not None]
            if points:
                style = {"linestyle": "--" if run.curve_source == TRAINING else "-", "color": _colour(place)}
                named = label if run is of(rows, label)[0] else None
                axes.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.3, label=named, **style)  # type: ignore[arg-type]


def draw_children(rows: Sequence[Row], target: float | None = None, columns: int = 3) -> Figure:
    """Search network and child without retraining; found networks by size and by latency.

    Args:
        rows: Of the comparison.
        target: An accuracy to mark, between 0 and 1.
        columns: Side by side: 3, or 1 for narrow pages.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 * columns / 3, 4.2 * 3 / columns), layout="constrained")
    ratios = (1.3, 1, 1) if columns == 3 else (1,)
    left, middle, right = figure.subplots(3 // columns, columns, width_ratios=ratios).flat
    names = labels(rows)
    for place, label in enumerate(names):
        for number, run in enumerate(of(rows, label)):
            y, style = len(names) - 1 - place - 0.14 * number, {"color": _colour(place), "linestyle": "none"}
            for value, marker in _marked(run):
                if value is not None:
                    left.plot(100 * value, y, marker=marker, markersize=7, **style)
            best = run.trained_accuracy if run.trained_accuracy is not None else run.child_accuracy
            if best is None:
                continue
            named = label if number == 0 else None
            middle.plot((run.macs or 0) / 1e6, 100 * best, marker="o", label=named, **style)
            right.plot(run.predicted_ms, 100 * best, marker="o", **style)
    left.set_yticks(range(len(names)), [*reversed(names)])
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel("accuracy (%)", fontsize=9)
    left.set_title("dot: search network, held-out images; of the found network, test images:\n"
                   "x bare, triangle recalibrated, star trained from scratch", fontsize=8)  # fmt: skip
    trained = all(row.trained_accuracy is not None for row in rows)
    middle.set_xlabel("MACs (millions)", fontsize=9)
    right.set_xlabel(f"predicted latency (ms), {rows[0].latency.split(' on ')[0]}", fontsize=8)
    for axes in (middle, right):
        axes.set_ylabel(f"test accuracy, {'trained' if trained else 'as far as trained'} (%)", fontsize=9)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        if target is not None:
            line = axes.axvline if axes is left else axes.axhline
            line(100 * target, color="#444444", linestyle=":", linewidth=1)
    if middle.get_legend_handles_labels()[0]:
        middle.legend(fontsize=8)
    return figure


def _marked(run: Row) -> list[tuple[float | None, str]]:
    bare = run.child_accuracy_without_recalibration
    return [(run.search_accuracy, "o"), (bare, "x"), (run.child_accuracy, "^"), (run.trained_accuracy, "*")]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def draw_all(rows: Sequence[Row], folder: Path, target: float | None) -> list[Path]:
    """Writes every picture as PNG and SVG; returns the PNGs. Strips of cells where runs kept any."""
    figures = {"curves": draw_curves(rows, target), "children": draw_children(rows, target)}
    for label in labels(rows):
        run = Run.open(folder / of(rows, label)[0].folder)
        if (run.folder / "theta.npy").is_file() and hasattr(run.best.search_space(), "wiring"):
            figures[f"cells-{label}"] = draw_strip(run)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.svg")
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
