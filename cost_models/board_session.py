"""`python -m cost_models.board_session`: the side of TVM's RPC that measures, in a process that can be ended.

TVM's client waits for ever for a board that lost its power, and holds what it uploaded as long as an object of it
lives. Here every op has a session, a file name and a time limit of its own.
"""

from __future__ import annotations

import gc
import json
import statistics
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compiling import read_example
from .machine import arm_cpu, board_cpu
from .process import answer_lines
from .steady import RESOLUTION_MS, steady
from .timing import SWEEP_BYTES, runs_per_repeat
from .tvm_build.check import compare, to_channels_last
from .tvm_local import LIBRARY, MAIN

ROUNDS = 3  # of all repeats, until enough of them are steady
MIDR = "/sys/devices/system/cpu/cpu0/regs/identification/midr_el1"
MODEL = "/sys/firmware/devicetree/base/model"


_sessions: list[Any] = []  # at most one


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """First a connection: {} or {"unreachable": reason}. Then what is wanted of it, after which it is closed: {"about":
    ..., "ms": [...], "call_ms": ...} or {"failed": reason}."""
    if not _sessions:
        try:
            _sessions.append(_connect(request))
        except Exception as error:
            return {"unreachable": _reason(error)}
        return {}
    try:
        answer: dict[str, Any] = {"about": _about(_sessions[0])}
        if "folder" in request:
            answer |= _timed(_sessions[0], Path(request["folder"]), Path(request["nothing"]), request["repeats"])
        return answer
    except Exception as error:
        return {"failed": _reason(error)}
    finally:
        _sessions.clear()
        gc.collect()  # remote objects keep the session, and so the board


def _connect(request: dict[str, Any]) -> Any:
    from tvm import rpc

    if request["tracker"]:
        tracker = rpc.connect_tracker(*request["tracker"])
        return tracker.request(request["key"], session_timeout=request["timeout_s"], max_retry=1)
    return rpc.connect(*request["address"], key=request["key"], session_timeout=request["timeout_s"])


def _about(session: Any) -> dict[str, str]:
    """CPU, model, system and TVM's version of the board, as far as it tells: `board.py` does, other servers of TVM show
    files."""
    try:
        told = json.loads(str(session.get_function("pynas.board")()))
    except Exception:  # another server; what exactly TVM raises depends on its version
        return {"cpu": _cpu_from_register(_read(session, MIDR)), "model": _read(session, MODEL)}
    cpu = board_cpu(told["cpuinfo"], told["machine"])
    system = f"{told['system']} {told['machine']}"
    return {"cpu": cpu, "model": _printable(told["model"]), "system": system, "tvm": _printable(told.get("tvm", ""))}


def _read(session: Any, path: str) -> str:
    """A small text file of the board; empty if it cannot be read."""
    try:
        return _printable(bytes(session.download(path)).decode(errors="replace"))
    except Exception:  # TVM raises its own kinds for a missing file
        return ""


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text.replace("\n", " "))).strip()


def _cpu_from_register(text: str) -> str:
    """ARM's main identification register: implementer in bits 31 to 24, part in bits 15 to 4."""
    try:
        value = int(text, 16)
    except ValueError:
        return ""
    return arm_cpu(f"0x{value >> 24 & 0xFF:02x}", f"0x{value >> 4 & 0xFFF:03x}")


def _timed(session: Any, folder: Path, nothing: Path, repeats: int) -> dict[str, Any]:
    """ "ms": latency in ms without the call, `repeats` times or more; "call_ms": what was taken off.

    Each is the median of a few runs, with memory read in between. The call is what an op that computes next to nothing
    (in the folder `nothing`) takes in the same session.
    """
    op_ms, call_ms = _loaded(session, folder), _loaded(session, nothing)
    runs = runs_per_repeat(min(op_ms(3)))
    taken: list[float] = []
    calls: list[float] = []
    for _ in range(ROUNDS):
        for run_ms, medians in ((op_ms, taken), (call_ms, calls)):
            values = run_ms(repeats * runs)
            medians += [statistics.median(values[at : at + runs]) for at in range(0, len(values), runs)]
        if len(steady(taken)) >= repeats:
            break
    call = statistics.median(steady(calls))
    return {"ms": [max(RESOLUTION_MS, latency_ms - call) for latency_ms in taken], "call_ms": call}


def _loaded(session: Any, folder: Path) -> Callable[[int], list[float]]:
    """What runs a compiled op so many times on the board, after it gave torch's outputs there: latencies in ms."""
    import tvm
    from tvm import relax

    x, expected = map(to_channels_last, read_example(folder))
    library = f"op-{uuid.uuid4().hex}.so"
    session.upload(str(folder / LIBRARY), library)
    device = session.cpu(0)
    machine = relax.VirtualMachine(session.load_module(library), device)
    machine.set_input(MAIN, tvm.runtime.tensor(x, device))
    machine.invoke_stateful(MAIN)
    compare(machine.get_outputs(MAIN).numpy(), expected, "the op on the board")

    def runs_ms(number: int) -> list[float]:
        timer = machine.module.time_evaluator(
            "invoke_stateful", device, number=1, repeat=number, cache_flush_bytes=SWEEP_BYTES
        )
        return [1e3 * seconds for seconds in timer(MAIN).results]

    return runs_ms


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"


if __name__ == "__main__":
    answer_lines(_answer)
