"""Processes that judge networks of one supernet side by side, and stay for the next batch of networks."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cost_models.process import Died, LineProcess
from pynas.architecture import Architecture
from pynas.training.judge import Score

WORKER = "pynas.training.submodel_worker"
WORKER_TIMEOUT_S = 3600.0

Answers = queue.SimpleQueue[tuple[str, Score] | Exception]


class SideBySide:
    """Several processes with a copy of a supernet and its images each, from the first batch until `close`.

    Args:
        bundle: What they need, as `Submodels` makes it; tensors and plain values.
        processes: How many.
        place: Folder for the file that holds it, until `close`. What a killed process left there is removed. By default
            a temporary one, which a kill leaves behind.
    """

    def __init__(self, bundle: dict[str, Any], processes: int, place: Path | None = None) -> None:
        if place is None:
            folder = tempfile.mkdtemp(prefix="pynas-")
        else:
            folder = str(place)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._bundle = Path(folder) / "bundle.pt"
        torch.save(bundle, self._bundle)
        self._workers = [LineProcess(WORKER) for _ in range(processes)]

    def judge(self, architectures: Sequence[Architecture]) -> Iterator[tuple[str, Score]]:
        """Fingerprints and scores, as they are ready. All processes end where one fails, or nobody waits any more.

        Raises:
            ChildProcessError: A process failed twice at the same network.
        """
        todo: queue.SimpleQueue[Architecture] = queue.SimpleQueue()
        done: Answers = queue.SimpleQueue()
        for architecture in architectures:
            todo.put(architecture)
        asked = self._workers[: len(architectures)]
        threads = [threading.Thread(target=self._work, args=(worker, todo, done), daemon=True) for worker in asked]
        for thread in threads:
            thread.start()
        whole = False
        try:
            for _ in architectures:
                found = done.get()
                if isinstance(found, Exception):
                    raise found
                yield found
            whole = True
        finally:
            if not whole:
                self.close()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        """Ends the processes for good and removes their files."""
        for worker in self._workers:
            worker.kill()
        self._remove()

    def _work(self, worker: LineProcess, todo: queue.SimpleQueue[Architecture], done: Answers) -> None:
        try:
            while True:
                architecture = todo.get_nowait()
                request = {"bundle": str(self._bundle), "net": architecture.to_json()}
                try:
                    answer = worker.ask(request, WORKER_TIMEOUT_S)
                except Died:  # once may be bad luck, such as too little memory for a moment
                    answer = worker.ask(request, WORKER_TIMEOUT_S)
                done.put((architecture.fingerprint, Score(**answer)))
        except queue.Empty:
            return
        except Died as error:
            kept = "Too little memory, perhaps: what was judged before is kept, and the same run goes on from there."
            done.put(ChildProcessError(f"A process that judges networks failed twice: {error}. {kept}"))
        except Exception as error:  # to be raised where the scores are wanted
            done.put(error)
