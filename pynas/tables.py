"""Tables and whole networks: a table fitted from networks that a user timed, and a check of a table's sums."""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cost_models import LatencyTable, Provenance, Runner, device_folder, load_folder
from cost_models.additive import AdditiveFit, fit_table
from cost_models.compiling import Job, compile_all
from cost_models.files import write_atomic
from cost_models.provenance import check_name
from cost_models.rows import check_ms
from cost_models.runners import Compiling
from cost_models.steady import in_rounds, settled, steady
from cost_models.trust import MIN_NETS, Additivity, additivity
from pynas.architecture import Architecture
from pynas.fuse import fuse
from pynas.registry import SearchSpace
from pynas.supernet import cost_table
from pynas.timed_nets import net_specs, random_nets, read_timed_nets

ROUNDS = 5
AGAIN = 6  # times in a round that the network for the noise floor is timed
STATE_VERSION = 1

Report = Callable[[int, int, float], None]  # timings done, timings in all, seconds left


@dataclass(frozen=True)
class FittedTable:
    """What `fit_csv` made.

    Args:
        folder: Of the device: device.toml, latency.csv.
        table: As read back from it.
        fit: Errors and verdict.
    """

    folder: Path
    table: LatencyTable
    fit: AdditiveFit

    def __str__(self) -> str:
        return f"{self.fit}\nwritten to {self.folder}"


def fit_csv(
    space: SearchSpace,
    csv_path: str | Path,
    device: str,
    *,
    runner: str = "whole-nets",
    precision: str = "fp32",
    threads: int = 1,
    batch: int = 1,
    cpu: str = "unknown",
    folder: str | Path | None = None,
    seed: int = 0,
) -> FittedTable:
    """Fits a per-op table from whole networks timed elsewhere, and writes it as a device.

    Args:
        space: Of all networks.
        csv_path: Columns `architecture` and `latency_ms`, in the order of timing (`read_timed_nets`).
        device: Name of the new device.
        runner: What timed them, such as "tflite-benchmark".
        precision: Of the networks when timed.
        threads: That ran them.
        batch: Images per run.
        cpu: Of the device, or its model name.
        folder: Where to write; by default where the user's devices lie.
        seed: Of the parts that are left out in turn.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or has fewer than 20 different networks; or the device has a table already.
        OSError: The folder cannot be written.
    """
    check_name(device)
    where = device_folder(device) if folder is None else Path(folder)
    if where.exists() and any(where.iterdir()):
        raise ValueError(f"{where} holds a table already. Choose another device name, or delete that folder.")
    today = datetime.date.today().isoformat()
    about = Provenance(device, "fitted", runner, precision, threads, batch, "whole-nets-1", 1, today, {"cpu": cpu}, {})
    timed = read_timed_nets(space, csv_path)
    specs = {net.architecture.fingerprint: net_specs(space, net.architecture) for net in timed}
    nets = [specs[net.architecture.fingerprint] for net in timed]
    fit = fit_table(nets, [net.latency_ms for net in timed], seed=seed)
    fit.table(dataclasses.replace(about, fit=_fit_section(fit))).copy_to(where)
    return FittedTable(where, load_folder(where), fit)


def _fit_section(fit: AdditiveFit) -> dict[str, str | int | float]:
    """What device.toml keeps of a fit."""
    found = fit.held_out
    return {
        "nets": fit.nets,
        "error": float(f"{found.error:.6g}"),
        "kendall": round(found.kendall, 4),
        **({} if fit.noise is None else {"noise": float(f"{fit.noise:.6g}")}),
        "undetermined_rows": len(fit.rows.undetermined),
        "verdict": fit.verdict.kind,
        "reasons": fit.verdict.sentence,
    }


@dataclass(frozen=True)
class CheckReport:
    """Sums of a table against whole networks timed by a runner.

    Args:
        table: Description of the table.
        runner: Name of the runner.
        differences: Between its conditions and those of the rows; empty where they agree.
        nets: The networks.
        predicted_ms: Sum of rows of each.
        measured_ms: Median of the timings of each.
        timings_ms: The network for the noise floor, timed several times as all others were.
        additivity: Errors, noise floor, calibration.
    """

    table: str
    runner: str
    differences: str
    nets: tuple[Architecture, ...]
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]
    timings_ms: tuple[float, ...]
    additivity: Additivity

    def __str__(self) -> str:
        rows = sorted(zip(self.measured_ms, self.predicted_ms, self.nets, strict=True), key=lambda row: row[0])
        lines = [f"{'measured ms':>12}{'sum of rows':>12}{'error':>9}  network"]
        lines += [
            f"{measured:12.4g}{predicted:12.4g}{predicted / measured - 1:+9.1%}  {net.fingerprint}"
            for measured, predicted, net in rows
        ]
        other = [f"the rows were made under other conditions: {self.differences}"] if self.differences else []
        head = [self.table, f"whole networks timed by {self.runner}", *other]
        return "\n".join([*head, *lines, str(self.additivity)])


def compile_nets(
    space: SearchSpace, runner: Runner, *, nets: int = 30, seed: int = 0, report: Report | None = None
) -> None:
    """Compiles what `check` with the same arguments will time, on all cores instead of one by one.

    Args:
        space: Of the networks.
        runner: One that does not compile leaves nothing to do.
        nets: How many.
        seed: Of the choice of networks.
        report: Called after each network that was not in the cache.

    Raises:
        ValueError: A network could not be compiled, or gave other outputs than torch.
        OSError: The cache cannot be written.
    """
    if isinstance(runner, Compiling):
        shape = (1, 3, space.input_size, space.input_size)
        modules = [_module(architecture, place) for place, architecture in enumerate(random_nets(space, nets, seed))]
        jobs = {place: Job("net", module, shape) for place, module in enumerate(modules)}
        compile_all(jobs, runner.compiler, report)


def check(
    space: SearchSpace,
    table: LatencyTable,
    runner: Runner,
    *,
    nets: int = 30,
    rounds: int = ROUNDS,
    seed: int = 0,
    state: str | Path | None = None,
    report: Report | None = None,
) -> CheckReport:
    """Times random whole networks end to end and compares them with the sums of a table's rows.

    All networks take turns, one timing a round, and the first of them is timed several times in each round, spread
    among the others: how much it differs from itself is the noise floor. As for rows, timings that other load has
    disturbed are taken again (`cost_models.steady`), and a network's latency is the median of the rest.

    Args:
        space: Of the networks.
        table: To be checked.
        runner: Times them.
        nets: How many, at least six.
        rounds: Undisturbed timings of each, at least three.
        seed: Of the choice of networks.
        state: A JSON file that holds the timings so far: after a break, the same call goes on. Deleted when done.
        report: Called after each timing.

    Raises:
        ValueError: Too few networks or rounds; the table does not cover the space; the state file is damaged or belongs
            to another check; a network could not be timed.
        OSError: The state file cannot be written (found out before anything is timed).
    """
    if nets < MIN_NETS or rounds < 3:
        raise ValueError(f"A check needs at least {MIN_NETS} networks and 3 rounds, not {nets} and {rounds}.")
    costs = cost_table(space, table)
    architectures = random_nets(space, nets, seed)
    here = Provenance.of(table.name, runner, 1)
    key = {
        "version": STATE_VERSION,
        "table": f"{table.name} {table.hash}",
        "runner": f"{runner.name} {here.fingerprint}",
        "nets": [architecture.fingerprint for architecture in architectures],
    }
    timings = _Timings(None if state is None else Path(state), key, nets)
    timings.save()
    _time(space, architectures, runner, rounds, timings, report)
    timings.forget()
    predicted = tuple(costs.cost(architecture) for architecture in architectures)
    medians = tuple(statistics.median(settled(taken, rounds)) for taken in timings.taken.values())
    measured, again = medians[:nets], medians[nets:]
    found = additivity(predicted, measured, again)
    differences = table.provenance.differences(here)
    return CheckReport(
        table.describe(), runner.name, differences, tuple(architectures), predicted, measured, again, found
    )


class _Timings:
    """Timings by place in the round, in memory and in the state file."""

    def __init__(self, path: Path | None, key: dict[str, Any], nets: int) -> None:
        self.path, self.key = path, key
        self.taken: dict[int, list[float]] = {place: [] for place in range(nets + AGAIN)}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        hint = "Delete it to start anew, or name another file."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            key, taken = content["key"], content["taken_ms"]
            if len(taken) != len(self.taken) and key == self.key:
                raise ValueError("it holds timings of another number of networks")
            for latency_ms in (value for values in taken for value in values):
                check_ms("a timing", latency_ms)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The file of timings {path} is damaged ({error}). {hint}") from error
        if key != self.key:
            other = ", ".join(name for name in self.key if not isinstance(key, dict) or key.get(name) != self.key[name])
            raise ValueError(f"The file of timings {path} belongs to another check (it differs in: {other}). {hint}")
        self.taken = dict(enumerate(taken))

    def save(self) -> None:
        if self.path is not None:
            write_atomic(self.path, json.dumps({"key": self.key, "taken_ms": list(self.taken.values())}) + "\n")

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _time(
    space: SearchSpace,
    architectures: list[Architecture],
    runner: Runner,
    rounds: int,
    timings: _Timings,
    report: Report | None,
) -> None:
    """Fills up the timings, in turn; saves after each."""
    ready: dict[int, Callable[[], float]] = {}
    shape = (1, 3, space.input_size, space.input_size)
    modules = [_module(architecture, seed) for seed, architecture in enumerate(architectures)]

    def once_ms(net: int) -> float:
        try:
            if net not in ready:
                ready[net] = runner.net(modules[net], shape)
            latency_ms = ready[net]()
            check_ms("it", latency_ms)
        except Exception as error:
            raise ValueError(
                f"The network {architectures[net]} could not be timed by {runner.name!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return latency_ms

    order = _order(len(architectures))
    take = {place: partial(once_ms, place if place < len(architectures) else 0) for place in order}
    total, begin = rounds * len(order), time.monotonic()
    for timed, _ in enumerate(in_rounds(take, timings.taken, rounds), start=1):
        timings.save()
        if report is not None:
            done = sum(min(len(steady(taken)), rounds) for taken in timings.taken.values() if taken)
            report(done, total, (total - done) * (time.monotonic() - begin) / timed)


def _module(architecture: Architecture, seed: int) -> nn.Module:
    """The network as it is deployed, with weights that are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fuse(architecture.build())


def _order(nets: int) -> list[int]:
    """Places of a round: every network once, and among them, evenly, those of the noise floor (from `nets` on)."""
    spread = [(index / nets, index) for index in range(nets)]
    spread += [((index + 0.5) / AGAIN, nets + index) for index in range(AGAIN)]
    return [place for _, place in sorted(spread)]
