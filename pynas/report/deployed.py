"""What `pynas deploy` wrote of a run."""

from __future__ import annotations

from typing import Any

from pynas.report.parts import Absent, Listing, Part, Table, number, percent
from pynas.report.told import Told

FILE = "export/deploy.json"


def files(told: Told) -> Part:
    """The files of a deployment with size, difference, accuracy and latency."""
    made = told.folder.read_json(FILE)
    if made is None:
        raise Absent(f"the run was not deployed (pynas deploy {told.name})")
    rows = [_row(row) for row in made["rows"]]
    note = (
        f"Best for {made['device']}: {made['best']}, {made['why']}. Accuracy of the network before: "
        f"{percent(made['accuracy'])} of {made['images']:,} test images; {made['about']}"
    )
    columns = (
        "file",
        "MB",
        "relative difference",
        "accuracy",
        "ms here",
        f"ms on {made['device']}, predicted",
        "remark",
    )
    return Listing("", Table(columns, rows, note))


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    report, latency = row["report"] or {}, row["latency"] or {}
    size = report.get("size_bytes")
    here = "–" if not latency else f"{latency['median_ms']:.3g} ± {latency['spread_ms']:.1g}"
    runtime = "" if row["own"] or row["predicted_ms"] is None else ", rows of another runtime"
    return (
        row["file"],
        "–" if size is None else f"{size / 1e6:.2f}",
        number(report.get("relative_diff"), ".1e"),
        percent(report.get("accuracy")),
        here,
        number(row["predicted_ms"], ".3g") + runtime,
        row["reason"] or report.get("not_run") or report.get("warning") or "",
    )
