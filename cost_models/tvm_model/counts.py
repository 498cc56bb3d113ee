"""How often each basic block of a program runs: counted by the program itself, on an ARM machine or under QEMU."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 600


def emulator() -> list[str]:
    """The command before an AArch64 program; empty where this machine runs it itself.

    Raises:
        RuntimeError: no emulator is installed; says what to install.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return []
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError(
        "ARM code is run once to count its steps, and this machine cannot run it: qemu-aarch64 is not installed. "
        "Install it with: apt-get install qemu-user"
    )


def count(program: Path, blocks: int, arguments: Sequence[str] = ()) -> list[int]:
    """Run an instrumented program once, in its own folder, and read its counters.

    Args:
        program: a static executable of `cost_models.tvm_model.blocks.instrument`'s text. It takes `arguments` and the
            name of the file that it writes its counters to.
        blocks: how many counters it has.
        arguments: those before that name.

    Raises:
        RuntimeError: it failed, ran for more than ten minutes, or left no counters.
    """
    found = program.with_name("counts.bin").absolute()
    command = [*emulator(), str(program.absolute()), *arguments, str(found)]
    try:
        done = subprocess.run(command, cwd=program.parent, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{program} ran for more than {TIMEOUT_S} s and was stopped.") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise RuntimeError(f"{program} failed with exit code {done.returncode}: {said or 'it said nothing'}")
    data = found.read_bytes() if found.is_file() else b""
    if len(data) != 8 * blocks:
        raise RuntimeError(f"{program} left {len(data)} bytes of counters; {8 * blocks} were expected.")
    return list(struct.unpack(f"<{blocks}Q", data))
