"""Runner `tvm-local`: ops compiled by TVM with this package's kernels, timed on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compiling import Compiler, Job, check_output, compile_all, read_example
from .machine import cpu_model, host
from .spec import OpSpec
from .timing import check_threads, net_repeats_ms, runs_ms
from .tvm_build import SCHEDULE

LIBRARY = "op.so"
MAIN = "main"


@dataclass
class TvmLocal:
    """Times ops as TVM compiles them for this machine: fp32, batch 1, one thread.

    Each op is compiled in a process of its own, run against torch, and kept in the user's cache. It is timed the way
    `TorchHost` times: by the CPU time of the thread, with memory read between runs.
    """

    threads: int = 1
    name: str = field(default="tvm-local", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default=SCHEDULE, kw_only=True)

    def __post_init__(self) -> None:
        check_one_thread(self.name, self.threads)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {
            "machine": {"cpu": cpu_model(), **host()},
            "software": {"apache-tvm": tvm_version()},
            "build": {"target": "host"},
        }

    @property
    def compiler(self) -> Compiler:
        return tvm_compiler("host")

    def open(self, folder: Path) -> Callable[[], Any]:
        """What runs the compiled op once, after it gave torch's outputs.

        Raises:
            ValueError: it did not.
        """
        import tvm

        x, expected = map(channels_last, read_example(folder))
        with _without_notes():
            machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(folder / LIBRARY)), tvm.cpu())
        tensor = tvm.runtime.tensor(x, tvm.cpu())
        check_output(f"The compiled op in {folder}", machine[MAIN](tensor).numpy(), expected)
        machine.save_function(MAIN, "timed", tensor)  # the time of looking things up by name is no part of an op
        timed: Callable[[], Any] = machine["timed"]
        return timed

    def time_ms(self, module: Callable[[], Any], spec: OpSpec, repeats: int) -> list[float]:
        return runs_ms(module, self.threads, repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """See `Runner.net`. Compiles the network (half a minute for 22 blocks) unless the cache has it."""
        run = self.open(compile_all({0: Job("net", module, input_shape)}, self.compiler)[0])
        return lambda: runs_ms(run, self.threads, 1)[0]

    def time_net_ms(self, module: Any, input_shape: tuple[int, ...], repeats: int = 15) -> list[float]:
        """A whole network, timed as the rows of a table are; see `TorchHost.time_net_ms`."""
        return net_repeats_ms(self.net(module, input_shape), repeats)


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


def tvm_compiler(target: str) -> Compiler:
    """What compiles ops for a target of `tvm_build.targets`."""
    versions = {"apache-tvm": tvm_version(), "schedule": SCHEDULE}
    if target == "host":
        versions["cpu"] = cpu_model()
    return Compiler("cost_models.tvm_local:compile_op", {"target": target}, versions)


def compile_op(module: Any, shape: tuple[int, ...], folder: Path, target: str) -> None:
    """Compile a module to a shared library in `folder`; called in another process by `compile_all`.

    Its outputs are compared with torch's here, under emulation for another machine, where that is installed.
    """
    from .tvm_build.build import build
    from .tvm_build.check import can_check, check
    from .tvm_build.targets import target as find

    cpu = find(target)
    built = build(module, shape, cpu)
    if can_check(cpu):
        check(built, module, shape)
    built.library(folder / LIBRARY)


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
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


def channels_last(array: Any) -> Any:
    """An array in torch's layout (N, C, H, W) as (N, H, W, C); others as they are."""
    import numpy as np

    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array
