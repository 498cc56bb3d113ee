"""PyTorch's own .pt2: the hand-over from which tools in other environments make their formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cost_models.torch_threads import torch_threads
from pynas.export.formats import FORMATS, Answer, Exporter


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    """Saves the program, with the metadata as the extra file "metadata.json" inside."""
    with path.open("wb") as file:  # given a path, torch complains about any suffix but .pt2
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return f"torch {torch.__version__}"


def open(path: Path) -> Answer:
    """The file as a function of images (B, C, H, W)."""
    with path.open("rb") as file:
        net = torch.export.load(file).module()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad(), torch_threads(1):
            logits: Tensor = net(images)
        return logits

    return answer


FORMATS.add("pt2", Exporter("pt2", ".pt2", write, open, runners=("torch",)))
