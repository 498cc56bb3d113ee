"""How all pictures look: one palette that colour-blind readers can tell apart, sizes in pixels, quiet axes.

Colours are chosen for a white page. `DARK` says what stands for each of them on a dark one; pictures that are shown in
both (`pynas.report`) may use no other colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynas.plan import make_space
from pynas.registry import SearchSpace
from pynas.results import Run, read_candidates
from pynas.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, MUTED, LINE, FAINT = "#000000", "#ffffff", "#5b6570", "#b8c0c8", "#e8ecf0"
# Okabe and Ito's palette.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, MUTED)
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), "-")  # so that lines differ without colour, too

# What stands for a colour on a dark page: first those above, then those of `draw`, `pareto` and `comparison`.
DARK: Mapping[str, str] = {
    INK: "#e4e8ec",
    PAPER: "#161b21",
    MUTED: "#a3adb8",
    LINE: "#4b555f",
    FAINT: "#262d35",
    BLUE: "#5fb2ef",
    VERMILION: "#ff8f4d",
    GREEN: "#3ecf9c",
    PURPLE: "#eaa6cb",
    ORANGE: "#f6bb45",
    SKY: "#9bd6f7",
    "#332288": "#9d94f2",
    "#4477aa": "#7fb3e4",
    "#aa3377": "#e787c0",
    "#cc6677": "#f39aa8",
    "#117733": "#5ec97f",
    "#999933": "#cfcf62",
    "#777777": "#a6aeb6",
    "#ddaa33": "#efc662",
    "#1f5fa8": "#7cb4f2",
    "#d1495b": "#ff8494",
    "#a8a8a8": "#7f8890",
    "#444444": "#b9c0c7",
    "#b0b0b0": "#59626b",
    "#767676": "#8b949c",
    "#eeeeee": "#2b323a",
    "#bbbbbb": "#717a83",
    "#cccccc": "#4b535b",
    "#ee6677": "#ff93a0",
    "#228833": "#62cc74",
    "#ccbb44": "#e3d46a",
    "#66ccee": "#8addf6",
}
TEXT, SMALL = 12, 10.5  # pixels
DPI = 72.0  # so that sizes in points are pixels of the page


def new_figure(width: float, height: float, arranged: bool = True) -> Figure:
    """An empty figure of so many pixels, whose axes make room for labels unless they are placed by hand."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), layout="constrained" if arranged else None)


def dress(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Labels, a light grid, and no frame but for the axes themselves."""
    axes.set_xlabel(x, fontsize=SMALL, color=MUTED)
    axes.set_ylabel(y, fontsize=SMALL, color=MUTED)
    if title:
        axes.set_title(title, fontsize=TEXT, loc="left", color=INK)
    axes.grid(color=FAINT, linewidth=1)
    axes.set_axisbelow(True)
    quiet(axes)


def name_bars(axes: Axes, names: Sequence[str], margin: float, **text: Any) -> None:
    """Names of horizontal bars, the first on top, and room beside the longest for its value."""
    axes.set_yticks(range(len(names)), names, **text)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=margin)


def quiet(axes: Axes) -> None:
    """Thin axes with small labels."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(labelsize=SMALL, colors=MUTED, length=3, width=0.8)


def legend(axes: Axes, **changes: Any) -> None:
    """A legend without a frame, where there is something to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        given = {"fontsize": SMALL, "frameon": False, "labelcolor": INK, "handlelength": 2.2, **changes}
        axes.legend(handles, labels, **given)


def legend_above(axes: Axes, width: float) -> None:
    """A legend above the axes of a picture of so many pixels, where no curve runs through it; the picture grows."""
    handles, labels = axes.get_legend_handles_labels()
    letters = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), 4, int((width - 60) / (7.0 * letters + 46))))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + 17 * -(-len(labels) // columns) / DPI)
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.1, columnspacing=1.2)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers, such as epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def folder_of(run: Run | str | Path) -> RunFolder:
    """The folder of a run, finished or not."""
    return RunFolder(run.folder) if isinstance(run, Run) else RunFolder.open(run)


def space_of(folder: RunFolder) -> SearchSpace:
    """The space of a run: that of what it found, or before that the one that was asked for."""
    found = read_candidates(folder)
    if found:
        return found[0].architecture.search_space()
    config = folder.config()
    return make_space(config["space"], config.get("space_options") or {})
