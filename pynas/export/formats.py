"""What an export format is, and which ones there are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pynas.registry import Registry

Answer = Callable[[Tensor], Tensor]
Write = Callable[[ExportedProgram, Path, Mapping[str, str]], str]
Quantise = Callable[[ExportedProgram, Path, Mapping[str, str], Sequence[Tensor]], str]


@dataclass(frozen=True)
class Exporter:
    """A format that can be written and run back; writing alone would be half an exporter.

    Args:
        name: As users type it.
        suffix: Of its files, with the dot.
        write: (program, path, metadata) -> version. Writes the one file `path` from a program that takes a batch of
            images (B, C, H, W), B dynamic, and answers with logits. Stores `metadata` in it. Says what version of the
            format came out ("opset 18"). A format of one image a run fixes the batch by `fixed_batch`.
        open: (path) -> function of a batch (B, C, H, W) that answers with logits (B, classes). Loads the file once,
            into the format's own runtime on the CPU, in one thread.
        extra: What both need, separated by spaces, as pip knows it; "" for nothing.
        modules: What `extra` installs, as it is imported; by default the same names.
        runtime: Package that runs the file, whose version is told beside latencies.
        runners: Of latency tables (`cost_models.RUNNERS`), those whose rows speak for this format's runtime.
        quantise: As `write`, with batches of images to calibrate by: weights in int8, one scale for each output
            channel, and activations in 8 bits, after training. None where the format cannot.
        beside: What a second file's name adds to that of the first ("" for one file alone): a script that runs it, say.
        target: CPU that the file is for.
        for_target: The exporter for another CPU by its name; None where a file serves all.
        elsewhere: Of a file for another machine: why it cannot be run here, or "" where an emulator runs it. None for
            files of this machine.
    """

    name: str
    suffix: str
    write: Write
    open: Callable[[Path], Answer]
    extra: str = ""
    modules: str = ""
    runtime: str = "torch"
    runners: tuple[str, ...] = ()
    quantise: Quantise | None = None
    beside: str = ""
    target: str = "host"
    for_target: Callable[[str], Exporter] | None = None
    elsewhere: Callable[[], str] | None = None

    def run(self, path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each batch (B, C, H, W)."""
        answer = self.open(path)
        return [answer(images) for images in batches]

    def missing(self) -> str:
        """What has to be given to pip before the format can be used; "" if it can be."""
        if self.modules:
            return "" if all(map(_installed, self.modules.split())) else self.extra
        return " ".join(name for name in self.extra.split() if not _installed(name.replace("-", "_")))

    @property
    def version(self) -> str:
        """Of the runtime, as "onnxruntime 1.20.0"."""
        return f"{self.runtime} {importlib.metadata.version(self.runtime)}"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def image_shape(program: ExportedProgram) -> tuple[int, ...]:
    """(C, H, W) of the images that a program takes."""
    (name,) = program.graph_signature.user_inputs
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    return tuple(int(side) for side in value.shape[1:])


def fixed_batch(program: ExportedProgram) -> ExportedProgram:
    """The program for one image a run, as devices run it; without this, its memory is planned for the largest batch."""
    with torch.no_grad():
        return torch.export.export(program.module(), (torch.zeros(1, *image_shape(program)),))


def one_by_one(answer: Answer) -> Answer:
    """Gives a batch to what takes one image at a time."""
    return lambda images: torch.cat([answer(image) for image in images.split(1)])


FORMATS: Registry[Exporter] = Registry("format")

# Formats whose packages cannot be installed beside the others': why, and what to type instead.
ELSEWHERE: dict[str, str] = {
    "tflite": (
        "litert-torch needs typing-extensions 4.12 and TVM's package 4.13 or newer, so it wants an environment of its "
        "own. Type: pynas export RUN --path net.pt2; python3 -m venv lite; lite/bin/pip install litert-torch "
        f"ai-edge-litert; lite/bin/python {Path(__file__).with_name('pt2_to_tflite.py')} net.pt2 net.tflite"
    ),
}
