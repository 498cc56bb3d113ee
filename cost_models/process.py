"""A Python process that answers questions, one JSON line each: what it loads or crashes on stays out of this one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import IO, Any

LOOK_SECONDS = 1.0


class Died(RuntimeError):
    """The process ended, or did not answer in time and was killed."""


class LineProcess:
    """`python -m module`, started at the first question and again after it died.

    Args:
        module: calls `answer_lines` when it is run.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._said: IO[bytes] | None = None
        self._finish: Callable[[], Any] = lambda: None
        self._closed = False
        self._lock = threading.Lock()

    def ask(
        self, request: Mapping[str, Any], timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Send a question and wait for its answer.

        Args:
            request: the question.
            timeout_s: how long to wait.
            meanwhile: called every second of waiting; if it raises, the process is ended.

        Raises:
            Died: see there; the message ends with the last line that the process wrote to stderr.
        """
        with self._lock:
            if self._closed:
                raise Died("was stopped")
            process = self._process = self._process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then no answer comes either
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answer = self._wait(timeout_s, meanwhile)
        if answer is None:
            status, said = process.wait(), self._last_words()
            self._end()
            raise Died(f"crashed ({_reason(status)})" + (f": {said}" if said else ""))
        content: dict[str, Any] = json.loads(answer)
        return content

    def _wait(self, timeout_s: float, meanwhile: Callable[[], None] | None) -> str | None:
        """The next line; None when the process ended."""
        deadline = time.monotonic() + timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    return self._answers.get(timeout=min(left, LOOK_SECONDS))
                if meanwhile is not None:
                    meanwhile()
        except BaseException:
            self._end()
            raise
        self._end()
        raise Died(f"gave no answer in {timeout_s:.0f} s")

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._closed = True
        self._end()

    def _start(self) -> subprocess.Popen[str]:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._answers = queue.Queue()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # The same modules as here, wherever they were found; one thread, for two of these share the machine.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, who ends this one
        )
        threading.Thread(target=_pass_on, args=(process, self._answers), daemon=True).start()
        self._finish = weakref.finalize(self, _finish, process, self._said)  # when nobody asks any more, or at exit
        return process

    def _last_words(self) -> str:
        if self._said is None or self._said.closed:  # stopped from another thread
            return ""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _end(self) -> None:
        with self._lock:
            self._process = None
            self._finish()


def _finish(process: subprocess.Popen[str], said: IO[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    said.close()


def answer_lines(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """The other side: answer each line of stdin until it ends. Whatever else writes to stdout goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            out.write(json.dumps(answer(json.loads(line))) + "\n")
            out.flush()


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put(line)
    answers.put(None)


def _reason(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
