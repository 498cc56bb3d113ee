"""How the search went: theta, entropy, curves, cells over the epochs, credit of edges."""

from __future__ import annotations

import numpy as np

from pynas.draw import COLUMNS, cells_of, draw_credit, draw_strip, most_probable
from pynas.plots import curves, history
from pynas.plots.pareto import evenly
from pynas.report.found import finished
from pynas.report.parts import WHOLE, Absent, Part, Picture, Table, number
from pynas.report.told import Told

MOST_EPOCHS = 60  # rows of a table of epochs
STRIP_NARROW = 2  # cells side by side on a phone


def theta(told: Told) -> Part:
    """The heat map."""
    run = told.folder.path
    found = history.read_history(run)
    options = list(dict.fromkeys(name for choice in found.choices for name in choice.options))
    rows = []
    for place, choice in enumerate(found.choices):
        last = dict(zip(choice.options, found.values[-1, place], strict=False))
        taken = "" if found.found is None else " + ".join(found.found[place]) or "none"
        rows.append((choice.name, *(number(last.get(name), ".3f") for name in options), taken))
    epochs = len(found.values)
    alt = (
        f"Heat maps of {len(found.choices)} choices over {epochs} epochs: {found.what} of every option, the deeper the "
        "colour the larger."
    )
    table = Table(("choice", *options, "taken"), rows, f"After epoch {epochs}. All epochs are in theta.npy.")
    kinds = {
        history.LOGIT: "Logits of all branches, which are ranked over the whole network",
        history.SHARE: "What the controller drew, epoch by epoch",
    }
    title = kinds.get(found.what, "Probability of every option")
    return Picture(title, alt, lambda width: history.plot_theta(run, width), table, whole=True)


def entropy(told: Told) -> Part:
    """How sure the search became."""
    found = history.read_entropy(told.folder.path)
    shown = evenly(len(found.mean), MOST_EPOCHS)
    rows = []
    for place in shown:
        low_high = (min(found.choices[place]), max(found.choices[place])) if found.choices else (None, None)
        rows.append((str(place + 1), f"{found.mean[place]:.4g}", *(number(value) for value in low_high)))
    alt = f"Entropy over epochs, in {found.unit}: from {found.mean[0]:.3g} to {found.mean[-1]:.3g} in the mean."
    columns = ("epoch", "mean", "least of a choice", "most of a choice")
    caption = "Near zero the search is sure of its network; a sudden fall may be a collapse."
    draw = lambda width: history.plot_entropy(told.folder.path, width)  # noqa: E731
    return Picture("Entropy", alt, draw, Table(columns, rows), caption)


def panels(told: Told) -> list[Picture]:
    """A picture for each kind of curve."""
    found = curves.read_panels(told.folder.path)
    if not found:
        raise Absent("no epoch is finished")
    return [_panel(panel) for panel in found]


def _panel(panel: curves.Panel) -> Picture:
    places = sorted({x for line in panel.lines for x in line.x})
    values = [dict(zip(line.x, line.y, strict=True)) for line in panel.lines]
    rows = [
        (f"{places[i]:g}", *(number(line.get(places[i])) for line in values)) for i in evenly(len(places), MOST_EPOCHS)
    ]
    ends = ", ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in panel.lines)
    unit = f" ({panel.unit})" if panel.unit else ""
    table = Table((panel.across, *(line.name for line in panel.lines)), rows)
    return Picture(
        panel.title,
        f"{panel.title}{unit} over the {panel.across}: {ends}.",
        lambda w: curves.plot_panel(panel, w),
        table,
    )


def epochs(told: Told) -> Part:
    """Cells over the epochs."""
    run = finished(told)
    space = run.best.search_space()
    if not hasattr(space, "wiring"):
        raise Absent(f"space {space.name!r} has no cells")
    path = told.folder.path / "theta.npy"
    if not path.is_file():
        raise Absent(f"strategy {told.strategy} keeps no history of a distribution over edges")
    kept = np.load(path, allow_pickle=False)
    rows = []
    for epoch in evenly(len(kept), MOST_EPOCHS):
        cells = cells_of(space, most_probable(space, kept[epoch]))
        rows.append((str(epoch + 1), *(str(len(cell)) for cell in cells.values())))
    names = list(cells_of(space, most_probable(space, kept[-1])))
    alt = f"The most probable cells after some of {len(kept)} epochs, side by side: which edges live, and which die."
    table = Table(("epoch", *(f"edges, {name} cell" for name in names)), rows)
    draw = lambda width: draw_strip(run, COLUMNS if width >= WHOLE else STRIP_NARROW)  # noqa: E731
    return Picture("Cells over the epochs", alt, draw, table, whole=True)


def credit(told: Told) -> Part:
    """Which edges the loss gave credit."""
    run = finished(told)
    logged = [line["credit"] for line in told.lines if line.get("credit")]
    if not logged or not hasattr(run.best.search_space(), "wiring"):
        raise Absent("strategy snas alone logs it, in a space of cells")
    rows = [(name.replace("_", " "), f"{logged[0][name]:.4g}", f"{logged[-1][name]:.4g}") for name in logged[0]]
    table = Table(("cell, from, to", "first epoch", "last epoch"), rows)
    alt = "Heat map of the credit of every edge over the epochs; blue edges lower the loss."
    caption = "A first-order share of what the loss falls by (SNAS, eq. 17), from the first step of every epoch."
    return Picture("Credit of edges", alt, lambda width: draw_credit(run, width), table, caption, whole=True)
