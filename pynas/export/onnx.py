"""ONNX: one self-contained file for onnxruntime, TVM, OpenVINO and most vendors' tools."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pynas.export.formats import FORMATS, Answer, Exporter

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# What torch's translations are written in; newer opsets add nothing that these nets use, and fewer tools read them.
OPSET = 18
INPUT, OUTPUT = "image", "logits"


def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str:
    """Writes input "image" and output "logits" with a dynamic first axis "batch"; weights inside, metadata as props."""
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
    )
    assert exported is not None  # None only comes from the old, tracing exporter
    return _save(exported.model_proto, path, metadata)


def quantise(program: ExportedProgram, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]) -> str:
    """The same in 8 bits, by onnxruntime's static quantisation in QDQ format.

    Weights are signed, with a scale for each output channel; activations are unsigned, with the range that calibration
    saw (MinMax). On x86 without VNNI, pairs of products of such numbers may saturate in 16 bits; the accuracy that the
    report tells is that of this machine.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory(prefix="pynas-") as name:
        plain, small = Path(name) / "plain.onnx", Path(name) / "int8.onnx"
        write(program, plain, {})
        with _quiet_log():
            quantize_static(
                plain,
                small,
                _Calibration(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return f"{_save(onnx.load(small), path, metadata)}, QDQ"


class _Calibration:
    """Batches as onnxruntime asks for them: one after the other, then None."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {INPUT: batch.numpy()}


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Drops what onnxruntime logs: that a model should be preprocessed, which these are."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _save(model: Any, path: Path, metadata: Mapping[str, str]) -> str:
    import onnx

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


def open(path: Path) -> Answer:
    """The file as a function of images (B, C, H, W)."""
    opened = session(path)
    return lambda images: torch.from_numpy(opened.run([OUTPUT], {INPUT: images.numpy()})[0])


FORMATS.add(
    "onnx",
    Exporter(
        "onnx",
        ".onnx",
        write,
        open,
        extra="onnx onnxscript onnxruntime",
        runtime="onnxruntime",
        runners=("ort-local",),
        quantise=quantise,
    ),
)
