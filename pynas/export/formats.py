"""What an export format is, and which ones there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from pynas.registry import Registry


@dataclass(frozen=True)
class Exporter:
    """A format that can be written and run back; writing alone would be half an exporter.

    Args:
        name: As users type it.
        suffix: Of its files, with the dot.
        write: (program, path, metadata) -> version. Writes the one file `path` from a program that takes a batch of
            images (B, C, H, W), B dynamic, and answers with logits. Stores `metadata` in it. Says what version of the
            format came out ("opset 18").
        run: (path, batches) -> logits of each. Loads the file once, into the format's own runtime on the CPU.
        extra: Packages that both need, separated by spaces, as pip knows them; "" for none.
    """

    name: str
    suffix: str
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], str]
    run: Callable[[Path, Sequence[Tensor]], list[Tensor]]
    extra: str = ""


FORMATS: Registry[Exporter] = Registry("format")
