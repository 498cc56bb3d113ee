"""Filling a device folder: times what has no row yet, survives any break, never mixes conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import places
from .plan import Report, plan
from .runners import Runner, TorchHost
from .spec import OpSpec
from .table import LatencyTable
from .torch_training import TorchTraining

REPEATS = 15
STEP_REPEATS = 5  # of a training step, which takes long


def measure(
    specs: Iterable[OpSpec],
    *,
    build: Callable[[OpSpec], Any],
    runner: Runner,
    folder: str | Path,
    name: str,
    repeats: int = REPEATS,
    report: Report | None = None,
    compiling: Report | None = None,
) -> LatencyTable:
    """Time each op that has no complete row in `folder` and write its row.

    All ops take turns, one repeat a round, so that a machine that slows down for a while slows all of them down;
    repeats that such a burst disturbed are taken again (`cost_models.steady`). On boards (`cost_models.boards`) each
    op is timed wholly on one. The files are replaced in one step every half second: after a break, Ctrl-C or kill, the
    same call goes on where it stood. Complete rows are never touched.

    `plan` takes the same arguments and says beforehand what will be done.

    Args:
        specs: ops, in any order; doubles, skip and none are dropped.
        build: makes the torch module of an op: eval mode, BN folded.
        runner: times it.
        folder: where device.toml and latency.csv lie or will lie.
        name: the device's name.
        repeats: measurements per op, at least 3.
        report: called after each timing: done, in all, seconds left.
        compiling: called after each op that had to be compiled, where the runner compiles.

    Returns:
        The table in `folder`, with all its rows.

    Raises:
        ValueError: no ops; the folder holds a damaged table or one of another device or other conditions; an op could
            not be built, compiled or timed (its key is named, and no row is written).
        Incomplete: a ValueError: boards failed for some ops; the others have their rows.
        OSError: the folder cannot be written or a board cannot be reached (found out before anything is measured).
        ImportError: the runner's runtime is not installed.
    """
    work = plan(specs, build=build, runner=runner, folder=folder, name=name, repeats=repeats)
    return work.run(report, compiling)


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


def training_table(
    specs: Iterable[OpSpec],
    *,
    build: Callable[[OpSpec], Any],
    batch: int,
    threads: int = 1,
    report: Report | None = None,
) -> LatencyTable:
    """What a training step of every op takes on this machine, forward and backward, measured now where it is missing.

    Lies in the user's cache, one table per CPU, torch version, number of threads and batch size.

    Args:
        specs: the ops that will be asked for.
        build: makes the torch module of an op, in training mode.
        batch: images per step.
        threads: of torch.
        report: see `measure`.

    Raises:
        ValueError, OSError: see `measure`.
    """
    runner = TorchTraining(threads, batch=batch)
    folder = places.training_folder(runner)
    with _torch_seed_kept():
        return measure(
            specs, build=build, runner=runner, folder=folder, name="host-train", repeats=STEP_REPEATS, report=report
        )


@contextmanager
def _torch_seed_kept() -> Iterator[None]:
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
