"""From a run to files for a device: every format that can be had here, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cost_models
from cost_models.files import write_atomic
from cost_models.machine import cpu_model
from cost_models.tvm_build.targets import TARGETS
from pynas import settings
from pynas.api import images_of, weighted
from pynas.branch_plan import folded_ms
from pynas.console import Show
from pynas.export import ELSEWHERE, FORMATS, HostLatency, Precision, Quantising, Report
from pynas.export import export as export_net
from pynas.export.judged import time_files
from pynas.exporting import default_file
from pynas.results import Run, SavedModel, Trained, run_of
from pynas.training.data import Data
from pynas.training.evaluate import accuracy
from pynas.training.feed import batches

HERE = ("torch", "ort-local", "tvm-local")  # runners that time this machine


@dataclass(frozen=True)
class Row:
    """One format of a deployment.

    Args:
        format: Its name.
        precision: "float32" or "int8".
        target: CPU that the file is for; "host" for this machine, or for all.
        report: What was written; none where it could not be.
        reason: Why it was not written, and what to type.
        latency: Of one image on this machine; none for files of other machines.
        predicted_ms: On the device; none in int8, of which no table has rows.
        own: Whether the prediction's rows are of this format's own runtime; others may be faster or slower.
    """

    format: str
    precision: Precision
    target: str
    report: Report | None = None
    reason: str = ""
    latency: HostLatency | None = None
    predicted_ms: float | None = None
    own: bool = False

    @property
    def name(self) -> str:
        """Of the file, or of what it would have been."""
        if self.report is not None:
            return self.report.path.name
        marks = [mark for mark, usual in ((self.precision, "float32"), (self.target, "host")) if mark != usual]
        return " ".join([self.format, *marks])

    def note(self) -> dict[str, Any]:
        """As plain JSON values."""
        report = None if self.report is None else self.report.note()
        latency = None if self.latency is None else dict(vars(self.latency))
        return {**vars(self), "file": self.name, "report": report, "latency": latency}


@dataclass(frozen=True)
class Deployment:
    """What `deploy` made.

    Args:
        net: The network in a line.
        device: Name of the device.
        about: Where its latencies come from.
        accuracy: Of the network on the test images, 0 to 1.
        images: How many these are.
        rows: One for each format and precision.
        best: Name of the file to take for the device.
        why: A sentence.
        path: Of the JSON file that holds all of this, beside the files.
    """

    net: str
    device: str
    about: str
    accuracy: float
    images: int
    rows: tuple[Row, ...]
    best: str
    why: str
    path: Path


def deploy(
    run: str | Path | Run | Trained,
    *,
    net: int | None = None,
    weights: Literal["trained", "inherited"] = "trained",
    device: str | None = None,
    formats: list[str] | str | None = None,
    int8: bool = True,
    calibration: int = 128,
    max_drop: float = 0.01,
    repeats: int = 15,
    quiet: bool = False,
) -> Deployment:
    """Writes a trained network in every format, runs each file back, and names the best one for a device.

    A format whose package is missing, or which cannot hold the network, is a row that says why and what to type. The
    files lie in `export/` of the run, or of `nets/<number>`, and `deploy.json` beside them says what is printed.

    Args:
        run: A run's folder, a run, or what `retrain` returned.
        net: Instead of the run's best network another that it found, by its number in the table.
        weights: Those of its own training, or inherited from the run's supernet.
        device: Whose latency is predicted, and whom machine code is for; the run's own by default.
        formats: Some only, for instance "onnx,pte"; see `pynas list formats`.
        int8: Whether to quantise as well, where a format can.
        calibration: Training images that int8 is calibrated on.
        max_drop: Loss of test accuracy, 0 to 1, beyond which an int8 file is warned of, and is not the best.
        repeats: Timings of each file on this machine, in turns.
        quiet: Prints nothing.

    Returns:
        All rows, and the best.

    Raises:
        ValueError: If no format could be written, or the device is unknown.
        FileNotFoundError: If the network was not trained; names the command.
        OSError: If the run's images cannot be read, or its folder not be written.
    """
    show = Show(quiet)
    wanted = _formats(formats)
    if isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats!r}.")
    quantising = Quantising(calibration, max_drop)
    saved, config = weighted(run, net, weights)
    settings.use_threads(config)
    table = _table(saved, device)
    data = images_of(saved, config)
    planned = _planned(wanted, _target(table), int8)
    right = accuracy(saved.net, data.test, data)
    rows = []
    with show.bar("deploying", len(planned)) as bar:
        for row in planned:
            rows.append(_written(row, saved, data, right, quantising))
            bar.advance(rows[-1].name)
    reports = [row.report for row in rows if row.report is not None]
    if not reports:
        raise ValueError(f"No format could be written. {rows[0].name}: {rows[0].reason}")
    rows = _predicted(_timed(rows, data, repeats), saved, table, show)
    best, why = _best(rows, table)
    made = Deployment(
        str(saved.architecture),
        table.name,
        table.describe(),
        right,
        len(data.test),
        tuple(rows),
        best.name,
        why,
        reports[0].path.parent / "deploy.json",
    )
    write_atomic(made.path, json.dumps(_note(made), indent=2) + "\n")
    _show(made, show)
    return made


def _formats(asked: Sequence[str] | str | None) -> list[str]:
    if asked is None:
        return [*FORMATS.names(), *ELSEWHERE]
    names = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked)]
    for name in names:
        if name not in ELSEWHERE:
            FORMATS.get(name)
    return list(dict.fromkeys(names))


def _table(saved: SavedModel, device: str | None) -> cost_models.LatencyTable:
    run = run_of(saved.folder)
    kept = [run / "device", *(run / "elsewhere" / name for name in ([device] if device else []))]
    for folder in kept:
        if folder.is_dir():
            table = cost_models.load_folder(folder)
            if device in (None, table.name):
                return table
    if device is None:
        raise ValueError(f"{run} keeps no table of its device. Name one: --device cortex-a72")
    return cost_models.load(device)


def _target(table: cost_models.LatencyTable) -> str:
    """What code for a device is made for: "host" where nothing else is known of it."""
    named = str(table.provenance.build.get("target", table.name))
    return named if named in TARGETS else "host"


def _planned(formats: Sequence[str], target: str, int8: bool) -> list[Row]:
    rows = []
    for name in formats:
        if name in ELSEWHERE:
            rows.append(Row(name, "float32", "host", reason=ELSEWHERE[name]))
            continue
        exporter = FORMATS.get(name)
        rows.append(Row(name, "float32", "host"))
        if int8 and exporter.quantise is not None:
            rows.append(Row(name, "int8", "host"))
        if exporter.for_target is not None and target != "host":
            rows.append(Row(name, "float32", target))
    return rows


def _written(row: Row, saved: SavedModel, data: Data, right: float, quantising: Quantising) -> Row:
    """The row with its file, or with the reason why there is none."""
    if row.reason:
        return row
    where = default_file(saved, row.format, row.precision, row.target)
    kind: dict[str, Any] = {"format": row.format, "precision": row.precision, "target": row.target}
    known: dict[str, Any] = {"data": data, "net_accuracy": right, "input_size": saved.input_size}
    try:
        report = export_net(saved.net, where, quantising=quantising, **kind, **known)
    except (ValueError, ImportError) as error:
        return replace(row, reason=" ".join(str(error).split()))
    return replace(row, report=report)


def _timed(rows: Sequence[Row], data: Data, repeats: int) -> list[Row]:
    """The rows with what an image takes here, all files in turns."""
    answers = {}
    for row in rows:
        if row.report is not None and row.target == "host":
            exporter = FORMATS.get(row.format)
            answers[row.name] = exporter.open(row.report.path), exporter.version
    image = next(batches(data.test, 1, data))[0]
    found = time_files(answers, image, repeats)
    return [replace(row, latency=found.get(row.name)) for row in rows]


def _predicted(rows: Sequence[Row], saved: SavedModel, table: cost_models.LatencyTable, show: Show) -> list[Row]:
    """The rows with the sum of the device's rows, in float32."""
    try:
        cost_ms = folded_ms(saved.architecture.search_space(), saved.architecture, table)
    except ValueError as error:
        show.line(f"no prediction for {table.name}: {error}")
        return list(rows)
    found, target = [], _target(table)
    for row in rows:
        if row.report is None or row.precision != "float32":
            found.append(row)
            continue
        own = table.provenance.runner in FORMATS.get(row.format).runners and row.target == target
        found.append(replace(row, predicted_ms=cost_ms, own=own))
    return found


def _best(rows: Sequence[Row], table: cost_models.LatencyTable) -> tuple[Row, str]:
    """The row to take for a device, and why."""
    sound = [row for row in rows if row.report is not None and not row.report.warning and not row.report.not_run]
    sound = sound or [row for row in rows if row.report is not None]
    timed = sorted(
        (row for row in sound if row.latency is not None), key=lambda row: row.latency.median_ms if row.latency else 0.0
    )
    about = table.provenance
    if about.runner in HERE and about.machine.get("cpu") == cpu_model() and timed:
        return timed[0], "the fastest on this machine, which is the device, of those that keep the accuracy"
    own = [row for row in sound if row.own]
    if own:
        return own[
            0
        ], f"the runtime that the latencies of {table.name} are for; the others were timed on this machine alone"
    if timed:
        return timed[0], f"the fastest on this machine of those that keep the accuracy; {table.name} itself is not here"
    return sound[0], "the only one"


def _note(made: Deployment) -> dict[str, Any]:
    rows = [row.note() for row in made.rows]
    return {**vars(made), "path": made.path.name, "rows": rows}


def _show(made: Deployment, show: Show) -> None:
    cpu = next((f"{row.latency.device}, 1 thread, batch 1, in turns" for row in made.rows if row.latency), "-")
    note = (
        f"net: {made.accuracy:.2%} of {made.images} test images; here: {cpu}; on {made.device}: predicted, in brackets "
        f"where its rows are of another runtime; {made.about}"
    )
    columns = ("file", "MB", "difference", "accuracy", "ms here", f"ms on {made.device}")
    show.table("Deployment", columns, [_cells(row) for row in made.rows], note=note)
    for row in made.rows:
        if remark := _remark(row):
            show.line(f"{row.name}: {remark}")
    show.line(f"best for {made.device}: {made.best}, {made.why}")
    show.line(f"files: {made.path.parent}; the table: {made.path}")
    for row in made.rows:
        if row.report is not None and row.report.warning:
            show.warn(row.report.warning)


def _cells(row: Row) -> tuple[str, ...]:
    report = row.report
    if report is None:
        return (row.name, "-", "-", "-", "-", "-")
    relative = "-" if report.relative_diff is None else f"{report.relative_diff:.1e}"
    right = "-" if report.accuracy is None else f"{report.accuracy:.2%}"
    here = "-" if row.latency is None else f"{row.latency.median_ms:.3g} ± {row.latency.spread_ms:.1g}"
    there = "-" if row.predicted_ms is None else f"{row.predicted_ms:.3g}"
    if row.predicted_ms is not None and not row.own:
        there = f"({there})"
    return (row.name, f"{report.size_bytes / 1e6:.2f}", relative, right, here, there)


def _remark(row: Row) -> str:
    """What a row cannot say in its columns."""
    report = row.report
    if report is None:
        return row.reason
    if report.not_run:
        return f"not run back: {report.not_run}"
    if row.target != "host":
        return f"run back under an emulator, on {report.images} test images"
    return ""
