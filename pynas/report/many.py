"""Several runs side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynas.plots import curves, network, style
from pynas.report import found, ranks, sources
from pynas.report.head import against_random, subtitle
from pynas.report.parts import Absent, Code, Listing, Part, Picture, Section, Table, number, percent
from pynas.report.told import Told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("Accuracy", "Loss", "Expected latency")
LABEL = 22  # letters of a run's name in a legend
Left = list[tuple[str, str]]


def build_many(runs: Sequence[Told]) -> tuple[list[Section], Left]:
    """Sections that compare runs, and what was left out with the reason."""
    left: Left = []
    sections = [Section("runs", "The runs", [_table(runs)])]
    scatter = _kept("Accuracy against latency", left, _points, runs)
    if scatter:
        sections.append(Section("found", "What they found", scatter))
    lines = [part for title in CURVES for part in _kept(title, left, _overlaid, runs, title)]
    if lines:
        sections.append(Section("curves", "Curves", lines))
    drawn = [part for told in runs for part in _kept(f"Network of {told.name}", left, _drawn, told)]
    if drawn:
        sections.append(Section("networks", "Networks", drawn))
    again: list[Part] = [part for told in runs for part in _kept(f"Command of {told.name}", left, _command, told)]
    return [*sections, Section("again", "Where the numbers come from", [_sources(runs), *again])], left


def _kept(name: str, left: Left, make: Any, *given: Any) -> list[Part]:
    try:
        return [make(*given)]
    except KeyError as error:
        left.append((name, f"a file of the run lacks {error}"))
    except (Absent, ValueError, OSError) as error:
        left.append((name, str(error).rstrip(".")))
    return []


def _table(runs: Sequence[Told]) -> Listing:
    rows = []
    for told in runs:
        figures, config = told.figures, told.config
        ahead = against_random(figures) if figures else None
        best = told.run.candidates[0] if told.run is not None else None
        rows.append(
            (
                told.name,
                told.status,
                told.strategy,
                str(config["space"]),
                told.where,
                str(config.get("seed", "–")),
                percent(figures.get("test_accuracy")),
                percent(best.accuracy if best else None),
                number(figures.get("predicted_ms")),
                number(figures.get("measured_ms")),
                number(best.macs if best else None, ","),
                number(best.params if best else None, ","),
                "–" if ahead is None else f"{ahead:+.2f}",
                f"{told.seconds:,.0f}",
            )
        )
    columns = ("run", "state", "strategy", "space", "device", "seed", "test accuracy", "held out", "predicted ms",
               "measured ms", "MACs", "params", "points over random", "search s")  # fmt: skip
    return Listing("", Table(columns, rows))


def _points(runs: Sequence[Told]) -> Picture:
    done = [told for told in runs if told.figures]
    if not done:
        raise Absent("none of the runs has trained what it found")
    rows = [
        (told.name, percent(told.figures["test_accuracy"]), number(told.figures["predicted_ms"]), told.where)
        for told in done
    ]
    devices = {told.figures["device"] for told in done}
    caption = "Stars: found networks; dots: random ones of the same run."
    if len(devices) > 1:
        caption += " The runs' latency tables differ, so do not compare their latencies."
    alt = "Test accuracy against predicted latency of the found network of each run, and of its random networks."
    table = Table(("run", "test accuracy", "predicted ms", "device"), rows)
    return Picture("Accuracy against latency", alt, lambda width: _scatter(done, width), table, caption)


def labels(runs: Sequence[Told]) -> dict[str, str]:
    """Short names for legends, by the names of the runs: as much of the path's end as tells them apart."""
    paths = {told.name: told.folder.path.absolute().parts for told in runs}
    for length in range(1, 5):
        ends = {name: "/".join(parts[-length:]) for name, parts in paths.items()}
        if len(set(ends.values())) == len(paths):
            break
    return {name: end if len(end) <= LABEL else f"…{end[1 - LABEL :]}" for name, end in ends.items()}


def _scatter(runs: Sequence[Told], width: float) -> Figure:
    named = labels(runs)
    figure = style.new_figure(width, 340)
    axes = figure.add_subplot()
    for place, told in enumerate(runs):
        colour, figures = style.SERIES[place % len(style.SERIES)], told.figures
        if "branches" not in figures:
            others = [(net["cost"], 100 * net["accuracy"]) for net in figures["baseline"]]
            if others:
                axes.plot(*zip(*others, strict=True), "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.plot([figures["predicted_ms"]], [100 * figures["test_accuracy"]], "*", color=colour, markersize=14,
                  markeredgewidth=0, label=named[told.name])  # fmt: skip
    style.dress(axes, "predicted latency (ms)", "test accuracy (%)")
    axes.margins(0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=style.SMALL, frameon=False,
                  ncols=1 if width < 400 else 2, labelcolor=style.INK)  # fmt: skip
    return figure


def _overlaid(runs: Sequence[Told], title: str) -> Picture:
    """The first curve of that title of every run."""
    lines, units, named = [], [], labels(runs)
    for told in runs:
        for panel in curves.read_panels(told.folder.path):
            if panel.title == title:
                line = panel.lines[-1] if title == "Accuracy" else panel.lines[0]
                lines.append(dataclasses.replace(line, name=f"{named[told.name]}: {line.name}"))
                units.append(panel.unit)
    if not lines:
        raise Absent("none of the runs logged it")
    places = sorted({x for line in lines for x in line.x})
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    rows = [(f"{x:g}", *(number(line.get(x)) for line in values)) for x in places]
    table = Table(("epoch", *(line.name for line in lines)), rows)
    panel = curves.Panel(title, units[0], tuple(lines))
    return Picture(title, f"{title} over epochs, a line for each run.", lambda w: curves.plot_panel(panel, w), table)


def _drawn(told: Told) -> Picture:
    run = found.finished(told)
    picture = found.drawn(told)
    assert isinstance(picture, Picture)
    return dataclasses.replace(picture, title=told.name, draw=lambda width: network.plot_network(run, width))


def _command(told: Told) -> Part:
    return Code(told.name, sources.in_lines(sources.command(told.config)))


def _sources(runs: Sequence[Told]) -> Listing:
    rows = []
    for told in runs:
        table = sources.device_of(told)
        device = table.describe() if table is not None else "no table that can be read in the folder"
        images = told.figures.get("test_images")
        tested = f"{images:,} test images, one seed" if images else "not tested"
        rows.append((told.name, subtitle(told), device, tested))
    return Listing("", Table(("run", "what", "latency", "accuracy"), rows, prose=True))


def build_comparison(folder: Path) -> tuple[list[Section], Left]:
    """What `pynas compare` left in a folder."""
    rows, target = ranks.read_rows(folder)
    sections = [
        Section("table", "The comparison", [ranks.comparison_table(rows, target)]),
        Section("curves", "Searches", [ranks.comparison_curves(rows, target)]),
        Section("children", "Found networks", [ranks.comparison_children(rows, target)]),
    ]
    left: Left = []
    drawn = []
    for label in dict.fromkeys(row.label for row in rows):
        first = next(row for row in rows if row.label == label)
        drawn += _kept(f"Network of {label}", left, lambda name: _drawn(Told.of(folder / name)), first.folder)
    if drawn:
        sections.append(Section("networks", "Networks of the first seed", drawn))
    told = [(row.folder, row.latency, f"gradients {row.gradients:,}, accuracy on {row.curve_source}") for row in rows]
    table = Table(("run", "latency", "search"), told, prose=True)
    return [*sections, Section("again", "Where the numbers come from", [Listing("", table)])], left
