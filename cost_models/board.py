"""Serve this board to TVM's RPC: run this on the board that is to be measured.

The board needs Python and TVM's wheel, nothing of pynas: this file works alone. Copy it and start it there:

    scp board.py user@board:
    ssh user@board
    pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 cloudpickle psutil tornado
    python3 board.py --key rpi4

TVM's RPC has no password: whoever reaches the port can run any code on the board. The server therefore listens on the
board's own loopback, and the measuring machine reaches it through ssh:

    ssh -N -L 9190:127.0.0.1:9190 user@board     (and in another terminal)
    pynas measure --space fbnet --device rpi4 --runner tvm-rpc --address 127.0.0.1:9190 --key rpi4 --target cortex-a72

On a board with fast and slow cores, start it on the fast ones: taskset -c 4-7 python3 board.py --key phone
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

DANGER = "TVM's RPC has no password: whoever reaches this port can run any code on this machine."
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PAUSE_SECONDS = 2.0  # before the server is started again
UNUSABLE = 75  # exit status that another try would not change
INSTALL = "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 cloudpickle psutil tornado"


def main(args: list[str] | None = None) -> int:
    """Serve until Ctrl-C; a server that dies (of an op that crashes, say) is started again."""
    asked = _parser().parse_args(args)
    if asked.serve:
        return _serve(asked)
    if asked.tracker and not asked.key:
        sys.stderr.write("A tracker lends boards by their key. Add one, such as --key rpi4.\n")
        return 2
    _say(asked)
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while True:
            child = _start(sys.argv[1:] if args is None else args)
            status = child.wait()
            if status in (UNUSABLE, 2):
                return status
            sys.stderr.write(f"The server ended with status {status}; it is started again.\n")
            time.sleep(PAUSE_SECONDS)
    except KeyboardInterrupt:
        return 0
    finally:
        if child is not None:
            with contextlib.suppress(ProcessLookupError):  # ended already
                os.killpg(child.pid, signal.SIGKILL)  # with the sessions that it has forked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="board.py", description="Serve this board to TVM's RPC.", epilog=DANGER)
    parser.add_argument("--key", default="", help="what boards of this kind are called, such as rpi4")
    parser.add_argument("--port", type=int, default=9190, help="to listen on")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback are dangerous")
    parser.add_argument("--tracker", default="", help="host:port of a tracker that lends several boards")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _say(asked: argparse.Namespace) -> None:
    port = asked.port
    lines = [f"Serving TVM's RPC on {asked.host}:{port}" + (f" under the key {asked.key!r}." if asked.key else ".")]
    lines.append(DANGER)
    if asked.host in LOOPBACK:
        back = ""
        if asked.tracker:
            tracker_port = asked.tracker.rpartition(":")[2]
            back = f" -R {tracker_port}:127.0.0.1:{tracker_port}"
        lines.append("Only this machine reaches it. On the measuring machine, open a tunnel and leave it open:")
        lines.append(f"    ssh -N -L {port}:127.0.0.1:{port}{back} user@board")
    else:
        lines.append(f"It listens on {asked.host}, where others may reach it. Use 127.0.0.1 and ssh unless you trust")
        lines.append("everyone on that network.")
    lines.append("Ctrl-C ends it.")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _start(args: list[str]) -> subprocess.Popen[bytes]:
    """The server in a process group of its own; it ends when this process does, because then its stdin ends."""
    launcher = os.environ.get("BOARD_PYTHON", sys.executable)  # an emulated Python cannot start itself
    return subprocess.Popen(
        [launcher, str(Path(__file__).resolve()), *args, "--serve"],
        stdin=subprocess.PIPE,
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},  # without the compiler it loads faster and in less memory
        start_new_session=True,
    )


def _serve(asked: argparse.Namespace) -> int:
    """Run the server in this process until one of its sessions crashes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import tvm_ffi
        from tvm.rpc.server import PopenRPCServerState
    except ImportError as error:
        sys.stderr.write(f"TVM's RPC server cannot be loaded: {error}. Install it with: {INSTALL}\n")
        return UNUSABLE
    tvm_ffi.register_global_func("pynas.board", partial(_about, _version()))
    tracker = _address(asked.tracker) if asked.tracker else None
    try:
        server = PopenRPCServerState(
            asked.host, asked.port, asked.port + 1, tracker_addr=tracker, key=asked.key, silent=True
        )
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Cannot listen on {asked.host}:{asked.port}: {error}. Choose another --port.\n")
        return UNUSABLE
    sys.stdout.write("Ready.\n")
    sys.stdout.flush()
    server.thread.join()  # until a session crashes: the server cannot go on then
    os._exit(1)  # without waiting for what a crash may have left behind


def _version() -> str:
    """Of TVM on this board."""
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:  # built from source
        import tvm

        return str(tvm.__version__)


def _about(version: str) -> str:
    """What the measuring machine cannot find out through TVM: JSON of texts."""
    return json.dumps(
        {
            "tvm": version,
            "cpuinfo": _text("/proc/cpuinfo"),
            "model": _text("/proc/device-tree/model"),
            "machine": platform.machine(),
            "system": platform.system(),
        }
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or no such thing on this board
        return ""


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not by sys.stdin, whose lock a forked session would inherit
    os.killpg(0, signal.SIGKILL)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


if __name__ == "__main__":
    sys.exit(main())
