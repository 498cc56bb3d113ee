"""Measuring: resumable, undisturbed by other load, never mixing conditions; on a tame clock and on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_device import CONV, LINEAR, MBCONV, OPS, POOL, SKIP, Clockwork, Reference, additive_ms, contents

import cost_models
from cost_models import LatencyTable, OpSpec, TorchHost, load_folder, measure
from cost_models.files import write_atomic
from cost_models.steady import settled, steady


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.steady, "ROUND_SECONDS", 0.0)


def measured(folder: Path, runner: Clockwork, ops: list[OpSpec], repeats: int = 5, name: str = "toy") -> LatencyTable:
    return measure(ops, build=lambda spec: spec.key, runner=runner, folder=folder, name=name, repeats=repeats)


def test_measuring_takes_turns_drops_doubles_and_skips(tmp_path: Path) -> None:
    runner, seen = Clockwork(), []
    table = measure(
        [CONV, POOL, SKIP, CONV],
        build=str,
        runner=runner,
        folder=tmp_path / "toy",
        name="toy",
        repeats=4,
        report=lambda *progress: seen.append(progress),
    )
    assert runner.timed == [CONV, POOL] * 4
    assert set(table.rows) == {CONV, POOL}
    assert [progress[:2] for progress in seen] == [(i, 8) for i in range(1, 9)]
    assert all(seconds >= 0 for *_, seconds in seen)
    assert measured(tmp_path / "toy", Clockwork(stop_after=0), [CONV, POOL], repeats=4).rows == table.rows


def test_only_missing_rows_are_measured(tmp_path: Path) -> None:
    first = measured(tmp_path, Clockwork(), [CONV, POOL])
    runner = Clockwork()
    second = measured(tmp_path, runner, [CONV, POOL, LINEAR])
    assert set(runner.timed) == {LINEAR}
    assert first.rows.items() <= second.rows.items()


def test_two_runs_at_a_time_keep_each_others_rows(tmp_path: Path) -> None:
    class Overtaken(Clockwork):
        def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
            if not self.timed:
                measured(tmp_path, Clockwork(), [POOL])
            return super().time_ms(module, spec, repeats)

    assert set(measured(tmp_path, Overtaken(), [CONV]).rows) == {CONV, POOL}


@pytest.mark.parametrize("stop_after", [0, 1, 7, 23])
def test_an_interrupted_run_goes_on_where_it_stood(tmp_path: Path, stop_after: int) -> None:
    folder = tmp_path / "toy"
    complete = measured(folder, Clockwork(factors=(1.0, 1.01)), [CONV, POOL]).rows
    with pytest.raises(KeyboardInterrupt):
        measured(folder, Clockwork(stop_after=stop_after), OPS)
    kept = load_folder(folder)
    assert sum(len(row.repeats_ms) for row in kept.rows.values()) == 10 + stop_after
    assert ("fewer than 5 repeats" in kept.describe()) == (stop_after > 0)

    runner = Clockwork()
    rows = measured(folder, runner, OPS).rows
    assert set(rows) == set(OPS)
    assert all(len(row.repeats_ms) == 5 for row in rows.values())
    assert complete.items() <= rows.items()
    assert len(runner.timed) == 5 * (len(OPS) - 2) - stop_after


KILLED = """
import sys, time
import cost_models
from toy_device import OPS, Clockwork

class Slow(Clockwork):
    def time_ms(self, module, spec, repeats):
        time.sleep(0.005)
        return super().time_ms(module, spec, repeats)

sys.modules["cost_models.plan"].SAVE_SECONDS = 0.0
cost_models.measure(OPS, build=str, runner=Slow(), folder=sys.argv[1], name="toy", repeats=400)
"""


def test_a_killed_run_leaves_a_whole_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "toy")], cwd=Path(__file__).parent, stderr=subprocess.PIPE
    )
    give_up = time.monotonic() + 60
    csv = tmp_path / "toy" / "latency.csv"
    while (not csv.exists() or len(csv.read_text().splitlines()) <= len(OPS)) and time.monotonic() < give_up:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert set(load_folder(tmp_path / "toy").rows) == set(OPS)
    assert set(measured(tmp_path / "toy", Clockwork(), OPS, repeats=3).rows) == set(OPS)


def test_bursts_of_other_load_do_not_reach_the_row(tmp_path: Path) -> None:
    table = measured(tmp_path, Clockwork(factors=(1.6, 1.7, 1.0, 1.02, 1.5)), [CONV], repeats=7)
    assert table.cost(CONV) == pytest.approx(additive_ms(CONV), rel=0.03)
    assert len(table.rows[CONV].repeats_ms) == 7


def test_a_machine_that_never_calms_down_still_gets_rows_with_their_spread(tmp_path: Path) -> None:
    table = measured(tmp_path, Clockwork(factors=(1.0, *(1.2 + 0.1 * i for i in range(40)))), [CONV], repeats=9)
    assert len(table.rows[CONV].repeats_ms) == 9
    assert table.spread > 0.1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.integers(1, 30))
def test_settled_latencies_are_the_steadiest_of_those_taken(latencies: list[float], repeats: int) -> None:
    kept = settled(latencies, repeats)
    assert len(kept) == min(repeats, len(latencies))
    assert min(latencies) in steady(latencies)
    assert set(kept) <= set(latencies)
    if len(steady(latencies)) >= repeats:
        assert max(kept) <= 1.1 * min(latencies)


@pytest.mark.parametrize(
    ("runner", "name", "words"),
    [
        (Clockwork(threads=2), "toy", "threads 1 against 2"),
        (Clockwork(precision="int8"), "toy", "precision 'fp32' against 'int8'"),
        (Clockwork(schedule="v2"), "toy", "schedule 'v1' against 'v2'"),
        (Clockwork(source="modelled"), "toy", "source 'measured' against 'modelled'"),
        (Clockwork(cpu="6502"), "toy", "cpu 'Z80' against '6502'"),
        (Clockwork(), "other", "device 'toy' against 'other'"),
    ],
    ids=["threads", "precision", "schedule", "source", "cpu", "device"],
)
def test_rows_of_different_conditions_never_share_a_table(
    tmp_path: Path, runner: Clockwork, name: str, words: str
) -> None:
    measured(tmp_path, Clockwork(), [CONV])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"other conditions: {words}. Rows of both must not be mixed"):
        measured(tmp_path, runner, [POOL], name=name)
    assert contents(tmp_path) == before
    assert not runner.timed


@pytest.mark.parametrize("latency_ms", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_an_impossible_time_is_an_error_not_a_row(tmp_path: Path, latency_ms: float) -> None:
    runner = Clockwork(factors=(latency_ms / additive_ms(POOL),))
    with pytest.raises(ValueError, match=f"'clockwork' gave no valid latency for the op {POOL.key}"):
        measured(tmp_path, runner, [POOL])
    with pytest.raises(ValueError, match="is empty"):
        load_folder(tmp_path)


def test_an_op_that_fails_is_named(tmp_path: Path) -> None:
    def broken(spec: OpSpec) -> str:
        raise RuntimeError("no such kernel")

    with pytest.raises(ValueError, match=f"{CONV.key} could not be built: RuntimeError: no such kernel"):
        measure([CONV], build=broken, runner=Clockwork(), folder=tmp_path, name="toy")
    with pytest.raises(ValueError, match=f"{CONV.key} could not be timed: MemoryError"):
        measured(tmp_path, Clockwork(stop_after=0, stop_with=MemoryError), [CONV])


def test_nothing_to_measure_and_too_few_repeats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no op to measure"):
        measured(tmp_path / "toy", Clockwork(), [SKIP])
    with pytest.raises(ValueError, match="repeats is 2"):
        measured(tmp_path / "toy", Clockwork(), [CONV], repeats=2)
    assert not (tmp_path / "toy").exists()


def test_a_folder_that_cannot_be_written_stops_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    runner = Clockwork()
    with pytest.raises(OSError, match="cannot be written"):
        measured(tmp_path / "file" / "toy", runner, [CONV])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="cannot be written.*no permission"):
        measured(tmp_path / "toy", runner, [CONV])
    assert not runner.timed


def test_a_full_disk_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(tmp_path, Clockwork(), [CONV])
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written.*the disk is full"):
        measured(tmp_path, Clockwork(), [CONV, POOL])
    assert contents(tmp_path) == before


# --- torch on this machine ------------------------------------------------------------------------------------------


def tiny(spec: OpSpec) -> nn.Module:
    return Reference(spec).eval()


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_torch_host_times_real_ops_and_leaves_torch_as_it_was() -> None:
    runner = TorchHost()
    for spec in (MBCONV, CONV, POOL, LINEAR):
        module, state = tiny(spec), torch.get_rng_state()
        latencies = runner.time_ms(module, spec, 3)
        assert len(latencies) == 3
        assert all(0 < value < 1e3 for value in latencies)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(runner.time_net_ms(nn.Sequential(tiny(CONV)).eval(), (1, 3, 16, 16), 4)) == 4
    assert torch.get_num_threads() == 2


def test_torch_host_refuses_what_would_give_wrong_times() -> None:
    with pytest.raises(ValueError, match="training mode"):
        TorchHost().time_net_ms(Reference(CONV).train(), (1, 3, 16, 16), 3)
    last = Reference(POOL)
    half = nn.Sequential(Reference(CONV), last).eval()
    last.train()
    with pytest.raises(ValueError, match="training mode, or a part of it"):
        TorchHost().time_net_ms(half, (1, 3, 16, 16), 3)
    with pytest.raises(ValueError, match="repeats is 0"):
        TorchHost().time_net_ms(tiny(CONV), (1, 3, 16, 16), 0)
    with pytest.raises(ValueError, match="threads is 0"):
        TorchHost(threads=0)


def test_the_host_is_measured_once_and_keeps_the_seed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    table = cost_models.host_table([CONV, SKIP], build=tiny)
    assert torch.equal(torch.get_rng_state(), state)
    assert table.name == "host"
    assert table.source(CONV) == "measured"
    assert str(table.provenance.software["torch"]).partition("+")[0] == torch.__version__.partition("+")[0]

    more = cost_models.host_table([CONV, LINEAR], build=tiny)
    assert more.rows[CONV] == table.rows[CONV]
    assert cost_models.load("host").rows == more.rows
    assert {device.name: device.rows for device in cost_models.devices()}["host"] == 2
    assert cost_models.load("host").hash == more.hash


def test_the_users_own_host_comes_first_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cost_models.device_folder("host")
    measure([CONV], build=tiny, runner=TorchHost(), folder=own, name="host", repeats=3)
    assert cost_models.load("host").cost(CONV) == load_folder(own).cost(CONV)
    assert cost_models.places.host_folder() == own

    monkeypatch.setattr(cost_models.runners, "_torch_version", lambda: "99.0")
    for ask in (lambda: cost_models.load("host"), lambda: cost_models.host_table([CONV], build=tiny)):
        with pytest.raises(ValueError, match="does not fit this machine as it is now: torch version .* against '99.0'"):
            ask()
    assert {device.name: device.source for device in cost_models.devices()}["host"] == "broken"


# --- files -----------------------------------------------------------------------------------------------------------


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a.txt", "old")
    (tmp_path / "link.txt").symlink_to("a.txt")
    write_atomic(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()

    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(tmp_path / "a.txt", "newer")
    assert contents(tmp_path) == {"a.txt": b"new", "link.txt": b"new"}


def test_atomic_write_names_what_is_in_its_way(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_atomic(tmp_path / "missing" / "a.txt", "")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_atomic(tmp_path, "")
