"""PyTorch's own .pt2: the hand-over from which tools in other environments make their formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pynas.export.formats import FORMATS, Exporter


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    """Saves the program, with the metadata as the extra file "metadata.json" inside."""
    with path.open("wb") as file:  # given a path, torch complains about any suffix but .pt2
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return f"torch {torch.__version__}"


def run(path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each batch (B, C, H, W)."""
    with path.open("rb") as file, torch.no_grad():
        net = torch.export.load(file).module()
        return [net(images) for images in batches]


FORMATS.add("pt2", Exporter("pt2", ".pt2", write, run))
