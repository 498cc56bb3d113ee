"""Cells as pictures: one architecture, a search's cells over its epochs, and the credit of their edges.

A cell is drawn as an arc diagram: inputs, nodes and output on a line, an arc for every edge. Every arc has its summit
in a place of its own, so that 14 labelled edges stay readable, and nodes keep their place when others vanish.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cost_models.files import write_atomic
from pynas.architecture import Architecture
from pynas.choices import Node
from pynas.rank import write_png
from pynas.registry import SPACES, SearchSpace
from pynas.results import Run
from pynas.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE = "none"
# Paul Tol's muted and bright palettes: told apart by colour-blind readers, and alike for alike operations.
COLOURS = {
    "sep_conv_3x3": "#332288",
    "sep_conv_5x5": "#4477AA",
    "dil_conv_3x3": "#AA3377",
    "dil_conv_5x5": "#CC6677",
    "max_pool_3x3": "#117733",
    "avg_pool_3x3": "#999933",
    "skip_connect": "#777777",
}
OTHER = "#DDAA33"
DASHED = ("skip_connect",)
RIM = 0.13  # height of a node's upper rim
RISE = 0.42  # of an arc's summit, for each place that it spans
NAMES = {"normal": "normal cell", "reduce": "reduction cell"}
COLUMNS = 7  # epochs of a strip

Cell = Mapping[tuple[int, int], str]  # operation of every edge that is there, by source and node


@dataclass(frozen=True)
class Look:
    """How labels of a drawing look.

    Args:
        text: Size of labels, in points.
        circle: Diameter of nodes, in points.
        short: Whether operations have short names.
        high: Multiplies the height.
    """

    text: float = 8.0
    circle: float = 31.0
    short: bool = False
    high: float = 1.0

    @staticmethod
    def of(width: float) -> Look:
        """What suits a width in points."""
        return Look(9.0, 25.0, True, 0.9) if width < 600 else Look(11.0, 36.0, False, 1.15)


def draw_cells(architecture: Architecture, width: float | None = None) -> Figure:
    """The cells of an architecture as graphs, a matplotlib figure; `save_figure` writes it.

    Edges that are `none`, or start from a node that nothing reaches, are left out. Such nodes, and inputs that no edge
    starts from, are drawn in grey.

    Args:
        architecture: To draw.
        width: Of the figure, in points; by default what labels need. Below 600, operations have short names.

    Raises:
        ValueError: If its space has no cells.

    >>> import pynas
    >>> len(draw_cells(pynas.published("snas_aggressive")).axes)
    2
    """
    from matplotlib.figure import Figure

    space = architecture.search_space()
    cells = cells_of(space, {name: options[0] for name, options in architecture.choices.items()})
    places = _places(space)
    inches = 1.45 * (places + 1) if width is None else width / 72
    look = Look() if width is None else Look.of(width)
    heights = [_height(cell) * look.high for cell in cells.values()]
    figure = Figure(figsize=(inches, sum(heights)), layout="constrained")
    axes = figure.subplots(len(cells), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, cell) in zip(axes, cells.items(), strict=True):
        _draw(axis, cell, places, look)
        _title(axis, f"{NAMES.get(name, name)}: {_summary(cell, places)}", look.text + 2)
    return figure


def draw_strip(run: Run | str | Path, columns: int = COLUMNS) -> Figure:
    """The most probable cells of a search after some of its epochs: edges and nodes dying.

    Args:
        run: Of a strategy that keeps the history of its distribution, such as snas or darts, in a space of cells.
        columns: At most so many epochs, evenly spaced, the last among them.

    Raises:
        ValueError: The space has no cells, the run kept no history, or `columns` is not positive.
    """
    if columns < 1:
        raise ValueError(f"columns must be a positive number, not {columns}.")
    found = _opened(run)
    space = found.best.search_space()
    _nodes(space)
    path = found.folder / "theta.npy"
    if not path.is_file():
        raise ValueError(f"{found.folder} has no history of a distribution; strategies snas and darts keep one.")
    history = np.load(path)
    shown = sorted({int(epoch) for epoch in np.linspace(0, len(history) - 1, min(columns, len(history))).round()})
    return draw_grid(space, {f"epoch {epoch + 1}": most_probable(space, history[epoch]) for epoch in shown})


def draw_grid(space: SearchSpace, networks: Mapping[str, Mapping[str, str]]) -> Figure:
    """Cells of several networks side by side: a column for each, a row for each type of cell.

    Args:
        space: With cells.
        networks: By the title of their column; the option of every choice.

    Raises:
        ValueError: If the space has no cells, or there is no network.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not networks:
        raise ValueError("There is no network to draw.")
    drawn = {title: cells_of(space, options) for title, options in networks.items()}
    places, names = _places(space), list(next(iter(drawn.values())))
    tops = [max(_top(cells[name]) for cells in drawn.values()) for name in names]
    figure = Figure(figsize=(2.1 * len(drawn), 1.05 * sum(tops) / RISE * 0.42 + 0.9), layout="constrained")
    axes = figure.subplots(len(names), len(drawn), squeeze=False, height_ratios=tops)
    for column, (title, cells) in enumerate(drawn.items()):
        for row, (name, cell) in enumerate(cells.items()):
            _draw(axes[row, column], cell, places, None, top=tops[row])
            over = f"{title}\n" if row == 0 else ""
            _title(axes[row, column], f"{over}{_summary(cell, places)}", 8)
            if column == 0:
                axes[row, 0].text(-0.75, 0.2, NAMES.get(name, name), fontsize=8, rotation=90, ha="center", va="bottom")
    every = [option for cells in drawn.values() for cell in cells.values() for option in cell.values()]
    used = [option for option in COLOURS if option in every]
    lines = [Line2D([], [], color=COLOURS[option], linestyle=_style(option), linewidth=2) for option in used]
    columns = max(2, min(7, int(1.45 * len(drawn))))
    figure.legend(
        lines, [_words(option) for option in used], loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    return figure


def draw_credit(run: Run | str | Path, width: float = 648) -> Figure:
    """The credit that the loss gave every edge after every epoch (`pynas.credit`): a colour for each.

    Args:
        run: Of strategy snas.
        width: Of the figure, in points.

    Raises:
        ValueError: The space has no cells, or the run logged no credit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = _opened(run)
    nodes = _nodes(found.best.search_space())
    logged = [record["credit"] for record in RunFolder(found.folder).metrics("search") if record.get("credit")]
    if not logged:
        raise ValueError(f"{found.folder} has no credit of edges; strategy snas logs it unless credit is false.")
    types = list(dict.fromkeys(node.cell for node in nodes))
    figure = Figure(figsize=(width / 72, 2.9 * len(types)), layout="constrained")
    axes = figure.subplots(len(types), 1, squeeze=False)[:, 0]
    most = max(abs(value) for credits in logged for value in credits.values()) or 1.0
    for axis, cell in zip(axes, types, strict=True):
        names = [name for node in nodes if node.cell == cell for name in node.choices]
        table = np.array([[credits[name] for credits in logged] for name in names])
        place = (0.5, len(logged) + 0.5, len(names) - 0.5, -0.5)
        image = axis.imshow(
            table, aspect="auto", cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest", extent=place
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_yticks(range(len(names)), [_edge_name(name) for name in names], fontsize=9)
        axis.set_xlabel("epoch", fontsize=9)
        axis.tick_params(axis="x", labelsize=9)
        _title(axis, f"{NAMES.get(cell, cell)}: credit of each edge", 10)
        bar = figure.colorbar(image, ax=axis)
        bar.set_label("blue: lowers the loss", fontsize=9)
        bar.ax.tick_params(labelsize=9)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure atomically as .png or .svg, by the path's suffix, and returns the path.

    Raises:
        ValueError: For another suffix.
        OSError: It cannot be written.
    """
    where = Path(path)
    kind = where.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"A figure is written as .png or .svg, not as {where.name!r}.")
    if kind == "png":
        return write_png(figure, where)
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pynas"}):  # the same figure gives the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(where, buffer.getvalue())
    return where


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(run)


def cells_of(space: SearchSpace, options: Mapping[str, str]) -> dict[str, Cell]:
    """Edges that are there and bring something, with their operations, by type of cell.

    Args:
        space: With cells.
        options: The option of every choice.

    Raises:
        ValueError: If the space has no cells.
    """
    cells: dict[str, dict[tuple[int, int], str]] = {}
    reached: dict[str, set[int]] = {}
    for node in _nodes(space):
        cell, there = cells.setdefault(node.cell, {}), reached.setdefault(node.cell, {0, 1})
        for source, choice in zip(node.sources, node.choices, strict=True):
            if source in there and options[choice] != NONE:
                cell[source, node.index] = options[choice]
                there.add(node.index)
    return dict(cells)


def most_probable(space: SearchSpace, log_p: Any) -> dict[str, str]:
    """The option of every choice with the largest value in its row, (choices, options)."""
    rows = zip(space.choices(), log_p, strict=True)
    return {choice.name: choice.options[int(row[: len(choice.options)].argmax())] for choice, row in rows}


def _nodes(space: SearchSpace) -> Sequence[Node]:
    nodes: Sequence[Node] = getattr(space, "wiring", tuple)()
    if not nodes:
        able = ", ".join(name for name, make in SPACES.items() if hasattr(make, "wiring"))
        raise ValueError(f"Space {space.name!r} has no cells to draw. Spaces that have: {able}.")
    return nodes


def _places(space: SearchSpace) -> int:
    """Inputs and nodes of a cell."""
    return max(node.index for node in _nodes(space)) + 1


def _top(cell: Cell) -> float:
    """Height of the highest summit."""
    return RISE * max((node - source for source, node in cell), default=1) + 0.25


def _height(cell: Cell) -> float:
    """Of a picture, in inches."""
    return 1.35 * _top(cell) + 1.35


def _summary(cell: Cell, places: int) -> str:
    vanished = places - 2 - len({node for _, node in cell})
    edges = f"{len(cell)} edge{'' if len(cell) == 1 else 's'}"
    return edges + (f", {vanished} node{'' if vanished == 1 else 's'} vanished" if vanished else "")


def _title(axis: Axes, text: str, size: float) -> None:
    axis.set_title(text, fontsize=size, loc="left" if size > 8 else "center")


def _words(option: str) -> str:
    return option.replace("_connect", "").replace("_", " ")


def _brief(option: str) -> str:
    """`sep_conv_5x5` as "sep 5"."""
    first, *_, last = option.split("_")
    return f"{first} {last[0]}" if last[0].isdigit() else first


def _edge_name(choice: str) -> str:
    _, source, node = choice.rsplit("_", 2)
    return f"{_place_name(int(source))} to {_place_name(int(node))}"


def _place_name(place: int) -> str:
    return ("k-2", "k-1")[place] if place < 2 else f"n{place}"


def _style(option: str) -> Literal["-", "--"]:
    return "--" if option in DASHED else "-"


def _draw(axis: Axes, cell: Cell, places: int, look: Look | None, top: float | None = None) -> None:
    """One cell into axes: arcs above the line for edges, thin ones below to the output; without a look, no labels."""
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path as Curve

    reached = {place for edge in cell for place in edge}
    for (source, node), option in sorted(cell.items(), key=lambda item: item[0][0] - item[0][1]):
        summit = RISE * (node - source)
        # Longer arcs leave further to the left and arrive further to the right, so that those of a node do not cross.
        apart = 0.03 * (node - source - 1)
        start, end, rim = source + 0.08 - apart, node - 0.08 + apart, 0.0 if look is None else RIM
        high = (summit - rim / 4) * 4 / 3
        points = [(start, rim), (start + 0.12, high), (end - 0.12, high), (end, rim)]
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        colour, style = COLOURS.get(option, OTHER), _style(option)
        width = 1.2 if look is None else 1.8
        if look is not None:
            shape: Any = FancyArrowPatch(
                path=curve, arrowstyle="-|>,head_width=2.5,head_length=5", color=colour, linestyle=style, lw=width
            )
            box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}
            middle = (source + node) / 2, summit
            name = _brief(option) if look.short else _words(option)
            axis.text(*middle, name, fontsize=look.text, color=colour, ha="center", va="center", bbox=box, zorder=4)
        else:
            shape = PathPatch(curve, fill=False, edgecolor=colour, linestyle=style, lw=width)
        axis.add_patch(shape)
    for place in range(places):
        _circle(axis, place, place in reached, look)
        if place >= 2 and place in reached:
            _to_output(axis, place, places)
    _circle(axis, places, bool(cell), look, "out")
    axis.set_xlim(-0.6, places + 0.6)
    axis.set_ylim(-0.42 if look is None else -0.5, top if top is not None else _top(cell))
    axis.set_axis_off()


def _circle(axis: Axes, place: int, there: bool, look: Look | None, name: str = "") -> None:
    colour = "black" if there else "#767676"
    face = "#EEEEEE" if there else "white"
    style = {"marker": "o", "markersize": 5.0 if look is None else look.circle, "markeredgecolor": colour}
    axis.plot([place], [0.0], linestyle="none", markerfacecolor=face, zorder=5, **style)  # type: ignore[arg-type]
    if look is not None:
        told = name or _place_name(place)
        axis.text(place, 0.0, told, fontsize=look.text, color=colour, ha="center", va="center", zorder=6)


def _to_output(axis: Axes, place: int, places: int) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    depth = -0.12 * (places - place) ** 0.5 - 0.12
    points = [(place, 0.0), (place + 0.1, depth * 4 / 3), (places - 0.1, depth * 4 / 3), (places, 0.0)]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    axis.add_patch(PathPatch(Curve(points, codes), fill=False, edgecolor="#BBBBBB", lw=1.0, zorder=1))
