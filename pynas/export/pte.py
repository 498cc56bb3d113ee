"""ExecuTorch's .pte with the XNNPACK delegate: for phones and boards, by PyTorch's own runtime."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pynas.export.formats import FORMATS, Answer, Exporter, fixed_batch, image_shape, one_by_one

METADATA = "metadata"  # a method of the file that answers with the metadata, JSON as text


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    """Writes method "forward" for one image a run, (1, C, H, W), and method "metadata"."""
    return _save(fixed_batch(program), path, metadata)


def quantise(program: ExportedProgram, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]) -> str:
    """The same in 8 bits, by torchao's quantisation after export: signed, symmetric weights with a scale for each
    output channel, activations with the range that calibration saw."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantiser = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(fixed_batch(program).module(), quantiser)
    with torch.no_grad():
        for batch in calibration:
            for image in batch.split(1):
                prepared(image)
        converted = convert_pt2e(prepared)
        small = torch.export.export(converted, (torch.zeros(1, *image_shape(program)),))
    return _save(small, path, metadata)


def _save(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    told: dict[str, Any] = {METADATA: json.dumps(dict(metadata))}
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=told)
    path.write_bytes(edge.to_executorch().buffer)
    return f"ExecuTorch {importlib.metadata.version('executorch')}, XNNPACK"


def open(path: Path) -> Answer:
    """The file as a function of images (B, C, H, W), one at a time inside."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def answer(image: Tensor) -> Tensor:
        logits: Tensor = method.execute([image.contiguous()])[0]
        return logits.clone()  # the next run writes to the same memory

    return one_by_one(answer)


FORMATS.add(
    "pte",
    Exporter(
        "pte",
        ".pte",
        write,
        open,
        extra="pynas[executorch]",
        modules="executorch torchao",
        runtime="executorch",
        quantise=quantise,
    ),
)
