"""Ops over TVM's RPC: on loopback, where servers are killed in mid-measurement, and on an emulated ARM board."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from toy_device import CONV, LINEAR, POOL, Reference, contents

import cost_models
from cost_models import OpSpec, boards, load_folder, measure, rpc_address
from cost_models.boards import Unreachable
from cost_models.compiling import Job, compile_all
from cost_models.plan import Incomplete
from cost_models.runners import make_runner

psutil = pytest.importorskip("psutil", reason="psutil is not installed: pip install 'pynas[tvm]'")

BENCH = Path(__file__).parents[1] / "bench" / "emulated_board.py"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "PAUSES_S", (0.0, 0.0, 0.0, 0.0))


# --- TVM's server and tracker on loopback -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Native:
    """A tracker and a "board" that is this machine, served by board.py."""

    key = "native"

    def __init__(self) -> None:
        self.tracker_port, self.port = free_port(), free_port()
        ports = ["--port", str(self.tracker_port), "--port-end", str(self.tracker_port + 1)]
        tracker = ["-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1", *ports, "--silent"]
        self._tracker = subprocess.Popen([sys.executable, *tracker])
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Serve, and wait until the tracker knows; returns what board.py said until then."""
        script = Path(cost_models.__file__).with_name("board.py")
        where = ["--key", self.key, "--port", str(self.port), "--tracker", f"127.0.0.1:{self.tracker_port}"]
        self.server = subprocess.Popen(
            [sys.executable, script, *where], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.server.stdout is not None
        said = b"".join(iter(self.server.stdout.readline, b"Ready.\n")).decode()
        self.wait()
        return said

    def wait(self) -> None:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            try:
                rpc_address.boards_of(("127.0.0.1", self.tracker_port), self.key)
            except Unreachable:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError("board.py did not start")

    def kill(self) -> None:
        assert self.server is not None
        for process in [*psutil.Process(self.server.pid).children(recursive=True), self.server]:
            process.send_signal(signal.SIGKILL)
        self.server.communicate()

    def close(self) -> None:
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            self.server.communicate(timeout=20)
        for process in [*psutil.Process(self._tracker.pid).children(recursive=True), self._tracker]:
            process.kill()
        self._tracker.wait()

    def runner(self) -> Any:
        return make_runner(
            "tvm-rpc", target="host", tracker=f"127.0.0.1:{self.tracker_port}", key=self.key, timeout_s=60
        )


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    pytest.importorskip("tvm", reason="TVM is not installed")
    made = Native()
    yield made
    made.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled ops are kept from test to test."""
    return tmp_path_factory.mktemp("compiled")


SMALL = [CONV, LINEAR, POOL]


def on_board(native: Native, folder: Path, **options: Any) -> cost_models.LatencyTable:
    def build(spec: OpSpec) -> Any:
        return Reference(spec).eval()

    runner = native.runner()
    return measure(SMALL, build=build, runner=runner, folder=folder, name="native", repeats=3, **options)


@pytest.mark.tvm
def test_over_rpc_from_end_to_end_killed_and_resumed(
    native: Native, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    said = native.start()
    assert "whoever reaches this port can run any code" in said
    assert f"ssh -N -L {native.port}:127.0.0.1:{native.port} -R {native.tracker_port}:127.0.0.1:" in said
    with pytest.raises(Unreachable, match="Its boards: native \\(1\\)"):
        make_runner("tvm-rpc", target="host", tracker=f"127.0.0.1:{native.tracker_port}", key="x").provenance()
    with pytest.raises(ConnectionRefusedError):  # on loopback alone
        socket.create_connection((own_address(), native.port), timeout=5)

    def kill(done: int, total: int, seconds_left: float) -> None:
        if done == 3:
            native.kill()

    compiled: list[int] = []
    with pytest.raises(Incomplete, match="2 of 3 ops could not be measured.*knows no board with the key 'native'"):
        on_board(native, tmp_path, report=kill, compiling=lambda *progress: compiled.append(progress[0]))
    assert compiled == [1, 2, 3]
    first = load_folder(tmp_path)
    assert len(first.rows) == 1

    native.start()
    table = on_board(native, tmp_path, compiling=lambda *progress: compiled.append(progress[0]))
    assert compiled == [1, 2, 3]
    assert first.rows.items() <= table.rows.items()
    assert set(table.rows) == set(SMALL)
    assert all(len(row.repeats_ms) == 3 for row in table.rows.values())
    assert table.provenance.runner == "tvm-rpc"
    assert table.provenance.build == {"target": "host"}
    assert table.provenance.machine["cpu"] == cost_models.runners.cpu_model()
    assert int(table.provenance.machine["call_ns"]) > 0
    software = table.provenance.software
    assert software["apache-tvm-on-board"] == software["apache-tvm"] == importlib.metadata.version("apache-tvm")


@pytest.mark.tvm
def test_a_server_that_crashes_is_started_again_and_waited_for(
    native: Native, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    monkeypatch.setattr(boards, "PAUSES_S", (1.0,) * 40)
    if native.server is None or native.server.poll() is not None:
        native.start()
    native.wait()

    def crash(done: int, total: int, seconds_left: float) -> None:
        if done == 3:
            assert native.server is not None
            (served,) = psutil.Process(native.server.pid).children()
            os.killpg(served.pid, signal.SIGKILL)

    assert set(on_board(native, tmp_path, report=crash).rows) == set(SMALL)


@pytest.mark.tvm
def test_wrong_outputs_on_the_board_are_no_row(
    native: Native, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    if native.server is None or native.server.poll() is not None:
        native.start()
    native.wait()
    shape = (1, POOL.in_channels, POOL.size, POOL.size)
    folders = compile_all({0: Job(POOL.key, Reference(POOL).eval(), shape)}, native.runner().compiler)
    folder = folders[0]
    right = contents(folder)["expected.npy"]
    try:
        np.save(folder / "expected.npy", np.load(folder / "expected.npy") + 1)
        with pytest.raises(Incomplete, match=f"{POOL.key}: .*the op on the board is wrong: it differs from torch by"):
            on_board(native, tmp_path / "wrong")
    finally:
        (folder / "expected.npy").write_bytes(right)
    assert set(load_folder(tmp_path / "wrong").rows) == {CONV, LINEAR}


def own_address() -> str:
    """An address of this machine that is not loopback, or one of loopback on which nobody listens either."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return "127.0.0.2"


# --- an emulated 64-bit ARM board -------------------------------------------------------------------------------------


def emulation() -> ModuleType:
    made = importlib.util.spec_from_file_location("emulated_board", BENCH)
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.board
@pytest.mark.tvm
@pytest.mark.timeout(900)
def test_an_emulated_aarch64_board_from_end_to_end(tmp_path: Path) -> None:
    if shutil.which("qemu-aarch64") is None or sys.platform != "linux":
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    reason = emulation().why_not()
    if reason:
        pytest.skip(reason)
    folder = os.environ.get("PYNAS_EMULATED_BOARD", str(tmp_path / "board"))  # set it to keep the board's system
    done = subprocess.run([sys.executable, BENCH, "--folder", folder, "--ops", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the error: 4 of 6 ops could not be measured" in done.stdout
    assert done.stdout.count("before the break") == 2
    assert done.stdout.count("after the break") == 4
    assert "on: aarch64 emulated on" in done.stdout
    assert "say nothing about the speed of any ARM core" in done.stdout
