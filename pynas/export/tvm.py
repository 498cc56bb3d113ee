"""TVM: a library of machine code for one CPU, by the kernels of `cost_models.tvm_build`, and a script that runs it.

The library holds everything, weights included, and needs TVM's runtime (the same wheel) where it runs. That of another
machine is linked by a cross-compiler and run back under qemu-user: its kernels in a static program that calls them in
the library's order, for TVM's runtime cannot be had there in seconds. `bench/emulated_net.py` runs the very library.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cost_models.names import unknown
from cost_models.tvm_build.targets import TARGETS
from pynas.export.formats import FORMATS, Answer, Exporter, fixed_batch, image_shape, one_by_one

SCRIPT = Path(__file__).with_name("tvm_runner.py")
SETTINGS = "SETTINGS: dict[str, Any] = "  # the line of the script that a file's own facts replace


def build(program: ExportedProgram, target: str) -> Any:
    """The program compiled for a target, one image a run: `cost_models.tvm_build.Built`."""
    from cost_models import tvm_build

    module = fixed_batch(program).module()
    for part in module.modules():
        part.training = False  # an exported program is what it is, but its modules say that they train
    return tvm_build.build(module, (1, *image_shape(program)), tvm_build.target(target))


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str], target: str = "host") -> str:
    """Links the library, and writes the script `<name>.py` beside it."""
    return _write(build(program, target), path, metadata)


def _write(built: Any, path: Path, metadata: Mapping[str, str]) -> str:
    built.library(path)
    facts = {key: json.loads(value) for key, value in metadata.items() if key != "torch"}
    settings = {"library": path.name, "target": built.target.name, **facts}
    script = SCRIPT.read_text(encoding="utf-8")
    assert f"{SETTINGS}{{}}" in script
    filled = script.replace(f"{SETTINGS}{{}}", f"{SETTINGS}{settings!r}").replace("net.so", path.name)
    path.with_name(f"{path.name}.py").write_text(filled, encoding="utf-8")
    return f"TVM {importlib.metadata.version('apache-tvm')}, {built.target.name}"


def open(path: Path) -> Answer:
    """A library for this machine as a function of images (B, C, H, W), one at a time inside."""
    import tvm

    from cost_models.tvm_build.check import to_channels_last
    from cost_models.tvm_local import without_notes

    with without_notes():
        machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    main = machine["main"]

    def answer(image: Tensor) -> Tensor:
        source = tvm.runtime.tensor(to_channels_last(image.numpy()), tvm.cpu())
        return torch.from_numpy(main(source).numpy()).flatten(1)

    return one_by_one(answer)


def for_target(name: str) -> Exporter:
    """The exporter for another CPU. Raises ValueError where there is no such target."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return _Foreign(name).exporter()


class _Foreign:
    """Writes for another machine, and runs what it wrote last under emulation."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.built: Any = None

    def exporter(self) -> Exporter:
        return _exporter(self.write, self.open, self.target, self._why_not)

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
        self.built = build(program, self.target)
        return _write(self.built, path, metadata)

    def open(self, path: Path) -> Answer:
        from cost_models.tvm_build.check import emulated, to_channels_last

        if self.built is None:
            raise ValueError(f"{path.name} is for {self.target}: copy it there, and run {path.name}.py.")
        run = emulated(self.built)
        return one_by_one(lambda image: torch.from_numpy(run(to_channels_last(image.numpy())).copy()).flatten(1))

    def _why_not(self) -> str:
        from cost_models import tvm_build

        return tvm_build.why_not(tvm_build.target(self.target))


def _exporter(
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], str],
    open: Callable[[Path], Answer],
    target: str = "host",
    elsewhere: Callable[[], str] | None = None,
) -> Exporter:
    return Exporter(
        "tvm",
        ".so",
        write,
        open,
        extra="pynas[tvm]",
        modules="tvm",
        runtime="apache-tvm",
        runners=("tvm-local", "tvm-rpc", "tvm-model"),
        beside=".py",
        target=target,
        for_target=for_target,
        elsewhere=elsewhere,
    )


FORMATS.add("tvm", _exporter(partial(write, target="host"), open))
