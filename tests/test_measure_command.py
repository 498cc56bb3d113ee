"""`pynas measure` as a user meets it: stopped by Ctrl-C, and gone on with by the command that it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cost_models
from cost_models import LatencyTable, TorchHost
from cost_models.steady import steady
from pynas.cli import main
from pynas.plan import classifier_specs, make_space, space_specs

REPEATS = 20
OPTIONS = {"input_size": 8, "stages": [[8, 1, 1], [16, 1, 2]], "head_channels": 32}

MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell in the background leaves would be ignored
from pynas.cli import main
sys.exit(main())
"""


def typed(flags: str = "") -> str:
    options = shlex.quote(json.dumps(OPTIONS))
    return f"pynas measure --device slow-host --repeats {REPEATS} {flags}--space_options {options}"


def stopped(said: str) -> tuple[LatencyTable, str]:
    """The table that was kept, and the command to go on with; checks what was said about them."""
    table = cost_models.load("slow-host")
    started, command = said.split(" Go on with: ")
    space = make_space("fbnet_tiny", OPTIONS)
    specs = {spec for spec in {*space_specs(space), *classifier_specs(space)} if spec.kind != "skip"}
    rows = list(table.rows.values())
    complete = sum(len(row.repeats_ms) >= REPEATS for row in rows)
    some = f", {len(rows) - complete} with some" if len(rows) > complete else ""
    folder = cost_models.device_folder("slow-host")
    assert started == (
        f"Stopped. Kept: {complete} of {len(specs)} ops with all their timings{some}; the rows are in {folder}."
    )
    return table, command.strip()


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, *shlex.split(typed())[1:]],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    rows, give_up = cost_models.device_folder("slow-host") / "latency.csv", time.monotonic() + 100
    while (not rows.exists() or rows.read_text().count("\n") < 2) and time.monotonic() < give_up:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    kept, command = stopped(errors.splitlines()[-1])
    assert command == typed()
    assert 0 < len(next(iter(kept.rows.values())).repeats_ms) < REPEATS

    taken: list[Any] = []

    def quickly(self: TorchHost, module: Any, spec: cost_models.OpSpec, repeats: int) -> list[float]:
        taken.append(spec)
        return [kept.rows[spec].median_ms if spec in kept.rows else 1.0] * repeats

    monkeypatch.setattr(TorchHost, "time_ms", quickly)
    monkeypatch.setattr(cost_models.steady, "ROUND_SECONDS", 0.0)
    assert main(shlex.split(command)[1:]) == 0
    table = cost_models.load("slow-host")
    assert all(len(row.repeats_ms) == REPEATS for row in table.rows.values())
    assert len(taken) == sum(
        REPEATS - (len(steady(kept.rows[spec].repeats_ms)) if spec in kept.rows else 0) for spec in table.rows
    )


def test_ctrl_c_while_networks_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(self: TorchHost, *_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchHost, "time_ms", lambda self, module, spec, repeats: [1.0] * repeats)
    monkeypatch.setattr(TorchHost, "net", stop)
    monkeypatch.setattr(cost_models.steady, "ROUND_SECONDS", 0.0)
    asked = typed("--check 6 --calibrate true ")
    assert main(shlex.split(asked)[1:]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert " So are the timings of whole networks." in said
    table, command = stopped(said.replace(" So are the timings of whole networks.", ""))
    assert command == asked
    assert min(len(row.repeats_ms) for row in table.rows.values()) == REPEATS


def test_ctrl_c_while_a_search_measures_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: TorchHost, *_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchHost, "time_ms", stop)
    assert main(["search", "--out", str(tmp_path / "runs")]) == 130
    assert "what was timed is kept. Go on with: the same command" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
