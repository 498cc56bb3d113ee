"""What a measurement will do, before it does it: how many ops, about how long, into which folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import provenance, rows
from .alike import AllAlike, watched
from .boards import time_on_boards
from .compiling import START_SECONDS, WORKERS, Job, cache, compile_all, compiled
from .files import write_atomic
from .provenance import Provenance
from .rows import Row
from .runners import Compiling, OnBoards, Runner
from .spec import OpSpec
from .steady import ROUND_SECONDS, in_rounds, settled, steady
from .table import LatencyTable, load_folder
from .timing import input_shape, runs_per_repeat

SAVE_SECONDS = 0.5
HOST_MACS_PER_MS, BOARD_MACS_PER_MS = 8e6, 1e6  # for estimates of time only
SWEEP_MS = 1.5  # likewise
MODEL_OP_SECONDS = 1.5  # likewise: to compile, emulate and price
BOARD_OP_SECONDS = 1.0  # likewise: to connect and upload

Report = Callable[[int, int, float], None]  # done, in all, seconds left
Build = Callable[[OpSpec], Any]


class Incomplete(ValueError):
    """Some ops could not be measured on any board; the table has all the others.

    Args:
        missing: why, by op.
        folder: of the table.
    """

    def __init__(self, missing: dict[OpSpec, str], total: int, folder: Path) -> None:
        reasons: dict[str, list[str]] = {}
        for spec, reason in sorted(missing.items()):
            reasons.setdefault(reason.rstrip("."), []).append(spec.key)
        told = ". ".join(f"{_some(keys)}: {reason}" for reason, keys in list(reasons.items())[:3])
        super().__init__(
            f"{len(missing)} of {total} ops could not be measured. {told}. The rows of the others are kept in "
            f"{folder}. See to the board (start board.py there again, check the tunnel), then type the same command "
            "to go on."
        )
        self.missing = missing
        self.folder = folder


@dataclass
class Plan:
    """A measurement that can start: `compile`, then `time`; or `run` for both.

    Interrupted, the same plan made anew goes on where it stood.

    Args:
        about: the table's provenance.
        folder: where device.toml and latency.csv lie or will lie.
        runner: what times the ops.
        ops: all that were asked for, sorted.
        modules: those without a complete row, with their torch modules.
        jobs: those of them that are to be compiled first.
        boards: how many work at a time; 1 for this machine.
    """

    about: Provenance
    folder: Path
    runner: Runner
    ops: tuple[OpSpec, ...]
    modules: dict[OpSpec, Any] = field(repr=False)
    jobs: dict[OpSpec, Job] = field(repr=False)
    boards: int = 1

    @property
    def compile_seconds(self) -> float:
        """About how long `compile` will take."""
        if not self.jobs or not isinstance(self.runner, Compiling):
            return 0.0
        return START_SECONDS + self.runner.compiler.seconds * len(self.jobs) / WORKERS

    @property
    def time_seconds(self) -> float:
        """About how long `time` will take."""
        boards = isinstance(self.runner, OnBoards)
        if getattr(self.runner, "deterministic", False):
            return MODEL_OP_SECONDS * len(self.modules)
        macs_per_ms = BOARD_MACS_PER_MS if boards else HOST_MACS_PER_MS
        total = 0.0
        for spec in self.modules:
            latency_ms = 0.02 + spec.macs * self.about.batch / macs_per_ms
            repeat_ms = runs_per_repeat(latency_ms) * (latency_ms + SWEEP_MS)
            total += 2 * self.about.repeats * repeat_ms / 1e3 + (BOARD_OP_SECONDS if boards else 0.0)
        least = 0.0 if boards or not self.modules else self.about.repeats * ROUND_SECONDS
        return max(least, total / self.boards)

    def __str__(self) -> str:
        """What a person is told before it starts."""
        present = len(self.ops) - len(self.modules)
        if not self.modules:
            return f"all {present} ops are in {self.folder} already"
        kept = f" ({present} others are there already)" if present else ""
        target = f" for {self.about.build['target']}" if "target" in self.about.build else ""
        boards = f" on {self.boards} boards" if self.boards > 1 else ""
        parts = [f"{len(self.modules)} ops{kept} by {self.runner.name}{target}{boards}"]
        if self.jobs:
            parts.append(f"compiling {len(self.jobs)}: about {_duration(self.compile_seconds)}")
        parts.append(f"{self.about.repeats} timings each: about {_duration(self.time_seconds)}")
        return f"{'; '.join(parts)}; into {self.folder}"

    def kept(self) -> str:
        """What a person is told who has stopped it."""
        known = known_rows(self.folder, self.about)
        timings = [len(known[spec].repeats_ms) for spec in self.ops if spec in known]
        done = sum(number >= self.about.repeats for number in timings)
        parts = [f"{done} of {len(self.ops)} ops with all their timings"]
        if len(timings) > done:
            parts.append(f"{len(timings) - done} with some")
        if self.jobs and isinstance(self.runner, Compiling):
            ready = sum(compiled(job, self.runner.compiler) for job in self.jobs.values())
            parts.append(f"{ready} of {len(self.jobs)} compiled")
        return f"Kept: {', '.join(parts)}; the rows are in {self.folder}."

    def compile(self, report: Report | None = None) -> None:
        """Compile what is not in the cache, if the runner compiles at all; see `compiling.compile_all`."""
        if isinstance(self.runner, Compiling) and self.jobs:
            compile_all(self.jobs, self.runner.compiler, report)

    def time(self, report: Report | None = None) -> LatencyTable:
        """Time what has no complete row, saving rows as they come; see `measure`."""
        if self.modules:
            known = known_rows(self.folder, self.about)
            ready = self._opened()
            try:
                self._time(known, ready, report)
            finally:
                self.about = Provenance.of(self.about.name, self.runner, self.about.repeats)  # may know more by now
                save_rows(self.folder, self.about, known)
        return load_folder(self.folder)

    def run(self, report: Report | None = None, compiling: Report | None = None) -> LatencyTable:
        """Compile and time."""
        self.compile(compiling)
        return self.time(report)

    def _opened(self) -> dict[OpSpec, Any]:
        """What the runner times, by op."""
        runner = self.runner
        if not isinstance(runner, Compiling):
            return self.modules
        jobs = {spec: _job(spec, module, runner) for spec, module in self.modules.items()}
        folders = compile_all(jobs, runner.compiler)
        return {spec: _named(spec, "loaded", partial(runner.open, folder)) for spec, folder in folders.items()}

    def _time(self, known: dict[OpSpec, Row], ready: dict[OpSpec, Any], report: Report | None) -> None:
        save = partial(save_rows, self.folder, self.about, known)
        if isinstance(self.runner, OnBoards):
            missing = _fill_from_boards(known, ready, self.runner, self.about.repeats, report, save)
            if missing:
                save()
                raise Incomplete(missing, len(self.ops), self.folder)
        else:
            _fill(known, ready, self.runner, self.about.repeats, report, save)


def plan(specs: Iterable[OpSpec], *, build: Build, runner: Runner, folder: str | Path, name: str, repeats: int) -> Plan:
    """Find out what `measure` would do, and whether it can: device reached, folder writable, room on the disk.

    Args and errors: see `measure`. Nothing is measured or compiled; device.toml is written.
    """
    where = Path(folder)
    wanted = sorted({spec.deployed for spec in specs if not spec.free})
    if not wanted:
        raise ValueError("There is no op to measure: pass at least one that is not a skip or none.")
    if repeats < 3:
        raise ValueError(f"repeats is {repeats}; at least 3 are needed for a median.")
    about = Provenance.of(name, runner, repeats)
    known = known_rows(where, about)
    lacking = [spec for spec in wanted if spec not in known or len(known[spec].repeats_ms) < repeats]
    if lacking:
        save_rows(where, about, known)
    modules = {spec: _named(spec, "built", partial(build, spec)) for spec in lacking}
    jobs = {}
    if isinstance(runner, Compiling):
        jobs = {spec: _job(spec, module, runner) for spec, module in modules.items()}
        jobs = {spec: job for spec, job in jobs.items() if not compiled(job, runner.compiler)}
        _check_room(jobs)
    boards = 1
    if lacking and isinstance(runner, OnBoards):
        boards = min(len(runner.boards()), len(lacking))
    return Plan(about, where, runner, tuple(wanted), modules, jobs, boards)


def known_rows(folder: Path, about: Provenance) -> dict[OpSpec, Row]:
    """The rows in a folder, which may be missing or have none yet.

    Raises:
        ValueError: they were made under other conditions, or are damaged.
    """
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


def save_rows(folder: Path, about: Provenance, known: dict[OpSpec, Row]) -> None:
    """Write both files, with the rows that another process may have added, and calibration and fit as found there."""
    present = known_rows(folder, about)
    longer = {
        spec: row
        for spec, row in present.items()
        if spec in known and len(row.repeats_ms) > len(known[spec].repeats_ms)
    }
    table = present | known | longer
    if (folder / provenance.FILE).is_file():
        there = Provenance.read(folder)
        about = replace(about, calibration=there.calibration, fit=there.fit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        spread = rows.spread(table.values()) if table else 0.0
        write_atomic(folder / provenance.FILE, about.to_toml(rows=len(table), spread=spread))
        write_atomic(folder / rows.FILE, rows.to_csv(table, about.identity))
    except OSError as error:
        raise type(error)(f"The device folder {folder} cannot be written: {str(error).rstrip('.')}.") from error


def _fill(
    known: dict[OpSpec, Row],
    ready: dict[OpSpec, Any],
    runner: Runner,
    repeats: int,
    report: Report | None,
    save: Callable[[], None],
) -> None:
    """Complete the rows of `ready` in `known`, op by op in turn, saving now and then."""
    take = {spec: partial(_time, spec, module, runner) for spec, module in ready.items()}
    taken = {spec: list(known[spec].repeats_ms) if spec in known else [] for spec in ready}
    total = repeats * len(ready)
    begin = saved = time.monotonic()
    for timings, spec in enumerate(in_rounds(take, taken, repeats), start=1):
        known[spec] = Row(spec, steady(taken[spec]))
        now = time.monotonic()
        if now - saved > SAVE_SECONDS:
            save()
            saved = now
        if report is not None:
            done = sum(len(known[spec].repeats_ms) for spec in ready if spec in known)
            report(done, total, (total - done) * (now - begin) / timings)
    for spec in ready:
        known[spec] = Row(spec, settled(taken[spec], repeats))


def _fill_from_boards(
    known: dict[OpSpec, Row],
    ready: dict[OpSpec, Any],
    runner: OnBoards,
    repeats: int,
    report: Report | None,
    save: Callable[[], None],
) -> dict[OpSpec, str]:
    """Complete the rows of `ready` in `known`, saving each; returns what could not be measured, with the reason."""
    begin = time.monotonic()
    done: list[OpSpec] = []

    def receive(spec: OpSpec, latencies: list[float]) -> None:
        known[spec] = Row(spec, tuple(latencies))
        save()
        done.append(spec)
        if report is not None:
            left = len(ready) - len(done)
            report(repeats * len(done), repeats * len(ready), left * (time.monotonic() - begin) / len(done))

    boards, watch = watched(runner.boards())
    try:
        return time_on_boards(boards, ready, repeats, receive)
    except AllAlike:
        return watch.missing(ready)


def _job(spec: OpSpec, module: Any, runner: Runner) -> Job:
    return Job(spec.key, module, input_shape(spec, runner.batch))


def _time(spec: OpSpec, module: Any, runner: Runner) -> float:
    latencies = _named(spec, "timed", partial(runner.time_ms, module, spec, 1))
    if len(latencies) != 1:
        raise ValueError(f"The runner {runner.name!r} gave {len(latencies)} latencies for the op {spec.key}, not one.")
    rows.check_ms(f"The runner {runner.name!r} gave no valid latency for the op {spec.key}: it", latencies[0])
    return float(latencies[0])


def _named(spec: OpSpec, done: str, act: Callable[[], Any]) -> Any:
    """Act, and name the op if that fails."""
    try:
        return act()
    except Exception as error:
        raise ValueError(f"The op {spec.key} could not be {done}: {type(error).__name__}: {error}") from error


def _check_room(jobs: dict[OpSpec, Job]) -> None:
    """Raise OSError if the disk has no room for what is to be compiled."""
    existing = next(path for path in (cache(), *cache().parents) if path.is_dir())
    needed = sum(12 * spec.params + 8 * _elements(spec) + (1 << 20) for spec in jobs)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"The disk is too full: {len(jobs)} compiled ops need about {needed >> 20} MB in {cache()}, and "
            f"{free >> 20} MB are free. Free some space, or set XDG_CACHE_HOME to a folder on another disk."
        )


def _elements(spec: OpSpec) -> int:
    """Of input and output."""
    return spec.in_channels * spec.size**2 + spec.out_channels * spec.out_size**2


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
