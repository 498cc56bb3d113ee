"""`python -m cost_models.board_session`: the side of TVM's RPC that measures, in a process that can be ended.

TVM's client waits for ever for a board that lost its power, and holds what it uploaded as long as an object of it
lives. Here every op has a session, a file name and a time limit of its own.
"""

from __future__ import annotations

import gc
import json
import statistics
import uuid
from pathlib import Path
from typing import Any

from .compiling import check_output, read_example
from .machine import arm_cpu, board_cpu
from .process import answer_lines
from .steady import steady
from .timing import SWEEP_BYTES, runs_per_repeat
from .tvm_local import LIBRARY, MAIN, channels_last

ROUNDS = 3  # of all repeats, until enough of them are steady
MIDR = "/sys/devices/system/cpu/cpu0/regs/identification/midr_el1"
MODEL = "/sys/firmware/devicetree/base/model"


_sessions: list[Any] = []  # at most one


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """First a connection: {} or {"unreachable": reason}. Then what is wanted of it, after which it is closed: {"about":
    ..., "ms": [...]} or {"failed": reason}."""
    if not _sessions:
        try:
            _sessions.append(_connect(request))
        except Exception as error:
            return {"unreachable": _reason(error)}
        return {}
    try:
        answer: dict[str, Any] = {"about": _about(_sessions[0])}
        if "folder" in request:
            answer["ms"] = _time_ms(_sessions[0], Path(request["folder"]), request["repeats"])
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
    """CPU, model and system of the board, as far as it tells: `board.py` does, other servers of TVM show files."""
    try:
        told = json.loads(str(session.get_function("pynas.board")()))
    except Exception:  # another server; what exactly TVM raises depends on its version
        return {"cpu": _cpu_from_register(_read(session, MIDR)), "model": _read(session, MODEL)}
    cpu = board_cpu(told["cpuinfo"], told["machine"])
    return {"cpu": cpu, "model": _printable(told["model"]), "system": f"{told['system']} {told['machine']}"}


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


def _time_ms(session: Any, folder: Path, repeats: int) -> list[float]:
    """Latency in ms, `repeats` times or more, each the median of a few runs with memory read in between."""
    import tvm
    from tvm import relax

    x, expected = map(channels_last, read_example(folder))
    library = f"op-{uuid.uuid4().hex}.so"
    session.upload(str(folder / LIBRARY), library)
    device = session.cpu(0)
    machine = relax.VirtualMachine(session.load_module(library), device)
    machine.set_input(MAIN, tvm.runtime.tensor(x, device))
    machine.invoke_stateful(MAIN)
    check_output("the board", machine.get_outputs(MAIN).numpy(), expected)

    def runs_ms(number: int) -> list[float]:
        timer = machine.module.time_evaluator(
            "invoke_stateful", device, number=1, repeat=number, cache_flush_bytes=SWEEP_BYTES
        )
        return [1e3 * seconds for seconds in timer(MAIN).results]

    runs = runs_per_repeat(min(runs_ms(3)))
    taken: list[float] = []
    for _ in range(ROUNDS):
        values = runs_ms(repeats * runs)
        taken += [statistics.median(values[at : at + runs]) for at in range(0, len(values), runs)]
        if len(steady(taken)) >= repeats:
            break
    return taken


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"


if __name__ == "__main__":
    answer_lines(_answer)
