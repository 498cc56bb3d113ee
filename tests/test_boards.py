"""Boards that fail, addresses where nobody answers: nothing of it reaches a table, and nothing is lost."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy_device import CONV, OPS, POOL, Clockwork, Reference, additive_ms

import cost_models
from cost_models import OpSpec, board_session, boards, load_folder, measure, rpc_address
from cost_models.boards import Failed, Unreachable, check_repeats
from cost_models.machine import board_cpu
from cost_models.plan import Incomplete
from cost_models.runners import make_runner
from cost_models.timing import net_repeats_ms


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "PAUSES_S", (0.0, 0.0, 0.0, 0.0))


# --- boards that fail as told -----------------------------------------------------------------------------------------


@dataclass
class Moody:
    """A board on which the n-th timing is as told: factors of the true latency, or an error. Then it is well."""

    moods: list[list[float] | Exception] = field(default_factory=list)
    gate: threading.Barrier | None = None
    name: str = "The board"
    timed: list[str] = field(default_factory=list)
    closed: bool = False

    def time_ms(self, compiled: Any, repeats: int) -> list[float]:
        self.timed.append(compiled)
        if self.gate is not None and len(self.timed) == 1:
            self.gate.wait(10)
        mood = self.moods.pop(0) if self.moods else [1.0] * repeats
        if isinstance(mood, Exception):
            raise mood
        spec = next(spec for spec in OPS if spec.key == compiled)
        return [additive_ms(spec) * factor for factor in mood]

    def close(self) -> None:
        self.closed = True


@dataclass
class Lender(Clockwork):
    """A runner with such boards."""

    lent: list[Any] = field(default_factory=list)

    def boards(self) -> list[Any]:
        return self.lent


def measured(folder: Path, *lent: Any, ops: list[OpSpec] = OPS, **options: Any) -> cost_models.LatencyTable:
    runner = Lender(lent=list(lent))
    return measure(ops, build=lambda spec: spec.key, runner=runner, folder=folder, name="toy", repeats=3, **options)


POISON = [0.0, -1.0, float("nan"), float("inf"), 1e10, 25.0, 1 / 25]


@pytest.mark.parametrize("factor", POISON)
def test_absurd_values_are_tried_again_and_never_reach_the_table(tmp_path: Path, factor: float) -> None:
    table = measured(tmp_path, Moody([[1.0, factor, 1.0]] * 3), ops=[CONV, POOL])
    for spec in (CONV, POOL):
        assert table.rows[spec].repeats_ms == pytest.approx([additive_ms(spec)] * 3, rel=1e-4)


def test_an_op_that_stays_absurd_is_missing_and_the_others_are_kept(tmp_path: Path) -> None:
    first, second, *others = OPS
    board = Moody([[1.0, 1e10, 1.0]] * boards.TRIES)
    with pytest.raises(
        Incomplete, match=rf"1 of {len(OPS)} ops .* {first.key}: The board gave .* \(4 tries\).*kept in"
    ) as caught:
        measured(tmp_path, board)
    assert "start board.py there again, check the tunnel), then type the same command" in str(caught.value)
    assert set(caught.value.missing) == {first}
    assert set(load_folder(tmp_path).rows) == {second, *others}
    assert board.closed

    before = load_folder(tmp_path).rows
    well = Moody()
    assert before.items() <= measured(tmp_path, well).rows.items()
    assert well.timed == [first.key]


def test_normal_noise_of_a_board_is_no_absurdity() -> None:
    check_repeats([1.0, 1.1, 5.0, 19.0])
    check_repeats([1e-4, 1e-4, 0.015])  # what is left of tiny ops when the call is taken off
    for latencies in ([1.0, 1.1, 30.0], [1.0, 0.04, 1.1]):
        with pytest.raises(Failed, match="among others"):
            check_repeats(latencies)


def test_boards_share_the_work_each_op_wholly_on_one(tmp_path: Path) -> None:
    gate = threading.Barrier(2)  # each waits with its first op until the other has one
    left, right = Moody(gate=gate), Moody(gate=gate)
    seen: list[tuple[int, int, float]] = []
    table = measured(tmp_path, left, right, report=lambda *progress: seen.append(progress))
    assert left.timed
    assert right.timed
    assert sorted(left.timed + right.timed) == sorted(spec.key for spec in OPS)
    assert set(table.rows) == set(OPS)
    assert [progress[:2] for progress in seen] == [(3 * i, 3 * len(OPS)) for i in range(1, len(OPS) + 1)]
    assert seen[-1][2] == 0
    assert left.closed
    assert right.closed


def test_the_ops_of_a_lost_board_go_to_the_others(tmp_path: Path) -> None:
    gate = threading.Barrier(2)
    lost = Moody([Unreachable("No board answers")] * 99, gate=gate)
    well = Moody(gate=gate)
    assert set(measured(tmp_path, lost, well).rows) == set(OPS)
    assert len(lost.timed) == 1 + len(boards.PAUSES_S)
    assert sorted(well.timed) == sorted(spec.key for spec in OPS)


def test_a_board_that_comes_back_goes_on(tmp_path: Path) -> None:
    absent: list[list[float] | Exception] = [Unreachable("refused")] * 3
    assert set(measured(tmp_path, Moody([*absent, Failed("crashed"), *absent])).rows) == set(OPS)


def test_when_all_boards_are_lost_what_was_measured_is_kept(tmp_path: Path) -> None:
    first, second, *others = OPS
    board = Moody([[1.0] * 3, [1.0] * 3, *[Unreachable("No board answers at x:1.")] * 99])
    with pytest.raises(
        Incomplete, match=f"{len(others)} of {len(OPS)} ops .* and {len(others) - 1} more: No board answers at x:1"
    ):
        measured(tmp_path, board)
    assert set(load_folder(tmp_path).rows) == {first, second}


def test_what_must_not_be_tried_again_stops_the_measurement(tmp_path: Path) -> None:
    board = Moody([[1.0] * 3, ValueError("the board has another CPU")])
    with pytest.raises(ValueError, match="another CPU"):
        measured(tmp_path, board)
    assert len(board.timed) == 2
    assert board.closed
    assert set(load_folder(tmp_path).rows) == {OPS[0]}


def test_ctrl_c_lets_the_boards_go_and_keeps_the_rows(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    board = Moody()
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, board, report=stop)
    assert board.closed
    assert set(load_folder(tmp_path).rows) == {OPS[0]}
    assert set(measured(tmp_path, Moody()).rows) == set(OPS)


def test_a_whole_network_is_timed_with_the_same_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.tvm_rpc, "compile_all", lambda jobs, compiler: dict.fromkeys(jobs, CONV.key))
    monkeypatch.setattr(cost_models.tvm_rpc, "tvm_compiler", lambda target: None)
    board = Moody([Failed("crashed"), Unreachable("refused"), [1.0, 25.0, 1.0], [1.0, 1.01, 1.02]])
    runner: Any = make_runner("tvm-rpc", target="cortex-a72", address="127.0.0.1:1")
    runner._kept = board
    assert runner.net(None, (1, 3, 16, 16))() == pytest.approx(1.01 * additive_ms(CONV))
    assert net_repeats_ms(runner.net(None, (1, 3, 16, 16)), 3) == pytest.approx([additive_ms(CONV)] * 3)


ABOUT = {"cpu": "ARM a72", "tvm": "0.27.0", "system": "Linux aarch64"}


def answering_board(monkeypatch: pytest.MonkeyPatch, about: dict[str, str]) -> Any:
    """A board that says what it is, beside a first one that is as in ABOUT."""
    runner: Any = make_runner("tvm-rpc", target="cortex-a72", address="127.0.0.1:1")
    monkeypatch.setattr("cost_models.tvm_rpc.tvm_version", lambda: "1")
    runner.__dict__.update(about=ABOUT, idle=Path("nothing"))
    board = cost_models.tvm_rpc.RpcBoard(runner, ("127.0.0.1", 1))
    asked: list[dict[str, Any]] = []

    def ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        asked.append(request)
        return {"about": about, "ms": [1.0, 1.1, 1.2], "call_ms": 0.005}

    monkeypatch.setattr(board, "ask", ask)
    return board


def test_the_version_of_tvm_on_a_board_and_its_call_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    board = answering_board(monkeypatch, ABOUT)
    before = board._runner.provenance()
    assert before["software"] == {"apache-tvm": "1", "apache-tvm-on-board": "0.27.0"}
    assert "call_ns" not in before["machine"]
    assert board.time_ms(Path("op"), 3) == [1.0, 1.1, 1.2]
    assert board._runner.provenance()["machine"]["call_ns"] == 5000
    board._runner.__dict__["about"] = {"cpu": "ARM a72"}
    assert board._runner.provenance()["software"]["apache-tvm-on-board"] == "unknown"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tvm": "0.26.0"}, "has TVM '0.26.0', another one '0.27.0'"),
        ({"tvm": ""}, "has TVM 'unknown', another one '0.27.0'"),
        ({"cpu": "ARM a53"}, "has the CPU 'ARM a53', another one 'ARM a72'"),
    ],
)
def test_boards_of_one_key_that_differ_are_refused(
    change: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = answering_board(monkeypatch, {**ABOUT, **change})
    with pytest.raises(ValueError, match=f"{words}.*must not be mixed"):
        board.time_ms(Path("op"), 3)
    assert "call_ns" not in board._runner.provenance()["machine"]


# --- who answers at an address ----------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answering(server: socket.socket, *answers: bytes) -> rpc_address.Address:
    """Accept once, and give each answer after something was read."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            for answer in answers:
                connection.recv(4096)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    address: rpc_address.Address = server.getsockname()
    return address


def summary(*keys: str) -> bytes:
    text = json.dumps(
        [0, {"server_info": [{"key": f"server:{key}", "addr": ["x", 1]} for key in keys], "queue_info": {}}]
    )
    return struct.pack("<i", len(text)) + text.encode()


HELLO = struct.pack("<i", rpc_address.TRACKER)


def test_a_tracker_tells_how_many_boards_of_a_key_it_has(listener: socket.socket) -> None:
    assert rpc_address.boards_of(answering(listener, HELLO, summary("rpi4", "rpi5", "rpi4")), "rpi4") == 2


def test_a_wrong_key_is_named_with_those_that_there_are(listener: socket.socket) -> None:
    address = answering(listener, HELLO, summary("rpi4", "rpi5", "rpi4"))
    with pytest.raises(Unreachable, match=r"knows no board with the key 'rpi3'. Its boards: rpi4 \(2\), rpi5 \(1\)"):
        rpc_address.boards_of(address, "rpi3")
    address = answering(listener, struct.pack("<i", rpc_address.MISMATCH))
    with pytest.raises(Unreachable, match="has another key than 'rpi3'. Give --key"):
        rpc_address.check_server(address, "rpi3")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["other protocol", "closes"])
def test_what_is_no_tracker_is_told_from_one(listener: socket.socket, answer: bytes) -> None:
    with pytest.raises(
        Unreachable, match="is no TVM tracker. Start one: python -m tvm.exec.rpc_tracker --host 127.0.0.1"
    ):
        rpc_address.boards_of(answering(listener, answer), "rpi4")
    with pytest.raises(Unreachable, match=r"no TVM RPC server|closes the connection"):
        rpc_address.check_server(answering(listener, answer), "rpi4")


def test_a_busy_board_is_told_from_a_dead_one(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_address, "SECONDS", 0.2)
    with pytest.raises(Unreachable, match="accepts connections but does not answer"):
        rpc_address.check_server(listener.getsockname(), "rpi4")


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("where", ["address", "tracker"])
def test_a_dead_address_is_found_before_anything_is_compiled(where: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    runner = make_runner("tvm-rpc", target="cortex-a72", key="rpi4", **{where: f"127.0.0.1:{unused_port()}"})
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"No (board|tracker) answers at 127.0.0.1:\d+: the connection was refused"):
        measure([CONV], build=Reference, runner=runner, folder=tmp_path / "pi", name="pi")
    assert time.monotonic() - begin < 10
    assert not (tmp_path / "pi").exists()


def test_an_unknown_target_is_found_first() -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    with pytest.raises(ValueError, match="Unknown target 'cortex-a27'. Did you mean"):
        make_runner("tvm-rpc", target="cortex-a27", address="127.0.0.1:1").provenance()


# --- what a board tells about itself ----------------------------------------------------------------------------------


def test_the_cpu_of_a_board_from_what_it_shows() -> None:
    pi4 = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd08\n"
    assert board_cpu(pi4, "aarch64") == "ARM implementer 0x41 part 0xd08"
    assert (
        board_session._cpu_from_register(board_session._printable("0x410fd083\n\0\0"))
        == "ARM implementer 0x41 part 0xd08"
    )
    assert board_session._cpu_from_register("") == ""
    x86 = "vendor_id : GenuineIntel\ncpu family : 6\nmodel : 85\nmodel name : Xeon\n"
    assert board_cpu(x86, "aarch64") == "aarch64 emulated on Xeon (family 6 model 85)"
    assert board_cpu(x86, "x86_64") == "Xeon (family 6 model 85)"


def test_board_py_is_plain_about_the_danger() -> None:
    script = Path(cost_models.__file__).with_name("board.py")
    told = subprocess.run([sys.executable, "-I", script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "whoever reaches this port can run any code on this machine" in " ".join(told.split())
    refused = subprocess.run([sys.executable, "-I", script, "--tracker", "a:1"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "Add one, such as --key rpi4" in refused.stderr
