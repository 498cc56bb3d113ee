"""An emulated 64-bit ARM board, measured over TVM's RPC from end to end: connect, upload, run, compare, time, resume.

    python bench/emulated_board.py [--folder DIR]

Makes a small Debian for aarch64 (mmdebstrap) with TVM's wheel, runs `cost_models/board.py` in it under qemu-user, and
measures ops of `fbnet_tiny` there as if it were a board. In the middle the board is killed and started again. The times
are those of an emulator: they prove that the plumbing works and say nothing about the speed of any ARM core.

Needs Linux with: apt-get install qemu-user mmdebstrap gcc-aarch64-linux-gnu (on other systems than Debian also
debian-archive-keyring), and pip install 'pynas[tvm]'. Takes 2 to 4 minutes, of which the first time one for the system.
Exits with 77 and the reason where a tool is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil

import cost_models
from cost_models import boards, rpc_address
from cost_models.folders import xdg
from cost_models.plan import Incomplete, plan
from cost_models.runners import make_runner
from pynas.plan import deployed, make_space, space_specs

TOOLS = {
    "qemu-aarch64": "qemu-user",
    "mmdebstrap": "mmdebstrap",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
}
SUITE, PYTHON = "bookworm", "3.11"
DEBIAN = "python3,libpython3.11-stdlib,libstdc++6,zlib1g,libzstd1,libxml2,libffi8"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
WHEELS = ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1", "numpy", "psutil", "ml_dtypes", "cloudpickle")
WHEELS += ("tornado", "typing_extensions")
KEY, TARGET = "emulated", "cortex-a72"
REPEATS = 3
START_SECONDS = 240
SKIPPED = 77


def why_not() -> str:
    """Why this cannot run here; empty if it can."""
    missing = [package for command, package in TOOLS.items() if shutil.which(command) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; try: sudo apt-get install {' '.join(missing)}"
    return "" if importlib.util.find_spec("tvm") else "TVM is not installed; try: pip install 'pynas[tvm]'"


def prepare(folder: Path) -> Path:
    """Make the board's system in a folder, unless it is there already; returns what starts its Python."""
    folder.mkdir(parents=True, exist_ok=True)
    system, site = folder / "rootfs", folder / "site"
    if not system.is_dir():
        print("making the board's system (mmdebstrap) ...", flush=True)
        with _made(system) as made:
            command = ["mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64", f"--include={DEBIAN}"]
            _run([*command, SUITE, str(made)])
    if not site.is_dir():
        print("fetching TVM's wheels for aarch64 (pip) ...", flush=True)
        with _made(site) as made, tempfile.TemporaryDirectory() as wheels:
            platforms = [f"--platform={name}_aarch64" for name in PLATFORMS]
            where = ["--only-binary=:all:", *platforms, f"--python-version={PYTHON}", "-d", wheels]
            _run([sys.executable, "-m", "pip", "download", "--quiet", *where, *WHEELS])
            for wheel in Path(wheels).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(made)
    launcher = folder / "python.sh"
    python = system / "usr" / "bin" / f"python{PYTHON}"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec qemu-aarch64 -L "{system}" "{python}" "$@"\n')
    launcher.chmod(0o755)
    return launcher


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete."""
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    yield making
    making.rename(folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with status {done.returncode}:\n{done.stderr.strip()}")


class Board:
    """`board.py` in the emulator, and a tracker; both on loopback."""

    def __init__(self, launcher: Path) -> None:
        self._launcher = launcher
        self._port, self.tracker_port = free_port(), free_port()
        tracker = ["tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(self.tracker_port)]
        tracker += ["--port-end", str(self.tracker_port + 1), "--silent"]
        self._tracker = subprocess.Popen([sys.executable, "-m", *tracker])
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Switch the board on; returns the seconds until the tracker knows it."""
        script = Path(cost_models.__file__).with_name("board.py")
        where = ["--port", str(self._port), "--key", KEY, "--tracker", f"127.0.0.1:{self.tracker_port}"]
        env = {**os.environ, "BOARD_PYTHON": str(self._launcher)}
        begin = time.monotonic()
        self._server = subprocess.Popen([sys.executable, str(script), *where], env=env, stdout=subprocess.DEVNULL)
        while time.monotonic() - begin < START_SECONDS:
            try:
                rpc_address.boards_of(("127.0.0.1", self.tracker_port), KEY)
            except boards.Unreachable:
                time.sleep(0.5)
            else:
                return time.monotonic() - begin
        sys.exit(f"The emulated board did not start within {START_SECONDS} s.")

    def kill(self) -> None:
        """Cut its power."""
        if self._server is not None:
            for process in [*psutil.Process(self._server.pid).children(recursive=True), self._server]:
                process.send_signal(signal.SIGKILL)
            self._server.wait()
            self._server = None

    def close(self) -> None:
        self.kill()
        for process in [*psutil.Process(self._tracker.pid).children(recursive=True), self._tracker]:
            process.kill()
        self._tracker.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(board: Board, folder: Path, number: int, kill_after: int | None = None) -> cost_models.LatencyTable:
    """Measure some ops of `fbnet_tiny`, and cut the board's power after so many rows."""
    space = make_space("fbnet_tiny", {})
    specs = sorted(space_specs(space), key=lambda spec: (spec.kind != "mbconv", spec.macs, spec))
    others = [spec for spec in specs if spec.kind not in ("mbconv", "skip")]
    chosen = [*others, *(spec for spec in specs if spec.kind == "mbconv")][:number]

    def kill(done: int, total: int, seconds_left: float) -> None:
        if kill_after is not None and done == kill_after * REPEATS:
            print(f"cutting the board's power after {kill_after} rows", flush=True)
            board.kill()

    runner = make_runner("tvm-rpc", target=TARGET, tracker=f"127.0.0.1:{board.tracker_port}", key=KEY)
    name = "emulated-board"
    work = plan(chosen, build=deployed, runner=runner, folder=folder, name=name, repeats=REPEATS)
    print(work, flush=True)
    return work.run(report=kill)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cached = xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "emulated-aarch64"
    parser.add_argument("--folder", type=Path, default=cached, help=f"keeps the board's system; default {cached}")
    parser.add_argument("--ops", type=int, default=8, help="how many to measure")
    asked = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return SKIPPED
    boards.PAUSES_S = (0.5, 1.0)  # nobody will switch this board on again while it is waited for
    board = Board(prepare(asked.folder.absolute()))
    try:
        print(f"the board is up after {board.start():.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report(*interrupted(board, Path(folder), asked.ops))
    finally:
        board.close()
    return 0


def interrupted(board: Board, folder: Path, number: int) -> tuple[cost_models.LatencyTable, cost_models.LatencyTable]:
    """Measure with a break; returns the table at the break and at the end."""
    try:
        measure(board, folder, number, kill_after=2)
    except Incomplete as error:
        print(f"the error: {error}")
    else:
        sys.exit("The board was killed, but nobody noticed.")
    before = cost_models.load_folder(folder)
    print(f"the board is up again after {board.start():.0f} s", flush=True)
    after = measure(board, folder, number)
    lost = [spec.key for spec, row in before.rows.items() if after.rows.get(spec) != row]
    if lost or len(after.rows) != number:
        sys.exit(f"Rows were lost or changed: {lost}; {len(after.rows)} of {number} are there.")
    return before, after


def report(before: cost_models.LatencyTable, after: cost_models.LatencyTable) -> None:
    print(f"\n{'op':<44}{'emulated ms':>12}{'spread':>9}  measured")
    for spec, row in after.rows.items():
        when = "before the break" if spec in before.rows else "after the break"
        print(f"{spec.key:<44}{row.median_ms:>12.3f}{row.spread_ms / row.median_ms:>9.1%}  {when}")
    print(f"\non: {after.provenance.machine['cpu']}")
    print("Outputs were compared with torch's on the board before each timing.")
    print("These are an emulator's times: they say nothing about the speed of any ARM core.")


if __name__ == "__main__":
    sys.exit(main())
