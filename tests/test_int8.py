"""Quantisation after training: what it writes, what it loses, and that nobody overlooks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_exporters import SIZE, fake, images, marked, small_net, tiny_net
from torch import Tensor

from pynas.export import FORMATS, Exporter, Quantising, Report, export
from pynas.export.judged import calibration_batches, file_accuracy
from pynas.training.data import Data, open_data

FORMATS_IN_INT8 = [name for name, exporter in FORMATS.items() if exporter.quantise is not None]


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=SIZE, limit=200)


@pytest.fixture(scope="module", params=marked(FORMATS_IN_INT8))
def small(
    request: pytest.FixtureRequest, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Exporter, Report]:
    exporter = FORMATS.get(request.param)
    if missing := exporter.missing():
        pytest.skip(f"needs pip install {missing}")
    path = tmp_path_factory.mktemp("int8") / f"net.int8{exporter.suffix}"
    how = Quantising(images=70, max_drop=1.0)
    net = torch.nn.Sequential(small_net(), torch.nn.Linear(5, 10))
    return exporter, export(net, path, data=data, precision="int8", quantising=how, repeats=3)


def test_file_and_figures(small: tuple[Exporter, Report], data: Data) -> None:
    exporter, report = small
    assert report.precision == "int8"
    assert (report.test_images, report.images) == (len(data.test), 64)
    assert report.accuracy == file_accuracy(exporter.open(report.path), data)
    assert report.relative_diff is not None
    assert 1e-5 < report.relative_diff < 0.5  # quantised, and still the same net
    assert report.drop == pytest.approx(report.net_accuracy - report.accuracy)
    assert report.latency is not None
    assert report.latency.repeats == 3
    assert 0 < report.latency.median_ms < 1000
    assert report.latency.runtime.startswith(exporter.runtime)
    told = json.loads(json.dumps(report.note()))
    assert told["drop"] == report.drop
    assert "int8" in str(report)


@pytest.mark.parametrize("small", ["onnx"], indirect=True)
def test_weights_have_a_scale_for_each_channel(small: tuple[Exporter, Report]) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(small[1].path).graph
    kinds = {tensor.name: tensor for tensor in graph.initializer}
    weights = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    signed = [name for name in weights if name in kinds and kinds[name].data_type == onnx.TensorProto.INT8]
    assert len(signed) == 1 + 3 * 3 + 2  # every convolution and linear layer
    convolutions = [name for name in signed if len(kinds[name].dims) == 4]
    assert all(kinds[weights[name]].dims == [kinds[name].dims[0]] for name in convolutions)
    assert "input_size" in {prop.key for prop in onnx.load(small[1].path).metadata_props}


def test_a_large_loss_is_a_loud_warning(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pt2 = FORMATS.get("pt2")
    fake(
        monkeypatch,
        quantise=lambda program, path, metadata, calibration: pt2.write(program, path, metadata),
        open=lambda path: lambda batch: pt2.open(path)(batch).roll(1, 1),  # every class becomes the next
    )
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 10))
    with torch.no_grad():
        centre = torch.stack([_mean(data, label) for label in range(10)])
        net[1].weight.copy_(centre.flatten(1))
        net[1].bias.copy_(-centre.flatten(1).square().sum(1) / 2)
    asked = {"data": data, "precision": "int8", "format": "fake"}
    report = export(net, tmp_path / "a.fake", **asked)
    assert report.net_accuracy > 0.7
    assert report.drop > 0.5
    assert "points of test accuracy" in report.warning
    assert "Do not ship it unseen" in report.warning
    assert export(net, tmp_path / "b.fake", **asked, quantising=Quantising(max_drop=1.0)).warning == ""


def _mean(data: Data, label: int) -> Tensor:
    (batch,) = calibration_batches(data, 64)
    return batch[data.weights.labels[:64] == label].mean(0)


def test_calibration_takes_training_images_alone(data: Data) -> None:
    found = torch.cat(calibration_batches(data, 100))
    assert len(found) == 100
    assert torch.equal(found, data.normalise(data.weights.pixels(range(100))))
    assert len(torch.cat(calibration_batches(data, 10**6))) == len(data.weights)


def test_samples_calibrate_where_there_is_no_data(tmp_path: Path) -> None:
    report = export(tiny_net(), tmp_path / "net.onnx", samples=images(8), precision="int8")
    assert report.accuracy is None
    assert report.warning == ""
    assert report.relative_diff < 0.5
