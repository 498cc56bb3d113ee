"""Filling a device folder: times what has no row yet, survives any break, never mixes conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import places, provenance, rows
from .files import write_atomic
from .provenance import Provenance
from .rows import Row
from .runners import Runner, TorchHost
from .spec import OpSpec
from .steady import in_rounds, settled, steady
from .table import LatencyTable, load_folder

REPEATS = 15
SAVE_SECONDS = 0.5

Report = Callable[[int, int, float], None]  # repeats done, repeats in all, seconds left


def measure(
    specs: Iterable[OpSpec],
    *,
    build: Callable[[OpSpec], Any],
    runner: Runner,
    folder: str | Path,
    name: str,
    repeats: int = REPEATS,
    report: Report | None = None,
) -> LatencyTable:
    """Time each op that has no complete row in `folder` and write its row.

    All ops take turns, one repeat a round, so that a machine that slows down for a while slows all of them down;
    repeats that such a burst disturbed are taken again (`cost_models.steady`). The files are replaced in one step every
    half second: after a break, Ctrl-C or kill, the same call goes on where it stood. Complete rows are never touched.

    Args:
        specs: ops, in any order; doubles and skip ops are dropped.
        build: makes the module of an op, in the form that `runner` wants (for torch: eval mode, BN folded).
        runner: times it.
        folder: where device.toml and latency.csv lie or will lie.
        name: the device's name.
        repeats: measurements per op, at least 3.
        report: called after each timing.

    Returns:
        The table in `folder`, with all its rows.

    Raises:
        ValueError: no ops; the folder holds a damaged table or one of another device or other conditions; an op could
            not be built or timed (its key is named, and no row is written).
        OSError: the folder cannot be written (found out before anything is measured).
    """
    where = Path(folder)
    wanted = sorted({spec for spec in specs if spec.kind != "skip"})
    if not wanted:
        raise ValueError("There is no op to measure: pass at least one that is not a skip.")
    if repeats < 3:
        raise ValueError(f"repeats is {repeats}; at least 3 are needed for a median.")
    about = Provenance.of(name, runner, repeats)
    known = _known_rows(where, about)
    lacking = [spec for spec in wanted if spec not in known or len(known[spec].repeats_ms) < repeats]
    if lacking:
        _save(where, about, known)
        try:
            _fill(known, lacking, build, runner, repeats, report, save=lambda: _save(where, about, known))
        finally:
            _save(where, about, known)
    return load_folder(where)


def _fill(
    known: dict[OpSpec, Row],
    lacking: list[OpSpec],
    build: Callable[[OpSpec], Any],
    runner: Runner,
    repeats: int,
    report: Report | None,
    save: Callable[[], None],
) -> None:
    """Complete the rows of `lacking` in `known`, saving now and then."""
    modules = {spec: _build(spec, build) for spec in lacking}
    take = {spec: partial(_time, spec, modules[spec], runner) for spec in lacking}
    taken = {spec: list(known[spec].repeats_ms) if spec in known else [] for spec in lacking}
    total = repeats * len(lacking)
    begin = saved = time.monotonic()
    for timings, spec in enumerate(in_rounds(take, taken, repeats), start=1):
        known[spec] = Row(spec, steady(taken[spec]))
        now = time.monotonic()
        if now - saved > SAVE_SECONDS:
            save()
            saved = now
        if report is not None:
            done = sum(len(known[spec].repeats_ms) for spec in lacking if spec in known)
            report(done, total, (total - done) * (now - begin) / timings)
    for spec in lacking:
        known[spec] = Row(spec, settled(taken[spec], repeats))


def host_table(
    specs: Iterable[OpSpec], *, build: Callable[[OpSpec], Any], report: Report | None = None, threads: int = 1
) -> LatencyTable:
    """The table of this machine, measured now for those of `specs` that it lacks.

    A table `host` that the user measured (`pynas measure --device host`) comes first; else it lies in the user's cache,
    one per CPU, torch version and number of threads. The state of torch's random generator is kept, so that a search
    does not depend on whether its table had to be measured.

    Args:
        specs: the ops that will be asked for.
        build: see `measure`.
        report: see `measure`.
        threads: of torch.

    Raises:
        ValueError: the user's table `host` was made on another machine or under other conditions, or see `measure`.
        OSError: see `measure`.
    """
    runner = TorchHost(threads)
    with _torch_seed_kept():
        return measure(specs, build=build, runner=runner, folder=places.host_folder(runner), name="host", report=report)


def _known_rows(folder: Path, about: Provenance) -> dict[OpSpec, Row]:
    """The rows in a folder, which may be missing or have none yet."""
    if not (folder / provenance.FILE).is_file() and not (folder / rows.FILE).exists():
        return {}
    present = Provenance.read(folder)
    differences = present.differences(about)
    if differences:
        raise ValueError(
            f"The table in {folder} was made under other conditions: {differences}. Rows of both must not be mixed; "
            "measure under another device name, or delete that folder to start anew."
        )
    return rows.read_csv(folder / rows.FILE, present.identity) if (folder / rows.FILE).is_file() else {}


def _save(folder: Path, about: Provenance, known: dict[OpSpec, Row]) -> None:
    """Write both files, with the rows that another process may have added meanwhile."""
    table = _known_rows(folder, about) | known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spread = rows.spread(table.values()) if table else 0.0
        write_atomic(folder / provenance.FILE, about.to_toml(rows=len(table), spread=spread))
        write_atomic(folder / rows.FILE, rows.to_csv(table, about.identity))
    except OSError as error:
        raise type(error)(f"The device folder {folder} cannot be written: {str(error).rstrip('.')}.") from error


def _build(spec: OpSpec, build: Callable[[OpSpec], Any]) -> Any:
    try:
        return build(spec)
    except Exception as error:
        raise ValueError(f"The op {spec.key} could not be built: {type(error).__name__}: {error}") from error


def _time(spec: OpSpec, module: Any, runner: Runner) -> float:
    try:
        latencies = runner.time_ms(module, spec, 1)
    except Exception as error:
        raise ValueError(f"The op {spec.key} could not be timed: {type(error).__name__}: {error}") from error
    if len(latencies) != 1:
        raise ValueError(f"The runner {runner.name!r} gave {len(latencies)} latencies for the op {spec.key}, not one.")
    rows.check_ms(f"The runner {runner.name!r} gave no valid latency for the op {spec.key}: it", latencies[0])
    return latencies[0]


@contextmanager
def _torch_seed_kept() -> Iterator[None]:
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
