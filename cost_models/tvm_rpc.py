"""Runner `tvm-rpc`: ops compiled by TVM, timed on the user's boards over TVM's RPC.

TVM's RPC has no password: whoever reaches a server's port can run any code on that board. Keep servers and trackers on
loopback, and reach them through ssh: `ssh -N -L 9190:127.0.0.1:9190 user@board`. `board.py` serves a board that way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .boards import Board, Failed, Unreachable, time_patiently
from .compiling import Compiler, Job, compile_all, nothing
from .names import unknown
from .process import Died, LineProcess
from .rpc_address import Address, boards_of, check_listening, check_server, parse, show
from .spec import OpSpec
from .timing import MIN_RUNS
from .tvm_build import SCHEDULE
from .tvm_build.targets import TARGETS
from .tvm_build.targets import target as find
from .tvm_local import check_one_thread, tvm_compiler, tvm_version

CONNECT_SECONDS = 60.0  # for loading TVM and a first answer

FAMILIES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "aarch64", "arm64": "aarch64", "armv7l": "armv7"}  # by uname


@dataclass
class TvmRpc:
    """Times ops on boards that serve TVM's RPC: fp32, batch 1, one thread.

    Every op is compiled here, checked against torch under emulation where that is installed, and on the board before it
    is timed there. What it takes to call TVM's virtual machine on the board, in the same session, is taken off rows and
    networks alike; the table notes it as call_ns. Boards must agree in CPU and version of TVM; one that is not served
    by board.py does not tell its version. Give either `address` or `tracker` with `key`.

    Raises:
        ValueError: options that do not fit together, before anything is tried.
    """

    threads: int = 1
    target: str = field(default="", metadata={"help": "CPU of the boards, for instance cortex-a72"})
    address: str = field(default="", metadata={"help": "host:port of a board, or several with commas"})
    tracker: str = field(default="", metadata={"help": "host:port of TVM's tracker, whose boards of one key are used"})
    key: str = field(default="", metadata={"help": "the key under which the boards were started"})
    timeout_s: int = field(default=120, metadata={"help": "seconds that one op may take on a board, with all repeats"})
    name: str = field(default="tvm-rpc", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default=f"{SCHEDULE}, call-1", kw_only=True)
    _kept: RpcBoard | None = field(default=None, init=False, repr=False, compare=False)
    _calls_ms: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_one_thread(self.name, self.threads)
        if not self.target:
            raise ValueError("Say for which CPU to compile, for instance --target cortex-a72.")
        if bool(self.address) == bool(self.tracker):
            raise ValueError(
                "Say where the board is: either --address host:port, or --tracker host:port with --key. "
                "Prepare a board with board.py (python -m cost_models.board --help)."
            )
        if self.tracker and not self.key:
            raise ValueError("A tracker lends boards by their key: add --key, as it was given to board.py.")
        if self.timeout_s < 1:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be at least 1.")
        self._addresses()

    def provenance(self) -> dict[str, dict[str, str | int]]:
        """See `Runner.provenance`. Talks to a board, once.

        Raises:
            Unreachable: dead tracker, wrong key, refused connection, busy board.
        """
        version = tvm_version()
        if self.target not in TARGETS:
            raise unknown("target", self.target, TARGETS)
        about = {name: text for name, text in self.about.items() if text}
        on_board = about.pop("tvm", "unknown")
        self._check_family(about.get("system", ""))
        calls = {"call_ns": round(1e6 * statistics.median(self._calls_ms))} if self._calls_ms else {}
        return {
            "machine": {"cpu": "unknown", **about, **calls},
            "software": {"apache-tvm": version, "apache-tvm-on-board": on_board},
            "build": {"target": self.target},
        }

    def _check_family(self, system: str) -> None:
        """Raise ValueError if the board says that it runs code of another family than the target's."""
        machine = system.split()[-1] if system else ""
        family = find(self.target).family
        if FAMILIES.get(machine, family) != family:
            raise ValueError(
                f"The target {self.target!r} is {family} code, but the board is a {machine}. "
                "Name its CPU with --target; run `lscpu` there to see it."
            )

    @property
    def compiler(self) -> Compiler:
        return tvm_compiler(self.target)

    def open(self, folder: Path) -> Path:
        """The folder itself: it is loaded and checked on the board."""
        return folder

    def boards(self) -> list[Board]:
        if self.tracker:
            number = boards_of(parse("tracker", self.tracker), self.key)
            return [self._first(), *(RpcBoard(self, None) for _ in range(number - 1))]
        return [self._first(), *(RpcBoard(self, address) for address in self._addresses()[1:])]

    def time_ms(self, module: Path, spec: OpSpec, repeats: int) -> list[float]:
        return time_patiently(self._first(), module, repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """See `Runner.net`. Always on the first board. Every call uploads the network again, and takes the median of a
        few latencies, among which an absurd one would be noticed."""
        folder = compile_all({0: Job("net", module, input_shape)}, self.compiler)[0]
        return lambda: statistics.median(time_patiently(self._first(), folder, MIN_RUNS))

    def called(self, call_ms: float) -> None:
        """Note what a call took on a board."""
        self._calls_ms.append(call_ms)

    def _first(self) -> RpcBoard:
        """The board that is asked when one is enough; the same until it is closed, for it keeps TVM loaded."""
        if self._kept is None or self._kept.closed:
            self._kept = RpcBoard(self, None if self.tracker else self._addresses()[0])
        return self._kept

    def _addresses(self) -> list[Address]:
        if self.tracker:
            return [parse("tracker", self.tracker)]
        return [parse("address", text) for text in self.address.split(",")]

    @cached_property
    def idle(self) -> Path:
        """The folder of what is timed to know what a call takes."""
        return compile_all({0: nothing("nothing")}, self.compiler)[0]

    @cached_property
    def about(self) -> dict[str, str]:
        """CPU, model, system and TVM's version of the first board, after all addresses were found to answer."""
        if self.tracker:
            boards_of(parse("tracker", self.tracker), self.key)
        else:
            for address in self._addresses():
                check_server(address, self.key)
        try:
            answer = self._first().ask({}, CONNECT_SECONDS)
        except Failed as error:
            raise Unreachable(f"{self._first().name} {error}. Start board.py there again.") from error
        about: dict[str, str] = answer["about"]
        return about


class RpcBoard:
    """A board, or whichever board the tracker lends next: a `Board`.

    Args:
        runner: says where, and which CPU it must have.
        address: of the board; None for the tracker's.
    """

    def __init__(self, runner: TvmRpc, address: Address | None) -> None:
        self._runner = runner
        self._address = address
        self._process = LineProcess("cost_models.board_session")
        self.closed = False
        where = show(address) if address else f"{runner.key!r} of the tracker {runner.tracker}"
        self.name = f"The board {where}"

    def time_ms(self, compiled: Path, repeats: int) -> list[float]:
        runner = self._runner
        request = {"folder": str(compiled), "nothing": str(runner.idle), "repeats": repeats}
        answer = self.ask(request, runner.timeout_s + CONNECT_SECONDS)
        self._check_alike(answer["about"])
        runner.called(answer["call_ms"])
        latencies: list[float] = answer["ms"]
        return latencies

    def _check_alike(self, about: dict[str, str]) -> None:
        """Raise ValueError if this board is another one than the runner's first."""
        for name, words in (("cpu", "the CPU"), ("tvm", "TVM")):
            found, first = (there.get(name) or "unknown" for there in (about, self._runner.about))
            if found != first:
                raise ValueError(
                    f"{self.name} has {words} {found!r}, another one {first!r}. Their rows must not be mixed; give "
                    "boards of different CPUs or versions of TVM different keys and device names."
                )

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Connect anew and have something done there.

        Raises:
            Unreachable: no connection.
            Failed: anything else.
        """
        runner = self._runner
        self._check()
        where = {
            "tracker": parse("tracker", runner.tracker) if runner.tracker else None,
            "address": self._address,
            "key": runner.key,
            "timeout_s": runner.timeout_s,
        }
        # A tracker lets a request wait even when the last board of its key is gone; so somebody has to keep looking.
        meanwhile = self._check if runner.tracker else None
        try:
            connected = self._process.ask(where, timeout_s if runner.tracker else CONNECT_SECONDS, meanwhile)
        except Died as error:
            raise Unreachable(f"{self.name} {error}. It may be busy: wait, or start board.py there again.") from error
        if "unreachable" in connected:
            raise Unreachable(f"{self.name} cannot be connected: {connected['unreachable']}.")
        try:
            answer = self._process.ask(request, timeout_s)
        except Died as error:
            raise Failed(str(error)) from error
        if "failed" in answer:
            raise Failed(f"failed: {answer['failed']}")
        return answer

    def _check(self) -> None:
        """Raise Unreachable if the board, or the tracker with such a board, is not there."""
        if self._address is None:
            boards_of(parse("tracker", self._runner.tracker), self._runner.key)
        else:
            check_listening("board", self._address)

    def close(self) -> None:
        self.closed = True
        self._process.kill()
