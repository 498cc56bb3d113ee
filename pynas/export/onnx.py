"""ONNX: one self-contained file for onnxruntime, TVM, OpenVINO and most vendors' tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pynas.export.formats import FORMATS, Exporter

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# What torch's translations are written in; newer opsets add nothing that these nets use, and fewer tools read them.
OPSET = 18


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    """Writes input "image" and output "logits" with a dynamic first axis "batch"; weights inside, metadata as props."""
    import onnx

    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
    )
    assert exported is not None  # None only comes from the old, tracing exporter
    model = exported.model_proto
    graph = model.graph
    # Torch notes on every node and value where it came from: much of a small file, and of no use to a runtime.
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del entry.metadata_props[:]
    model.producer_name, model.producer_version = "pynas", ""
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return f"opset {model.opset_import[0].version}"


def session(path: Path) -> InferenceSession:
    """The file in onnxruntime: on the CPU, in one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each batch (B, C, H, W)."""
    opened = session(path)
    return [torch.from_numpy(opened.run(["logits"], {"image": images.numpy()})[0]) for images in batches]


FORMATS.add("onnx", Exporter("onnx", ".onnx", write, run, extra="onnx onnxscript onnxruntime"))
