"""A comparison as tables: for the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pynas.comparison.rows import Row, reached, usable

COLUMNS = (
    "strategy",
    "gradients",
    "forward only",
    "seconds",
    "search %",
    "child % bare",
    "child % recalibrated",
    "trained %",
    "entropy",
    "params",
    "MACs",
    "predicted ms",
    "measured ms",
)


def labels(rows: Sequence[Row]) -> list[str]:
    """Of the strategies, in order."""
    return list(dict.fromkeys(row.label for row in rows))


def of(rows: Sequence[Row], label: str) -> list[Row]:
    """The runs of a strategy."""
    return [row for row in rows if row.label == label]


def columns(target: float | None) -> tuple[str, ...]:
    """Heads of the table."""
    wanted = () if target is None else (f"gradients to {target:.0%} in the search",)
    return (*COLUMNS, *wanted, "gradients until usable")


def table(rows: Sequence[Row], target: float | None) -> list[list[str]]:
    """A line for each strategy: means over seeds, with least and most where there are several."""
    return [_line(label, of(rows, label), target) for label in labels(rows)]


def _line(label: str, runs: Sequence[Row], target: float | None) -> list[str]:
    whole, percent = ",.0f", ".2f"
    line = [
        label,
        _mean([run.gradients for run in runs], whole),
        _mean([run.forward_passes for run in runs], whole),
        _mean([run.seconds for run in runs], whole),
        _mean([run.search_accuracy for run in runs], percent, 100),
        _mean([run.child_accuracy_without_recalibration for run in runs], percent, 100),
        _mean([run.child_accuracy for run in runs], percent, 100),
        _mean([run.trained_accuracy for run in runs], percent, 100),
        _mean([run.entropy for run in runs], ".3f"),
        _mean([run.params for run in runs], whole),
        _mean([run.macs for run in runs], whole),
        _mean([run.predicted_ms for run in runs], ".4g"),
        _mean([run.measured_ms for run in runs], ".4g"),
    ]
    if target is not None:
        when = [reached(run, target) for run in runs]
        some = _mean(when, whole)
        missed = sum(each is None for each in when)
        told = f"{some} ({missed} of {len(runs)} never)" if missed else some
        line.append("never" if missed == len(runs) else told)
    first = usable(runs, target)
    line.append("never" if first is None else f"{first.gradients:,} {first.how}")
    return line


def _mean(values: Sequence[float | None], form: str, times: float = 1) -> str:
    known = [times * value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(math.fsum(known) / len(known), form)
    same = min(known) == max(known)
    return mean if same else f"{mean} ({format(min(known), form)} to {format(max(known), form)})"


def notes(rows: Sequence[Row], epochs: int) -> list[str]:
    """What the columns mean, and where latencies come from."""
    held: dict[str, list[str]] = {row.curve_source: [] for row in rows}
    for row in rows:
        if row.label not in held[row.curve_source]:
            held[row.curve_source].append(row.label)
    curves = "; ".join(f"{', '.join(names)} on {source}" for source, names in held.items())
    seeds = ", ".join(dict.fromkeys(str(row.seed) for row in rows))
    what = (
        f"Seeds {seeds}; means (least to most). Gradient computations are images through a backward pass; every search "
        f"had those of {epochs} passes over the images for the weights, or up to a tenth fewer where it ends after "
        "whole passes. forward only: batches through a network without a backward pass, in the search, where they are "
        "counted."
    )
    words = (
        "search: the whole search network on held-out images. child: the found network on test images with the weights "
        "of the search, batch norms as they were (bare) or recalibrated. trained: from scratch, on test images. "
        "entropy: nats a choice, of ENAS's controller nats a decision."
    )
    until = (
        "Until usable: searches, trainings and further seeds as restarts, until a network has the target accuracy on "
        "test images, or without a target until the first one is trained."
    )
    latencies = [f"latency: {source}" for source in dict.fromkeys(row.latency for row in rows)]
    return [what, words, f"Accuracy during the search: {curves}.", until, *latencies]


def markdown(rows: Sequence[Row], epochs: int, target: float | None, pictures: Sequence[str]) -> str:
    """The table with its notes and pictures."""
    heads = columns(target)
    lines = [heads, ["---"] * len(heads), *table(rows, target)]
    told = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    seen = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    return f"# Comparison\n\n{told}\n\n" + "\n\n".join(notes(rows, epochs)) + f"\n\n{seen}\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each run, without curves."""
    names = [field.name for field in fields(Row) if field.name != "curve"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()


def as_json(rows: Sequence[Row], target: float | None) -> str:
    """Every run with its curve, and what a target cost."""
    told: dict[str, Any] = {"target_accuracy": target, "runs": [asdict(row) for row in rows], "usable": {}}
    for label in labels(rows):
        first = usable(of(rows, label), target)
        told["usable"][label] = None if first is None else asdict(first)
        if target is not None:
            when = {str(row.seed): reached(row, target) for row in of(rows, label)}
            told.setdefault("gradients_to_target", {})[label] = when
    return json.dumps(told, indent=1) + "\n"
