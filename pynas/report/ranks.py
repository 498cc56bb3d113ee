"""Whether cheap scores order networks, and the comparison that a run belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynas.comparison import tables
from pynas.comparison.figures import draw_children, draw_curves
from pynas.comparison.rows import Point, Row
from pynas.plots import style
from pynas.rank import FEWEST, Ranking, rank
from pynas.report.found import finished
from pynas.report.parts import WHOLE, Absent, Image, Listing, Part, Picture, Table
from pynas.report.told import Told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISON = "comparison.json"


def ranking(told: Told) -> Part:
    """Predicted against true accuracies of networks that were trained alone."""
    run = finished(told)
    kept = told.folder.read_json("ranking.json")
    if kept is None and (told.folder.path / "ranking.png").is_file():
        png = (told.folder.path / "ranking.png").read_bytes()
        return Image("Ranking", "Scatter of predicted against true accuracy, made by pynas rank.", png)
    if kept is None:
        judged = {net.architecture.fingerprint for net in run.judged}
        both = [alone for alone in run.trained if alone.architecture.fingerprint in judged]
        if len(both) < FEWEST:
            raise Absent(
                f"networks with a score of the search that were trained alone: {len(both)}; {FEWEST} are needed "
                f"(pynas retrain {told.name} --net 2, then pynas rank {told.name})"
            )
        kept = as_plain(rank(run, run.trained))
    pairs = list(zip(kept["keys"], kept["predicted"], kept["true"], strict=True))
    rows = [(key, f"{predicted:.2%}", f"{true:.2%}") for key, predicted, true in pairs]
    words = f"Kendall's tau {kept['kendall']}, Spearman {kept['spearman']}. {kept['verdict']}"
    alt = f"Scatter of {len(pairs)} networks, accuracy in the search against accuracy trained alone. {words}"
    table = Table(("network", "in the search", "trained alone"), rows, f"Against {kept['truth']}.")
    return Picture("Do scores of the search order networks?", alt, lambda width: _scatter(pairs, width), table, words)


def as_plain(found: Ranking) -> dict[str, Any]:
    """A ranking as `ranking.json` keeps it."""
    return {
        "keys": list(found.keys),
        "predicted": [float(value) for value in found.predicted],
        "true": [float(value) for value in found.true],
        "kendall": str(found.kendall),
        "spearman": str(found.spearman),
        "regret": {str(k): str(estimate) for k, estimate in found.regret.items()},
        "level": found.level,
        "truth": found.truth,
        "verdict": found.verdict,
    }


def _scatter(pairs: Sequence[tuple[str, float, float]], width: float) -> Figure:
    figure = style.new_figure(width, 320)
    axes = figure.add_subplot()
    axes.plot([100 * p for _, p, _ in pairs], [100 * t for _, _, t in pairs], "o", color=style.BLUE, markersize=5,
              alpha=0.75, markeredgewidth=0)  # fmt: skip
    style.dress(axes, "accuracy in the search (%)", "accuracy trained alone (%)")
    return figure


def comparison_of(folder: Path) -> Path | None:
    """The comparison that lies in a folder, or that it is a run of."""
    return next((place for place in (folder, folder.parent) if (place / COMPARISON).is_file()), None)


def read_rows(folder: Path) -> tuple[list[Row], float | None]:
    """Rows of a comparison, and its target. Raises ValueError for a broken file."""
    path = folder / COMPARISON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_row(entry) for entry in content["runs"]], content["target_accuracy"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}). Run pynas compare again.") from None


def _row(entry: Mapping[str, Any]) -> Row:
    values = {field.name: entry[field.name] for field in fields(Row)}
    return Row(**{**values, "curve": tuple(Point(**point) for point in entry["curve"])})


def compared(told: Told) -> list[Part]:
    """The comparison that a run belongs to: table, curves, networks."""
    folder = comparison_of(told.folder.path)
    if folder is None:
        raise Absent("the run is part of no comparison (pynas compare)")
    rows, target = read_rows(folder)
    return [make(rows, target) for make in (comparison_table, comparison_curves, comparison_children)]


def comparison_table(rows: Sequence[Row], target: float | None) -> Listing:
    """The table of a comparison, a column for each strategy."""
    lines, heads = tables.table(rows, target), tables.columns(target)
    turned = [(head, *(line[place] for line in lines)) for place, head in enumerate(heads)][1:]
    return Listing("Strategies at equal computation", Table(("", *(line[0] for line in lines)), turned))


def comparison_curves(rows: Sequence[Row], target: float | None) -> Picture:
    """Its curves."""
    cells = [
        (row.folder, f"{point.gradients:,}", f"{point.seconds:,.1f}", _percent(point.accuracy), _number(point.entropy))
        for row in rows
        for point in row.curve
    ]
    table = Table(("run", "gradient computations", "seconds", "accuracy", "entropy"), cells)
    names = ", ".join(tables.labels(rows))
    alt = f"Accuracy of the search over computation and time, and entropy, of {names}."
    draw = lambda width: draw_curves(rows, target, 3 if width >= WHOLE else 1)  # noqa: E731
    return Picture("Searches over computation", alt, draw, table, whole=True)


def comparison_children(rows: Sequence[Row], target: float | None) -> Picture:
    """Its found networks."""
    cells = [
        (
            row.folder,
            _percent(row.search_accuracy),
            _percent(row.child_accuracy),
            _percent(row.trained_accuracy),
            _number(row.macs, ","),
            f"{row.predicted_ms:.4g}",
            row.net,
        )
        for row in rows
    ]
    heads = ("run", "search network", "child", "trained", "MACs", "predicted ms", "network")
    alt = "Accuracy of search networks, children and trained networks, and these by size and latency."
    draw = lambda width: draw_children(rows, target, 3 if width >= WHOLE else 1)  # noqa: E731
    return Picture("Found networks", alt, draw, Table(heads, cells), whole=True)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
