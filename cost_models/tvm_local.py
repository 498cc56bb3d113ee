"""Runner `tvm-local`: ops compiled by TVM with this package's kernels, timed on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .compiling import Compiler, Job, cache, compile_all, read_example
from .machine import cpu_model, host
from .spec import OpSpec
from .timing import CallTimer, check_threads
from .tvm_build import SCHEDULE
from .tvm_build.tune import check_tune

LIBRARY, TILES = "op.so", "tiles.json"
MAIN = "main"


@dataclass
class TvmLocal:
    """Times ops as TVM compiles them for this machine: fp32, batch 1, one thread.

    Each op is compiled in a process of its own, run against torch, and kept in the user's cache. It is timed by the CPU
    time of the thread, with memory read between runs; what it takes to call TVM's virtual machine is taken off rows and
    networks alike (`timing.CallTimer`), and noted in the table as call_ns.

    With `tune`, the tiles of every layer are chosen by timing a few of them when it is compiled; see `tvm_build.tune`.
    Rows with other numbers of tiles never share a table.
    """

    threads: int = 1
    tune: int = field(default=0, metadata={"help": "tiles to try for each layer, such as 4; 0 for the best guess"})
    name: str = field(default="tvm-local", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default=f"{SCHEDULE}, call-1", kw_only=True)

    def __post_init__(self) -> None:
        check_one_thread(self.name, self.threads)
        check_tune(self.tune)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        calls = self.__dict__.get("_calls")  # known when something was timed
        return {
            "machine": {"cpu": cpu_model(), **host(), **(calls.note() if calls else {})},
            "software": {"apache-tvm": tvm_version()},
            "build": {"target": "host", **({"tune": self.tune} if self.tune else {})},
        }

    @property
    def compiler(self) -> Compiler:
        return tvm_compiler("host", self.tune)

    def open(self, folder: Path) -> Callable[[], Any]:
        """What runs the compiled op once, after it gave torch's outputs.

        Raises:
            ValueError: it did not.
        """
        import tvm

        from .tvm_build.check import compare, to_channels_last

        x, expected = map(to_channels_last, read_example(folder))
        with without_notes():
            machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(folder / LIBRARY)), tvm.cpu())
        tensor = tvm.runtime.tensor(x, tvm.cpu())
        compare(machine[MAIN](tensor).numpy(), expected, f"the op in {folder}")
        machine.save_function(MAIN, "timed", tensor)  # the time of looking things up by name is no part of an op
        timed: Callable[[], Any] = machine["timed"]
        return timed

    def time_ms(self, module: Callable[[], Any], spec: OpSpec, repeats: int) -> list[float]:
        return self._calls.runs_ms(module, repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """See `Runner.net`. Compiles the network (half a minute for 22 blocks) unless the cache has it."""
        run = self.open(compile_all({0: Job("net", module, input_shape)}, self.compiler)[0])
        return lambda: self._calls.runs_ms(run, 1)[0]

    @cached_property
    def _calls(self) -> CallTimer:
        return CallTimer.of(tvm_compiler("host"), self.open, self.threads)


def check_one_thread(runner: str, threads: int) -> None:
    """Raise ValueError unless threads is 1."""
    check_threads(threads)
    if threads != 1:
        raise ValueError(
            f"threads is {threads}, but the kernels of the runner {runner!r} use one thread: more would give the very "
            "same times under another name. The runners 'torch' and 'ort-local' use several."
        )


def tvm_version() -> str:
    """Of the installed TVM, without importing it.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("tvm") is None:
        raise ImportError("TVM is not installed. Install it with: pip install 'pynas[tvm]'")
    return importlib.metadata.version("apache-tvm")


def tvm_compiler(target: str, tune: int = 0) -> Compiler:
    """What compiles ops for a target of `tvm_build.targets`, with tiles chosen by timing `tune` of them, if any."""
    versions = {"apache-tvm": tvm_version(), "schedule": SCHEDULE}
    if target == "host":
        versions["cpu"] = cpu_model()
    if not tune:
        return Compiler("cost_models.tvm_local:compile_op", {"target": target}, versions)
    settings: dict[str, str | int] = {"target": target, "tune": tune}
    return Compiler("cost_models.tvm_local:compile_op", settings, versions, seconds=6.0 + tune)


def compile_op(module: Any, shape: tuple[int, ...], folder: Path, target: str, tune: int = 0) -> None:
    """Compile a module to a shared library in `folder`; called in another process by `compile_all`.

    Its outputs are compared with torch's here, under emulation for another machine, where that is installed. With
    `tune`, the chosen tiles lie beside the library as tiles.json, for readers.
    """
    from .tvm_build.build import compile_graph
    from .tvm_build.check import can_check, check
    from .tvm_build.graph import read_graph
    from .tvm_build.targets import target as find
    from .tvm_build.tune import tune_graph

    cpu, graph = find(target), read_graph(module, shape)
    choices = tune_graph(graph, cpu, tune, tiles_memory(tvm_compiler(target, tune))) if tune else []
    built = compile_graph(graph, cpu, {choice.layer: choice.tile for choice in choices})
    if can_check(cpu):
        check(built, module, shape)
    built.library(folder / LIBRARY)
    if tune:
        (folder / TILES).write_text(json.dumps([choice.note() for choice in choices], indent=1))


def tiles_memory(compiler: Compiler) -> Path:
    """The folder of the tiles that were chosen under a compiler's settings and versions."""
    told = json.dumps([dict(compiler.settings), dict(compiler.versions)], sort_keys=True)
    return cache() / f"tiles-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Drops TVM's "Scope Loaded", a warning that means nothing, from stderr; what else is written there is kept."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written.read().splitlines(keepends=True):
                if b"Scope Loaded" not in line:
                    os.write(2, line)
