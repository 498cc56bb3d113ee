"""A network layer by layer: blocks as boxes, branches as a grid, cells as graphs.

A layer's box is as high as its expansion, coloured by its kernel, and cut into as many parts as it has groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_models.spec import OpSpec
from pynas.architecture import Architecture
from pynas.draw import draw_cells
from pynas.plots import style
from pynas.results import Run
from pynas.subsets import picks_any
from pynas.supernet import deployed_specs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KERNELS = {1: style.MUTED, 3: style.BLUE, 5: style.VERMILION, 7: style.PURPLE}
BRANCHES = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY, style.MUTED)
STEP, HIGH, KEY = 42, 132, 44  # pixels from layer to layer, of a row of them, and of what explains them


@dataclass(frozen=True)
class Layer:
    """A slot of a network with what was chosen there.

    Args:
        name: Of the slot.
        option: Chosen; several joined by "+", none as "-".
        spec: Of the op that runs there when it is deployed; None where nothing does.
        size: Height and width that come in, in pixels.
        stride: Of the layer.
        in_channels: Channels that come in.
        out_channels: Channels that go out.
    """

    name: str
    option: str
    spec: OpSpec | None
    size: int
    stride: int
    in_channels: int
    out_channels: int


def read_layers(architecture: Architecture) -> list[Layer]:
    """The slots of a network in order, with what it chose."""
    layers = []
    for slot in architecture.search_space().slots():
        names = architecture.choices[slot.choice.name]
        specs = [spec for spec in deployed_specs(slot, names) if not spec.free]
        told = (slot.size, slot.stride, slot.in_channels, slot.out_channels)
        layers.append(Layer(slot.name, "+".join(names) or "-", specs[0] if specs else None, *told))
    return layers


def plot_network(net: Architecture | Run | str | Path, width: float = 1040) -> Figure:
    """A network, drawn as its space wants it: boxes for layers, a grid of branches, graphs for cells.

    Args:
        net: An architecture; of a finished run, or its folder, the best one.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If the run's search has not finished.
    """
    if not isinstance(net, Architecture):
        net = (net if isinstance(net, Run) else Run.open(net)).best
    architecture = net
    space = architecture.search_space()
    if hasattr(space, "wiring"):
        return draw_cells(architecture, width)
    if picks_any(space.choices()):
        return _branches(architecture, width)
    return _boxes(read_layers(architecture), width)


def _boxes(layers: Sequence[Layer], width: float) -> Figure:
    """Layers from left to right, in as many rows as the width asks for."""
    per_row = max(1, min(len(layers), int((width - 16) / STEP)))
    rows = math.ceil(len(layers) / per_row)
    per_row = math.ceil(len(layers) / rows)  # rows of equal length
    kernels = sorted({layer.spec.kernel for layer in layers if layer.spec is not None})
    figure = style.new_figure(width, rows * HIGH + KEY, arranged=False)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(rows * HIGH + KEY, 0)
    begin = max(8.0, (width - per_row * STEP) / 2) if width > 500 else 8.0
    step = min(72.0, (width - 2 * begin) / per_row) if width <= 500 else min(72.0, (width - 16) / per_row)
    begin = (width - step * per_row) / 2
    for place, layer in enumerate(layers):
        row, column = divmod(place, per_row)
        middle, floor = begin + (column + 0.5) * step, row * HIGH + 92
        _wire(axes, middle, floor, step, column > 0, column < per_row - 1 and place < len(layers) - 1)
        _box(axes, layer, middle, floor, step)
    _key(axes, kernels, any(layer.spec is None for layer in layers), rows * HIGH + 20, width)
    return figure


def _wire(axes: Axes, middle: float, floor: float, step: float, before: bool, after: bool) -> None:
    y = floor - 30
    left, right = middle - step / 2 if before else middle, middle + step / 2 if after else middle
    axes.plot([left, right], [y, y], color=style.LINE, linewidth=1.4, zorder=1)


def _box(axes: Axes, layer: Layer, middle: float, floor: float, step: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    spec, centre = layer.spec, floor - 30
    if spec is None:
        axes.plot([middle], [centre], "o", markersize=7, markerfacecolor=style.PAPER, markeredgecolor=style.MUTED)
        label = "skip"
    else:
        high, wide = _height(spec), min(30.0, 0.68 * step)
        colour, parts = KERNELS.get(spec.kernel, style.GREEN), max(1, spec.groups if spec.kind == "mbconv" else 1)
        each = (high - 3 * (parts - 1)) / parts
        for part in range(parts):
            corner = (middle - wide / 2, centre - high / 2 + part * (each + 3))
            box = FancyBboxPatch(corner, wide, each, "round,pad=0,rounding_size=3", fc=colour, ec="none", zorder=2)
            axes.add_patch(box)
        label = layer.option.split("_")[0] if spec.kind != "mbconv" else f"k{spec.kernel} e{spec.expansion}"
    axes.text(middle, floor + 12, label.replace(" ", "\n"), fontsize=9.5, color=style.INK, ha="center", va="top",
              linespacing=1.15)  # fmt: skip
    if layer.stride > 1:
        x = middle - step / 2 + 0.5
        axes.plot([x, x], [centre - 44, centre + 38], color=style.MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.text(x + 2, centre - 46, f"{-(-layer.size // layer.stride)}px", fontsize=9, color=style.MUTED, ha="left")


def _height(spec: OpSpec) -> float:
    """In pixels, by the expansion: 1, 3 and 6 are clearly apart."""
    return 16.0 + 9.0 * min(spec.expansion, 6) if spec.kind == "mbconv" else 16.0


def _key(axes: Axes, kernels: Sequence[int], skips: bool, y: float, width: float) -> None:
    """Colours and heights in words."""
    from matplotlib.patches import Rectangle

    x = 12.0
    for kernel in kernels:
        axes.add_patch(Rectangle((x, y - 5), 10, 10, fc=KERNELS.get(kernel, style.GREEN), ec="none"))
        axes.text(x + 15, y, f"{kernel}x{kernel}", fontsize=10, color=style.MUTED, va="center")
        x += 50
    if skips:
        axes.plot([x + 5], [y], "o", markersize=6, markerfacecolor=style.PAPER, markeredgecolor=style.MUTED)
        axes.text(x + 15, y, "skip", fontsize=10, color=style.MUTED, va="center")
        x += 52
    below = width < 500
    told = "height: expansion, parts: groups"
    told = told if below else "height: expansion; cut in two: groups; dotted: the image shrinks"
    axes.text(12 if below else x + 4, y + 17 * below, told, fontsize=9 if below else 10, color=style.MUTED, va="center")


def _branches(architecture: Architecture, width: float) -> Figure:
    """A column for each block, a row for each kind of branch; filled where it was kept."""
    from matplotlib.patches import FancyBboxPatch

    space = architecture.search_space()
    choices = space.choices()
    kinds = list(dict.fromkeys(name for choice in choices for name in choice.options))
    label = 6.6 * max(map(len, kinds)) + 14
    step = min(34.0, (width - label - 8) / len(choices))
    row = 22.0
    figure = style.new_figure(width, row * len(kinds) + 44, arranged=False)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(row * len(kinds) + 44, 0)
    for y, kind in enumerate(kinds):
        axes.text(label - 8, (y + 0.5) * row + 4, kind.replace("_", " "), fontsize=10, color=style.INK, ha="right",
                  va="center")  # fmt: skip
        for x, choice in enumerate(choices):
            if kind not in choice.options:
                continue
            kept = kind in architecture.choices[choice.name]
            given: dict[str, Any] = {"fc": BRANCHES[y % len(BRANCHES)] if kept else style.FAINT, "ec": "none"}
            corner, side = (label + x * step + 1.5, y * row + 6), max(2.0, step - 3)
            axes.add_patch(FancyBboxPatch(corner, side, row - 5, "round,pad=0,rounding_size=2", **given))
    bottom = row * len(kinds) + 16
    every = max(1, math.ceil(26 / step))
    for x in range(0, len(choices), every):
        axes.text(
            label + (x + 0.5) * step, bottom, str(x + 1), fontsize=9.5, color=style.MUTED, ha="center", va="center"
        )
    told = "block; filled: kept, pale: searched and left out"
    axes.text(8 if width < 500 else label, bottom + 17, told, fontsize=10, color=style.MUTED, va="center")
    return figure
