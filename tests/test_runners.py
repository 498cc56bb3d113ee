"""Runners beside torch: options, plans, the cache of compiled ops; TVM and onnxruntime on this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy_device import ABOUT, CONV, LINEAR, MBCONV, OPS, POOL, SKIP, Clockwork, Reference, contents

import cost_models
from cost_models import OpSpec, Provenance, load_folder, measure
from cost_models.compiling import Compiler, Job, compile_all, compiled, folder_of, nothing, read_example
from cost_models.plan import plan
from cost_models.process import Died, LineProcess
from cost_models.runners import RUNNERS, make_runner, options_of
from cost_models.steady import RESOLUTION_MS, settled, steady
from cost_models.timing import CALLS_KEPT, CallTimer, net_repeats_ms

WRITES = Compiler("test_runners:write_marks", {"mark": "a"}, {"version": "1"})


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.steady, "ROUND_SECONDS", 0.0)


def write_marks(module: Any, shape: tuple[int, ...], folder: Path, mark: str) -> None:
    """Stands for a compiler, in a worker process."""
    if mark == "crash":
        import os

        os.abort()
    if not isinstance(module, nn.Sequential):
        raise ValueError("no kernel for it")
    (folder / "marks").write_text(mark)


def net(channels: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU()).eval()


def job(label: str = "op", module: nn.Module | None = None) -> Job:
    return Job(label, module or net(), (1, 3, 8, 8))


# --- options ----------------------------------------------------------------------------------------------------------


def test_every_runner_says_what_its_options_are_for() -> None:
    for runner in RUNNERS:
        assert all(len(text) > 10 for text in options_of(runner).values())
    assert set(options_of("tvm-rpc")) == {"target", "address", "tracker", "key", "timeout_s"}
    assert set(options_of("tvm-local")) == {"tune"}
    assert options_of("torch") == options_of("ort-local") == {}


def test_options_that_are_none_count_as_not_given() -> None:
    assert make_runner("torch", 2, target=None, tracker=None).threads == 2
    runner: Any = make_runner("tvm-rpc", target="cortex-a72", address="[::1]:9190", key=None)
    assert (runner.target, runner.address, runner.key) == ("cortex-a72", "[::1]:9190", "")


@pytest.mark.parametrize(
    ("name", "threads", "options", "words"),
    [
        ("tvm-locl", 1, {}, "Unknown runner 'tvm-locl'. Did you mean 'tvm-local'"),
        (
            "torch",
            1,
            {"tracker": "x:1", "key": "k"},
            "'torch' takes no key, tracker; it takes threads. .*'tvm-rpc' does",
        ),
        ("ort-local", 0, {}, "threads is 0"),
        ("tvm-local", 4, {}, "threads is 4, but the kernels of the runner 'tvm-local' use one thread"),
        ("tvm-rpc", 1, {}, "--target cortex-a72"),
        ("tvm-rpc", 1, {"target": "cortex-a72"}, "either --address host:port, or --tracker"),
        ("tvm-rpc", 1, {"target": "cortex-a72", "address": "a:1", "tracker": "b:1"}, "either --address"),
        ("tvm-rpc", 1, {"target": "cortex-a72", "tracker": "b:1"}, "by their key: add --key"),
        ("tvm-rpc", 1, {"target": "cortex-a72", "address": "rpi4"}, "address is 'rpi4'; it must be host:port"),
        ("tvm-rpc", 1, {"target": "cortex-a72", "address": "a:1,b:99999"}, "address is 'b:99999'"),
        ("tvm-rpc", 1, {"target": "cortex-a72", "address": "a:1", "timeout_s": 0}, "timeout_s is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, threads: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_runner(name, threads, **options)


# --- plans ------------------------------------------------------------------------------------------------------------


def planned(folder: Path, runner: Any, ops: list[OpSpec] = OPS) -> Any:
    return plan(ops, build=lambda spec: Reference(spec).eval(), runner=runner, folder=folder, name="toy", repeats=3)


def test_a_plan_says_how_much_how_long_and_where_and_measures_nothing(tmp_path: Path) -> None:
    runner = Clockwork()
    work = planned(tmp_path / "toy", runner, [CONV, POOL, SKIP])
    assert f"2 ops by clockwork; 3 timings each: about 0 s; into {tmp_path / 'toy'}" in str(work)
    assert not runner.timed
    assert set(work.run().rows) == {CONV, POOL}

    more = planned(tmp_path / "toy", runner)
    assert f"{len(OPS) - 2} ops (2 others are there already)" in str(more)
    assert more.time_seconds > 0
    more.run()
    assert str(planned(tmp_path / "toy", runner)) == f"all {len(OPS)} ops are in {tmp_path / 'toy'} already"


def test_a_plan_counts_what_is_to_be_compiled(tmp_path: Path) -> None:
    work = planned(tmp_path, make_runner("ort-local"))
    assert set(work.jobs) == set(OPS)
    assert f"compiling {len(OPS)}: about" in str(work)
    assert work.compile_seconds > len(OPS)


def test_a_disk_without_room_for_compiled_ops_stops_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 << 20, 8 << 20, 2 << 20))
    with pytest.raises(OSError, match=r"too full: \d+ compiled ops need about \d+ MB in .*, and 2 MB are free"):
        planned(tmp_path, make_runner("ort-local"))


# --- what rows must agree in ------------------------------------------------------------------------------------------


def test_the_target_is_part_of_a_tables_identity_and_a_calibration_is_not(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(ABOUT.to_toml(rows=0, spread=0.0))
    assert Provenance.read(tmp_path) == ABOUT
    a72 = dataclasses.replace(ABOUT, build={"target": "cortex-a72"})
    a53 = dataclasses.replace(ABOUT, build={"target": "cortex-a53"})
    assert len({ABOUT.fingerprint, a72.fingerprint, a53.fingerprint}) == 3
    assert a72.differences(a53) == "target 'cortex-a72' against 'cortex-a53'"
    calibrated = dataclasses.replace(a72, calibration={"scale": 1.25, "offset_ms": 0.5, "nets": 30})
    assert not calibrated.differences(a72)
    (tmp_path / "device.toml").write_text(calibrated.to_toml(rows=0, spread=0.0))
    assert Provenance.read(tmp_path) == calibrated


def test_tables_written_before_there_were_targets_keep_their_fingerprint() -> None:
    assert ABOUT.fingerprint == "d7fea64229ef"
    assert "[build]" not in ABOUT.to_toml(rows=0, spread=0.0)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('build = "cortex-a72"', "build is 'cortex-a72'; it must be a section"),
        ("[build]\ntarget = 1.5", r"target in \[build\] is 1.5"),
        ("[calibration]\nscale = nan", r"scale in \[calibration\] is nan"),
    ],
)
def test_broken_sections_are_refused(tmp_path: Path, section: str, words: str) -> None:
    toml = ABOUT.to_toml(rows=0, spread=0.0)
    (tmp_path / "device.toml").write_text(
        f"{section}\n{toml}" if "=" in section.splitlines()[0] else f"{toml}{section}\n"
    )
    with pytest.raises(ValueError, match=words):
        Provenance.read(tmp_path)


def test_measuring_more_keeps_a_calibration(tmp_path: Path) -> None:
    measure([CONV], build=str, runner=Clockwork(), folder=tmp_path, name="toy", repeats=3)
    table = load_folder(tmp_path)
    about = dataclasses.replace(table.provenance, calibration={"scale": 1.5, "offset_ms": 0.5})
    cost_models.LatencyTable(about, table.rows).copy_to(tmp_path)
    measure([POOL], build=str, runner=Clockwork(), folder=tmp_path, name="toy", repeats=3)
    assert load_folder(tmp_path).provenance.calibration == {"scale": 1.5, "offset_ms": 0.5}


# --- the cache of compiled ops ----------------------------------------------------------------------------------------


def test_compiled_ops_are_kept_with_an_input_and_the_output_of_torch() -> None:
    seen: list[tuple[int, int, float]] = []
    ours = job()
    (folder,) = compile_all({0: ours}, WRITES, report=lambda *progress: seen.append(progress)).values()
    assert [progress[:2] for progress in seen] == [(1, 1)]
    assert set(contents(folder)) == {"marks", "done.json", "input.npy", "expected.npy"}
    x, expected = read_example(folder)
    with torch.inference_mode():
        np.testing.assert_allclose(ours.module(torch.from_numpy(x)).numpy(), expected, atol=1e-5)
    assert not list(folder.parent.glob(".making-*"))

    before = contents(folder)
    assert compile_all({0: job()}, WRITES, report=lambda *progress: seen.append(progress)) == {0: folder}
    assert contents(folder) == before
    assert len(seen) == 1


def test_everything_that_shapes_the_code_names_another_folder() -> None:
    class Leaky(nn.Sequential):
        slope = 0.1

    leaky, steeper = Leaky(nn.Conv2d(3, 4, 3)).eval(), Leaky(nn.Conv2d(3, 4, 3)).eval()
    steeper.slope = 0.2
    jobs = [job(), job("other"), job(module=net(5)), job(module=leaky), job(module=steeper)]
    jobs += [Job("op", net(), (1, 3, 9, 9)), job(module=nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()).eval())]
    folders = {folder_of(each, WRITES) for each in jobs}
    compilers = [dataclasses.replace(WRITES, settings={"mark": "b"}), dataclasses.replace(WRITES, versions={})]
    folders |= {folder_of(job(), compiler) for compiler in compilers}
    assert len(folders) == len(jobs) + len(compilers)
    assert folder_of(job(), WRITES) == folder_of(job(), WRITES)  # other weights


def test_all_failures_are_named_and_the_others_are_kept() -> None:
    bad = {key: job(f"bad-{key}", nn.Conv2d(3, 4, 3).eval()) for key in range(2)}
    training = job("training", net().train())
    with pytest.raises(
        ValueError, match="3 of 4 ops could not be compiled.*bad-0: ValueError: no kernel for it.*bad-1.*"
    ):
        compile_all({**bad, 2: training, 3: job("good")}, WRITES)
    assert compiled(job("good"), WRITES)
    assert not compiled(bad[0], WRITES)


def test_a_compiler_that_crashes_is_an_error_of_that_op() -> None:
    crash = dataclasses.replace(WRITES, settings={"mark": "crash"})
    with pytest.raises(ValueError, match=r"1 of 1 ops could not be compiled. op: crashed \(signal 6\)"):
        compile_all({0: job()}, crash)


def test_a_cache_that_cannot_be_written_stops_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Compiled ops cannot be kept in"):
        compile_all({0: job()}, WRITES)


def test_a_process_that_gives_no_answer_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enough() -> None:
        raise TimeoutError("enough")

    (tmp_path / "asleep.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    process = LineProcess("asleep")
    with pytest.raises(Died, match="gave no answer in 0 s"):
        process.ask({}, timeout_s=0.2)
    with pytest.raises(TimeoutError, match="enough"):
        process.ask({}, timeout_s=60, meanwhile=enough)
    with pytest.raises(Died, match="No module named"):
        LineProcess("no_such_module").ask({}, timeout_s=60)
    process.kill()
    with pytest.raises(Died, match="was stopped"):
        process.ask({}, timeout_s=60)


# --- latencies without the call ---------------------------------------------------------------------------------------


class Clock:
    """A runtime on which the sweep, a call and an op take what they are told to, in ns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *calls_ns: int) -> None:
        self.now, self.done = 0, list[str]()
        self._calls_ns = itertools.cycle(calls_ns)
        monkeypatch.setattr(cost_models.timing, "clock", lambda threads: lambda: self.now)
        monkeypatch.setattr(cost_models.timing, "sweep", lambda: self.takes("sweep", 10**6))
        self.timer = CallTimer(self.takes("warm", 9000), self.takes("idle"), 1)

    def takes(self, name: str, latency_ns: int | None = None) -> Callable[[], None]:
        def run() -> None:
            self.done.append(name)
            self.now += next(self._calls_ns) if latency_ns is None else latency_ns

        return run


def test_what_a_call_takes_is_taken_off_after_the_way_was_warmed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2000)
    assert clock.timer.note() == {}
    clock.done.clear()
    assert clock.timer.runs_ms(clock.takes("op", 5000), 3) == pytest.approx([3e-3] * 3)
    assert clock.timer.note() == {"call_ns": 2000}
    assert clock.done[:2] == ["op", "op"]
    assert clock.done[2:] == ["sweep", "warm", "idle", "op"] * (len(clock.done) // 4)


@pytest.mark.parametrize("op_ns", [1500, 2000, 2050])
def test_no_latency_is_zero_or_less(op_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2000)
    assert clock.timer.runs_ms(clock.takes("op", op_ns), 2) == [RESOLUTION_MS] * 2


def test_disturbed_calls_do_not_make_ops_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 11
    clock = Clock(monkeypatch, *[2000] * 3 * runs, *[30000] * 2 * runs, *[2100] * 3 * runs)
    taken = clock.timer.runs_ms(clock.takes("op", 50000), 2 * CALLS_KEPT)
    assert min(taken) >= 0.05 - 2.1e-3 - 1e-9
    assert clock.timer.call_ms == pytest.approx(2.05e-3, abs=6e-5)


def test_what_cannot_be_told_apart_is_steady() -> None:
    assert steady([2e-4, 2.9e-4, 3.1e-4]) == (2e-4, 2.9e-4)
    assert steady([2.0, 2.1, 2.3]) == (2.0, 2.1)
    assert settled([3.1e-4, 2e-4, 2.9e-4], 3) == (2e-4, 2.9e-4, 3.1e-4)
    assert steady([]) == ()


def test_what_measures_the_call_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    job = nothing("it")
    assert torch.equal(torch.get_rng_state(), state)
    assert job.module(torch.ones(job.shape)).item() == 2.0


# --- real runtimes on this machine ------------------------------------------------------------------------------------

SMALL = (CONV, LINEAR, MBCONV)


@pytest.mark.parametrize(
    "name", [pytest.param("tvm-local", marks=pytest.mark.tvm), pytest.param("ort-local", id="ort-local")]
)
def test_a_runtime_fills_a_table_and_finds_wrong_outputs(name: str, tmp_path: Path) -> None:
    runner: Any = make_runner(name)
    if name == "tvm-local":
        pytest.importorskip("tvm", reason="TVM is not installed")
    compiling: list[int] = []
    work = planned(tmp_path / "toy", runner, list(SMALL))
    work.compile(lambda done, total, left: compiling.append(done))
    table = work.time()
    assert compiling == [1, 2, 3]
    assert set(table.rows) == set(SMALL)
    assert all(len(row.repeats_ms) == 3 for row in table.rows.values())
    assert table.provenance.runner == name
    assert table.provenance.source == "measured"
    packages = {"tvm-local": {"apache-tvm"}, "ort-local": {"onnxruntime", "onnxscript", "torch"}}
    assert set(table.provenance.software) == packages[name]
    assert table.provenance.schedule.endswith(", call-1")
    assert 0 < int(table.provenance.machine["call_ns"]) < 1e6
    assert table.provenance.build == ({"target": "host"} if name == "tvm-local" else {})

    again = planned(tmp_path / "again", runner, list(SMALL))
    assert not again.jobs
    module = Reference(CONV).eval()
    shape = (1, CONV.in_channels, CONV.size, CONV.size)
    assert 0 < net_repeats_ms(runner.net(module, shape), 3)[0] < 1e3

    folder = folder_of(Job(CONV.key, module, shape), runner.compiler)
    x, expected = read_example(folder)
    np.save(folder / "expected.npy", expected + 1)
    with pytest.raises(ValueError, match=f"{CONV.key} could not be loaded: ValueError: .* it differs from torch by"):
        again.time()
    with pytest.raises(ValueError, match="is empty"):
        load_folder(tmp_path / "again")


def test_half_a_compiled_file_is_compiled_again(tmp_path: Path) -> None:
    runner: Any = make_runner("ort-local")
    planned(tmp_path / "toy", runner, [CONV]).compile()
    job = planned(tmp_path / "toy", runner, [CONV])
    assert not job.jobs
    folder = folder_of(
        Job(CONV.key, Reference(CONV).eval(), (1, CONV.in_channels, CONV.size, CONV.size)), runner.compiler
    )
    (folder / "op.onnx").write_bytes((folder / "op.onnx").read_bytes()[:-20])
    again = planned(tmp_path / "toy", runner, [CONV])
    assert list(again.jobs) == [CONV]
    assert set(again.run().rows) == {CONV}


@pytest.mark.parametrize("target", ["armv7", "cortex-a72"])
def test_code_that_a_board_cannot_run_is_refused_before_it_is_compiled(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = make_runner("tvm-rpc", target=target, address="127.0.0.1:1")
    monkeypatch.setattr("cost_models.tvm_rpc.tvm_version", lambda: "1")
    runner.__dict__["about"] = {"cpu": "some", "system": "Linux x86_64"}
    with pytest.raises(ValueError, match=f"target '{target}' is .* code, but the board is a x86_64"):
        runner.provenance()


def test_rows_of_different_exporters_are_different_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = make_runner("ort-local")
    module = Reference(CONV).eval()
    shape = (1, CONV.in_channels, CONV.size, CONV.size)
    now, there = Provenance.of("toy", runner, 3), folder_of(Job("op", module, shape), runner.compiler)
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "onnxscript" else installed(name))
    assert "onnxscript version" in now.differences(Provenance.of("toy", runner, 3))
    assert folder_of(Job("op", module, shape), runner.compiler) != there


def test_several_threads_of_onnxruntime_are_another_table() -> None:
    one, two = (Provenance.of("toy", make_runner("ort-local", threads), 3) for threads in (1, 2))
    assert one.differences(two) == "threads 1 against 2"
    assert one.identity != two.identity


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, command in (("tvm-local", r"pip install 'pynas\[tvm\]'"), ("ort-local", "pip install onnxruntime")):
        with pytest.raises(ImportError, match=command):
            planned(tmp_path, make_runner(name))
    assert not list(tmp_path.iterdir())
