"""How a search made up its mind: the distribution over options after every epoch, and its entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pynas.choices import Choice
from pynas.plots import style
from pynas.results import Run, read_candidates
from pynas.training.run import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
PROBABILITY, LOGIT, SHARE = "probability", "logit", "share of what was drawn in an epoch"


@dataclass(frozen=True)
class History:
    """The distribution of a search over its epochs.

    Args:
        what: What the numbers are.
        choices: Of the space.
        values: After each epoch, (epochs, choices, options); NaN where a choice has fewer options.
        found: Options of the best network by choice; none before the search is done.
    """

    what: str
    choices: tuple[Choice, ...]
    values: Floats
    found: tuple[tuple[str, ...], ...] | None

    def range(self) -> tuple[float, float]:
        """The values that are shown as nothing and as full colour."""
        low, high = float(np.nanmin(self.values)), float(np.nanmax(self.values))
        if self.what != LOGIT:
            return 0.0, max(high, 0.25)
        return low, high if high > low else low + 1.0


def read_history(run: Run | str | Path) -> History:
    """The distribution of a run's search: of theta where the strategy has one, or what a controller drew.

    A search that is not done yet is read from its checkpoint.

    Raises:
        ValueError: If the strategy learns no distribution, or no epoch is finished.
    """
    folder = style.folder_of(run)
    choices = style.space_of(folder).choices()
    found = read_candidates(folder)
    best = tuple(found[0].architecture.choices[choice.name] for choice in choices) if found else None
    kept = _kept(folder)
    if kept is not None and len(kept):
        if choices[0].pick == "any":
            return History(LOGIT, choices, _masked(kept, choices), best)
        return History(PROBABILITY, choices, probabilities(kept, choices), best)
    lines = folder.metrics("search")
    if any("controller_entropy" in line for line in lines):
        return History(SHARE, choices, _drawn(lines, choices), best)
    name = folder.config()["strategy"]["name"]
    why = "no epoch is finished" if not lines else f"strategy {name} learns no distribution over options"
    raise ValueError(f"{folder.path} has no theta: {why}.")


def _kept(folder: RunFolder) -> Floats | None:
    """Logits after every epoch, from the file of a finished search or the checkpoint of another."""
    path = folder.path / "theta.npy"
    if path.is_file():
        try:
            kept: Floats = np.load(path, allow_pickle=False).astype(np.float64)
        except (ValueError, EOFError):
            raise ValueError(f"{path} is broken. Remove it, and architectures.jsonl, and resume the run.") from None
        return kept
    if (folder.path / "architectures.jsonl").is_file():
        return None  # a finished search without such a file has no theta; its checkpoint need not be read
    history = (folder.load_checkpoint("search") or {}).get("task", {}).get("history")
    return None if history is None else np.asarray(history, dtype=np.float64)


def _masked(values: Floats, choices: Sequence[Choice]) -> Floats:
    out = np.array(values, dtype=np.float64)
    for row, choice in enumerate(choices):
        out[:, row, len(choice.options) :] = np.nan
    return out


def probabilities(logits: Floats, choices: Sequence[Choice]) -> Floats:
    """Softmax over the options of each choice, (epochs, choices, options)."""
    values = _masked(logits, choices)
    powers = np.exp(values - np.nanmax(values, axis=-1, keepdims=True))
    out: Floats = powers / np.nansum(powers, axis=-1, keepdims=True)
    return out


def _drawn(lines: Sequence[dict[str, Any]], choices: Sequence[Choice]) -> Floats:
    """Share of an epoch's paths that took each option, from the counts of updates."""
    out = np.full((len(lines), len(choices), max(len(choice.options) for choice in choices)), np.nan)
    before: dict[str, dict[str, float]] = {}
    for epoch, line in enumerate(lines):
        for row, choice in enumerate(choices):
            counts = line["updates"][choice.name]
            new = [counts[name] - before.get(choice.name, {}).get(name, 0) for name in choice.options]
            out[epoch, row, : len(new)] = np.array(new) / max(1e-12, math.fsum(new))
        before = line["updates"]
    return out


def plot_theta(run: Run | str | Path, width: float = 1040) -> Figure:
    """A heat map for every choice: options over epochs, the deeper the colour the more probable.

    Args:
        run: A search, finished or not, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If the strategy learns no distribution, or no epoch is finished.
    """
    history = read_history(run)
    options = list(dict.fromkeys(name for choice in history.choices for name in choice.options))
    names = [choice.name for choice in history.choices]
    label = 7.0 * max(map(len, options)) + 12
    columns = max(1, min(len(names), int((width - label) / (104 if width > 500 else 88))))
    rows = math.ceil(len(names) / columns)
    columns = math.ceil(len(names) / rows)  # rows of equal length
    high = 13.0 * len(options) + 27
    figure = style.new_figure(width, rows * high + 62)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.05, wspace=0, hspace=0)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[high] * rows + [12])
    for place in range(len(names)):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        first, last = place % columns == 0, place + columns >= len(names)
        _heat(axes, history, place, options, first, last)
    _scale(figure.add_subplot(grid[rows, :]), history, width)
    return figure


def _heat(axes: Axes, history: History, place: int, options: list[str], first: bool, last: bool) -> None:
    choice, (low, high) = history.choices[place], history.range()
    values = np.full((len(options), len(history.values)), np.nan)
    for column, name in enumerate(choice.options):
        values[options.index(name)] = history.values[:, place, column]
    epochs = len(history.values)
    extent = (0.5, epochs + 0.5, len(options) - 0.5, -0.5)
    axes.imshow(_shaded((values - low) / (high - low)), aspect="auto", interpolation="none", extent=extent)
    taken = () if history.found is None else history.found[place]
    for name in taken:
        place_of = ([epochs + 0.5], [options.index(name)])
        axes.plot(*place_of, "<", color=style.VERMILION, markersize=6, markeredgewidth=0, clip_on=False)
    axes.set_title(choice.name, fontsize=style.SMALL, loc="left", color=style.INK, pad=3)
    axes.set_yticks(range(len(options)), options if first else [""] * len(options))
    axes.set_xticks([1, epochs] if epochs > 1 else [1], ["1", str(epochs)][: min(2, epochs)] if last else [])
    axes.tick_params(labelsize=style.SMALL, colors=style.MUTED, length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_color(style.LINE)
        spine.set_linewidth(0.6)


def _shaded(shares: Floats) -> NDArray[np.float64]:
    """One colour whose opacity is the share, so that the page shines through, whether it is light or dark."""
    shade = np.zeros((*shares.shape, 4))
    shade[..., :3] = (0.20, 0.52, 0.82)
    shade[..., 3] = np.clip(np.nan_to_num(shares), 0, 1)
    return shade


def _scale(axes: Axes, history: History, width: float) -> None:
    low, high = history.range()
    axes.imshow(_shaded(np.linspace(0, 1, 64)[None]), aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    axes.set_xlim(0, 1 if width < 500 else 3)
    axes.set_yticks([])
    axes.set_xticks([0, 1], [f"{low:.3g}", f"{high:.3g}"], fontsize=style.SMALL, color=style.MUTED)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    told = f"{history.what}, epochs from left to right"
    mark = "" if history.found is None else "; the triangle marks what was taken"
    axes.set_title(told + mark if width > 500 else told, fontsize=style.SMALL, loc="left", color=style.MUTED, pad=3)


@dataclass(frozen=True)
class Entropy:
    """Entropy of the distribution after every epoch.

    Args:
        unit: "nats a layer", or "nats a decision" of a controller.
        mean: One number an epoch.
        choices: One list an epoch, a number for each choice; empty where only the mean is known.
    """

    unit: str
    mean: tuple[float, ...]
    choices: tuple[tuple[float, ...], ...]


def read_entropy(run: Run | str | Path) -> Entropy:
    """Entropy over the epochs of a search.

    Raises:
        ValueError: If the strategy logs none.
    """
    folder = style.folder_of(run)
    lines = folder.metrics("search")
    if lines and "controller_entropy" in lines[-1]:
        means = tuple(line["controller_entropy"] / max(1, line["controller_decisions"]) for line in lines)
        return Entropy("nats a decision", means, ())
    if lines and "entropy" in lines[-1]:
        rows = tuple(tuple(line["entropy"]) for line in lines)
        return Entropy("nats a choice", tuple(math.fsum(row) / len(row) for row in rows), rows)
    name = folder.config()["strategy"]["name"]
    raise ValueError(f"{folder.path} logged no entropy: strategy {name} has none, or no epoch is finished.")


def plot_entropy(run: Run | str | Path, width: float = 500) -> Figure:
    """Entropy of the distribution over epochs: the mean, and a thin line for every choice.

    Args:
        run: A search, finished or not, or its folder.
        width: Of the picture, in pixels.

    Raises:
        ValueError: If the strategy logs no entropy.
    """
    entropy = read_entropy(run)
    figure = style.new_figure(width, 240)
    axes = figure.add_subplot()
    epochs = range(1, len(entropy.mean) + 1)
    for place in range(len(entropy.choices[0]) if entropy.choices else 0):
        named = "each choice" if place == 0 else None
        line = [row[place] for row in entropy.choices]
        axes.plot(epochs, line, color=style.LINE, linewidth=0.9, label=named)
    axes.plot(epochs, entropy.mean, color=style.BLUE, linewidth=2.2, label="mean", marker="o", markersize=2.5)
    axes.set_ylim(0, 1.12 * max([*entropy.mean, *(max(row) for row in entropy.choices)]))
    style.dress(axes, "epoch", entropy.unit)
    style.whole_numbers(axes)
    style.legend_above(axes, width)
    return figure
