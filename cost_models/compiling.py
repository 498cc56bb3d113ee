"""Ops to files, before any is timed: in processes of their own, two at a time, kept in the user's cache.

What is kept is checked: a compile function raises for an op whose outputs differ from torch's, and an input with
torch's output lies beside the files, so that whoever loads them can check again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from .folders import xdg
from .process import Died, LineProcess

WORKERS = 2
START_SECONDS = 6.0  # of a worker, which imports torch
DONE = "done.json"
INPUT, EXPECTED = "input.npy", "expected.npy"
Report = Callable[[int, int, float], None]  # done, in all, seconds left


@dataclass(frozen=True)
class Compiler:
    """How an op becomes files.

    Args:
        entry: "module:function", called as function(module, input_shape, folder, **settings) in another process. It
            writes into `folder`, and raises where the outcome's outputs would differ from torch's.
        settings: plain values for `entry`.
        versions: of everything that shapes the files; part of the key in the cache, as settings are.
        seconds: what one op takes, roughly.
    """

    entry: str
    settings: Mapping[str, str | int]
    versions: Mapping[str, str]
    seconds: float = 3.0


@dataclass(frozen=True)
class Job:
    """A module to compile.

    Args:
        label: its name in folders and errors.
        module: of torch, in eval mode, BN folded.
        shape: of its input, (N, C, H, W) or (N, C).
    """

    label: str
    module: Any
    shape: tuple[int, ...]


def folder_of(job: Job, compiler: Compiler) -> Path:
    """Where a job's files lie or will lie: $XDG_CACHE_HOME/pynas/compiled/<label>-<hash>.

    The hash changes with the module's structure (not its weights, on which no latency depends), its classes' source,
    the shape, the compiler's settings and versions.
    """
    parts = [job.label, str(job.shape), compiler.entry, dict(compiler.settings), dict(compiler.versions)]
    told = json.dumps([*parts, _structure(job.module)], sort_keys=True)
    return cache() / f"{job.label[:80]}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def cache() -> Path:
    """The folder of all compiled ops. It may be deleted at any time."""
    return xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "compiled"


def compiled(job: Job, compiler: Compiler) -> bool:
    """Whether a job's files are there."""
    return _whole(folder_of(job, compiler))


def compile_all(
    jobs: Mapping[Any, Job], compiler: Compiler, report: Report | None = None, workers: int | None = None
) -> dict[Any, Path]:
    """Compile what the cache lacks. Interrupted, the same call goes on where it stood.

    Args:
        jobs: by any key.
        compiler: how.
        report: called after each job that was not in the cache.
        workers: processes; by default two where there are two cores.

    Returns:
        The folder of each job.

    Raises:
        ValueError: some could not be compiled or had other outputs than torch; all are named, the others are kept.
        OSError: the cache cannot be written.
    """
    folders = {key: folder_of(job, compiler) for key, job in jobs.items()}
    lacking = [key for key, folder in folders.items() if not _whole(folder)]
    if not lacking:
        return folders
    _tidy(cache())
    workers = min(workers or WORKERS, os.cpu_count() or 1, len(lacking))
    failures: dict[str, str] = {}
    begin = time.monotonic()
    with _workers(workers) as compile_one:
        pending = {compile_one(jobs[key], compiler, folders[key]): key for key in lacking}
        for done, future in enumerate(as_completed(pending), start=1):
            if (reason := future.result()) is not None:
                failures[jobs[pending[future]].label] = reason
            if report is not None:
                report(done, len(lacking), (len(lacking) - done) * (time.monotonic() - begin) / done)
    if failures:
        told = "; ".join(f"{label}: {reason}" for label, reason in sorted(failures.items())[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise ValueError(
            f"{len(failures)} of {len(lacking)} ops could not be compiled. {told}{more}. Nothing was timed; those that "
            "were compiled are kept."
        )
    return folders


def example(shape: tuple[int, ...]) -> Any:
    """The input that ops are checked and timed with: float32 in torch's layout."""
    import numpy as np

    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def read_example(folder: Path) -> tuple[Any, Any]:
    """A compiled op's input and torch's output for it, both in torch's layout."""
    import numpy as np

    return np.load(folder / INPUT), np.load(folder / EXPECTED)


def nothing(label: str) -> Job:
    """A job that computes next to nothing: what its code takes is what it takes to call any."""
    import torch
    from torch import nn

    module = nn.utils.skip_init(nn.Linear, 1, 1).eval()  # without drawing from torch's random generator
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    return Job(label, module, (1, 1))


class _workers:
    """A pool of worker processes, each with a thread of this one that feeds it."""

    def __init__(self, number: int) -> None:
        self._threads = ThreadPoolExecutor(number)
        self._idle: SimpleQueue[LineProcess] = SimpleQueue()
        self._all = [LineProcess("cost_models.compile_worker") for _ in range(number)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Callable[[Job, Compiler, Path], Future[str | None]]:
        return lambda job, compiler, folder: self._threads.submit(self._compile, job, compiler, folder)

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.kill()

    def _compile(self, job: Job, compiler: Compiler, folder: Path) -> str | None:
        """None, or why it failed."""
        worker = self._idle.get()
        try:
            return _compile_in(worker, job, compiler, folder)
        finally:
            self._idle.put(worker)


def _compile_in(worker: LineProcess, job: Job, compiler: Compiler, folder: Path) -> str | None:
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        (made / "module.pickle").write_bytes(_pickled(job.module))
        settings = dict(compiler.settings)
        request = {"folder": str(made), "shape": job.shape, "entry": compiler.entry, "settings": settings}
        try:
            answer = worker.ask(request, timeout_s=600)
        except Died as error:
            return str(error)
        if "error" in answer:
            return str(answer["error"])
        (made / "module.pickle").unlink()
        sizes = {path.name: path.stat().st_size for path in made.iterdir()}
        about = {"label": job.label, "shape": job.shape, **compiler.versions, "sizes": sizes}
        (made / DONE).write_text(json.dumps(about))
        if not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # of a version that was broken by hand
            made.rename(folder)
        return None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _whole(folder: Path) -> bool:
    """Whether all files of a compiled op are there in full: loading half a library would kill this process."""
    try:
        sizes = json.loads((folder / DONE).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _pickled(module: Any) -> bytes:
    try:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return pickle.dumps(module)
    data: bytes = cloudpickle.dumps(module)  # classes of a script or a notebook too
    return data


def _structure(module: Any) -> str:
    """Everything of a module that its code depends on, as text: parts, their plain attributes, shapes, source."""
    lines = []
    classes = {}
    for name, part in module.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in sorted(vars(part).items()) if not key.startswith("_")}
        kind = type(part)
        classes[f"{kind.__module__}.{kind.__qualname__}"] = kind
        lines.append(f"{name} {kind.__module__}.{kind.__qualname__} {plain}")
    lines += [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in module.state_dict().items()]
    lines += [_source(kind) for name, kind in sorted(classes.items()) if not name.startswith("torch.")]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(lines))


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in by hand
        return ""


def _tidy(folder: Path) -> None:
    """Make the cache's folder, remove what a killed run left a day ago, and find out whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".making-*"):
            if left.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"Compiled ops cannot be kept in {folder}: {error.strerror or error}.") from error
