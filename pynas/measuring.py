"""The front door to latency tables: fill one, check it against whole networks, fit one from whole networks."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import time
from typing import Any

import cost_models
from cost_models.folders import xdg
from cost_models.plan import Plan, plan
from cost_models.runners import make_runner
from cost_models.trust import Finding, findings_text, self_check
from pynas import tables
from pynas.console import Show
from pynas.plan import classifier_specs, deployed, make_space, space_specs
from pynas.registry import SearchSpace
from pynas.training.loop import Interrupted

LOCAL = {"torch": "host", "tvm-local": "host-tvm", "ort-local": "host-ort"}  # how tables of this machine are called
FEWEST_REPEATS = 3


def measure(
    space: str = "fbnet_tiny",
    device: str | None = None,
    *,
    runner: str = "torch",
    target: str | None = None,
    address: str | None = None,
    tracker: str | None = None,
    key: str | None = None,
    core: str | None = None,
    tune: int | None = None,
    timeout_s: int | None = None,
    threads: int = 1,
    repeats: int = 15,
    check: int = 0,
    calibrate: bool = False,
    space_options: dict[str, Any] | None = None,
    quiet: bool = False,
) -> cost_models.LatencyTable:
    """Measures every distinct op of a space and writes a latency table that searches can use by the device's name.

    Says before it starts how many ops it will measure, about how long that takes, and where the table will be. The
    classifier is measured for several numbers of classes, so that the table serves data sets of any number.
    Interrupted, the same call goes on where it stood; Ctrl-C says what is kept and how to go on.

    Args:
        space: Name of a search space.
        device: Name of the table to write or complete. By default "host" for torch, "host-tvm" and "host-ort" for the
            other runtimes of this machine, and the core for `tvm-model`: rows of different runners never mix.
        runner: What times the ops: "torch", "tvm-local" and "ort-local" on this machine; "tvm-rpc" on boards;
            "tvm-model" computes what the machine code costs on an ARM core, without a board.
        target: tvm-rpc: what to compile for, such as "cortex-a72".
        address: tvm-rpc: host:port of a board's RPC server.
        tracker: tvm-rpc: host:port of an RPC tracker, with `key`.
        key: tvm-rpc: of the boards at the tracker; all that are free work in parallel.
        core: tvm-model: name of a core, or a TOML file that describes one.
        tune: tvm-local: how many ways to cut each layer are tried by timing, such as 4. Part of a table's identity.
        timeout_s: tvm-rpc: seconds that one op may take on a board, with all repeats.
        threads: Of the runner. Part of a table's identity.
        repeats: Timings of each op; the median counts. A model, whose answers are all the same, is asked three times.
        check: Then time so many random whole networks and compare them with the sums of their rows, such as 30.
        calibrate: Store the scale and offset that the check found, if they help on networks they were not fitted on.
        space_options: Changes to the space, for instance {"classes": 10}.
        quiet: Prints nothing.

    Returns:
        The table.

    Raises:
        ValueError: For anything that cannot work, in one sentence, before work is lost.
        OSError: A board cannot be reached, or a folder not be written.
        ImportError: The runner needs a package that is not installed.
        Interrupted: Ctrl-C.
    """
    again = _command(dict(locals()))
    show = Show(quiet)
    name = device or LOCAL.get(runner) or core
    if name is None:
        raise ValueError(f"The runner {runner!r} measures another device. Name its table: --device my-board")
    if name == "host" and (runner, threads) != ("torch", 1):
        raise ValueError("The table 'host' is torch's with one thread. Give this one a name of its own.")
    if calibrate and not check:
        raise ValueError("A calibration needs whole networks to be fitted on: add --check 30")
    made = make_space(space, space_options or {})
    board: dict[str, Any] = {"address": address, "tracker": tracker, "key": key, "timeout_s": timeout_s}
    specs = sorted({*space_specs(made), *classifier_specs(made)})
    folder = cost_models.device_folder(name)
    work = table = None
    try:
        times = make_runner(runner, threads, **board, target=target, core=core, tune=tune)
        if getattr(times, "deterministic", False):
            repeats = FEWEST_REPEATS
        work = plan(specs, build=deployed, runner=times, folder=folder, name=name, repeats=repeats)
        table = _filled(work, space, show)
        show.line(findings_text(self_check(table, specs)))
        if check:
            table = _checked(made, table, times, check, calibrate, show)
    except KeyboardInterrupt:
        kept = "Nothing was timed yet." if work is None else work.kept()
        nets = " So are the timings of whole networks." if check and table is not None else ""
        raise Interrupted(f"Stopped. {kept}{nets} Go on with: {again}") from None
    return table


def check_table(
    device: str,
    space: str = "fbnet_tiny",
    *,
    space_options: dict[str, Any] | None = None,
    quiet: bool = False,
) -> list[Finding]:
    """Looks for faults in a device's table: missing, absurd or noisy rows, larger ops that are cheaper.

    Args:
        device: Name of the table.
        space: Whose ops it should hold.
        space_options: Changes to the space.
        quiet: Prints nothing.

    Returns:
        What was found; empty for a table without fault.
    """
    made = make_space(space, space_options or {})
    table = cost_models.load(device)
    found = self_check(table, space_specs(made))
    show = Show(quiet)
    show.line(table.describe())
    show.line(findings_text(found))
    return found


def fit_table(
    csv: str,
    device: str,
    space: str = "fbnet",
    *,
    runner: str = "whole-nets",
    precision: str = "fp32",
    threads: int = 1,
    batch: int = 1,
    cpu: str = "unknown",
    seed: int = 0,
    space_options: dict[str, Any] | None = None,
    quiet: bool = False,
) -> tables.FittedTable:
    """Fits a table of single ops from whole networks, for a device that can only time those (an app, a vendor's tool).

    Says how far off networks are that it was not fitted on, and whether the device is additive at all.

    Args:
        csv: File with the columns `architecture` (options of all layers, a JSON file, or its content) and `latency_ms`.
        device: Name of the table to write.
        space: Of the networks.
        runner: What timed them, such as "tflite-benchmark".
        precision: Of the networks when timed.
        threads: That ran them.
        batch: Images per run.
        cpu: Of the device.
        seed: Of the parts that are left out in turn.
        space_options: Changes to the space.
        quiet: Prints nothing.

    Returns:
        The table, its errors, and the verdict.
    """
    made = make_space(space, space_options or {})
    about: dict[str, Any] = {"runner": runner, "precision": precision, "threads": threads, "batch": batch, "cpu": cpu}
    fitted = tables.fit_csv(made, csv, device, seed=seed, **about)
    Show(quiet).line(str(fitted))
    return fitted


def _command(asked: dict[str, Any]) -> str:
    """What to type to call `measure` with these arguments."""
    defaults = inspect.signature(measure).parameters
    flags = []
    for flag, value in asked.items():
        if value != defaults[flag].default:
            text = value if isinstance(value, str) else json.dumps(value)
            flags += [f"--{flag}", shlex.quote(text)]
    return " ".join(["pynas measure", *flags])


def _filled(work: Plan, space: str, show: Show) -> cost_models.LatencyTable:
    """The table of a plan, carried out before the user's eyes."""
    show.line(f"space {space!r}: {work}")
    began = time.monotonic()
    if work.jobs:
        with show.bar("compiling", len(work.jobs)) as bar:
            work.compile(bar.report)
    compiled = time.monotonic()
    with show.bar(f"measuring {work.about.name}", work.about.repeats * len(work.modules)) as bar:
        table = work.time(bar.report)
    ended = time.monotonic()
    show.line(f"took {ended - began:.0f} s: compiling {compiled - began:.0f} s, timing {ended - compiled:.0f} s")
    show.line(table.describe())
    return table


def _checked(
    space: SearchSpace, table: cost_models.LatencyTable, runner: Any, nets: int, calibrate: bool, show: Show
) -> cost_models.LatencyTable:
    """Compares sums of rows with whole networks, and calibrates the table if asked to and if that helps."""
    if not hasattr(runner, "net"):
        raise ValueError(f"The runner {runner.name!r} cannot time whole networks; leave out --check.")
    plain = table.uncalibrated()
    asked = f"{plain.hash} {runner.name} {space.name} {space.options()} {nets}"
    name = f"{table.name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"
    state = xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "checks" / name
    state.parent.mkdir(parents=True, exist_ok=True)
    with show.bar("compiling networks", nets) as bar:
        tables.compile_nets(space, runner, nets=nets, report=bar.report)
    with show.bar("timing networks", nets) as bar:
        found = tables.check(space, plain, runner, nets=nets, state=state, report=bar.report)
    show.line(str(found))
    calibration = found.additivity.calibration
    if not calibrate or calibration is None:
        return table
    folder = cost_models.device_folder(table.name)
    if not calibration.helps:
        show.line("the calibration does not help on networks that it was not fitted on; not stored")
        return table
    calibration.save(folder)
    show.line(f"stored in {folder}: {calibration}")
    return cost_models.load_folder(folder)
