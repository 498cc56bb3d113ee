"""Every format: write, run back, compare, and leave nothing behind when that fails.

A format is tested here because it is registered.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pynas.export import FORMATS, Exporter, Report, export

PT2 = FORMATS.get("pt2")
SIZE = 16
CLASSES = 5


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Block(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1, and the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, groups=groups, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            Shuffle(groups) if groups > 1 else nn.Identity(),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True),
            nn.Conv2d(hidden, outputs, 1, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        Block(8, 8, 3, 1, 1),
        Block(8, 12, 5, 2, 2),
        Block(12, 12, 3, 1, 2),
        Pool(),
        nn.Dropout(),
        nn.Linear(12, CLASSES),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.3)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, CLASSES, 1), nn.BatchNorm2d(CLASSES), Pool())


def fake(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Registers the format "fake" for one test: .pt2 but for the fields that are given."""
    monkeypatch.setitem(FORMATS._things, "fake", replace(PT2, name="fake", suffix=".fake", **fields))


def images(number: int) -> Tensor:
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def marked(names: Iterable[str]) -> list[Any]:
    """Formats as parameters, each with the mark of its extra, where it has one."""
    extras = {name: FORMATS.get(name).modules.split()[:1] for name in names}
    return [pytest.param(name, marks=[getattr(pytest.mark, mark) for mark in marks]) for name, marks in extras.items()]


@pytest.fixture(scope="module", params=marked(FORMATS))
def exporter(request: pytest.FixtureRequest) -> Exporter:
    exporter = FORMATS.get(request.param)
    if missing := exporter.missing():
        pytest.skip(f"needs pip install {missing}")
    return exporter


@pytest.fixture(scope="module")
def written(exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Report]:
    net = small_net().train()
    path = tmp_path_factory.mktemp(exporter.name) / f"net{exporter.suffix}"
    report = export(
        net,
        path,
        input_size=SIZE,
        samples=images(70) * 3,
        labels=["ä", "b", "c", "d", "e"],
        mean=[0.1, 0.2, 0.3],
        std=[1.0, 2.0, 3.0],
    )
    return net, report


def test_file_answers_like_the_net(exporter: Exporter, written: tuple[nn.Module, Report]) -> None:
    net, report = written
    batches = [images(1), images(3), images(6)]
    answers = exporter.run(report.path, batches)
    net.eval()
    with torch.no_grad():
        for batch, answer in zip(batches, answers, strict=True):
            torch.testing.assert_close(answer, net(batch), rtol=1e-5, atol=1e-5)
    net.train()


def test_report(exporter: Exporter, written: tuple[nn.Module, Report], tmp_path: Path) -> None:
    report = written[1]
    beside = [report.path.with_name(f"{report.path.name}{exporter.beside}")] if exporter.beside else []
    assert sorted(report.path.parent.iterdir()) == [report.path, *beside]
    (tmp_path / "plain").touch()
    executable = 0o111  # as linkers make libraries
    assert report.path.stat().st_mode & ~executable == (tmp_path / "plain").stat().st_mode
    assert report.size_bytes == report.path.stat().st_size
    assert (report.format, report.images) == (exporter.name, 1 + 3 + 70)
    assert 0 < report.relative_diff < 1e-5
    assert report.max_abs_diff < 1e-5
    assert report.argmax_agreement == 1
    line = str(report)
    assert "\n" not in line
    for words in (report.path.name, report.version, "MB", "74 images", "arg-max agrees on 100.0%"):
        assert words in line


def test_nothing_of_this_machine_is_in_the_file(written: tuple[nn.Module, Report]) -> None:
    path = written[1].path
    contents = [file.read_bytes() for file in path.parent.iterdir()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
    for content in contents:
        assert Path(__file__).stem.encode() + b".py" not in content
        assert str(path.parent).encode() not in content


def test_exporting_is_quiet(
    exporter: Exporter, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    export(tiny_net(), tmp_path / f"net{exporter.suffix}", input_size=4)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_noise_of_a_format_is_kept_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any) -> str:
        sys.stdout.write("Translating ...")
        sys.stderr.write("Done")
        warnings.warn("soon deprecated", stacklevel=1)
        return PT2.write(*arguments)

    fake(monkeypatch, write=write)
    export(tiny_net(), tmp_path / "net.fake", input_size=4)
    assert capsys.readouterr() == ("", "")


def test_net_is_untouched(tmp_path: Path) -> None:
    net = tiny_net().train()
    before = copy.deepcopy(net.state_dict())
    export(net, tmp_path / "net.pt2", input_size=4)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("exporter", ["onnx"], indirect=True)
def test_onnx_file(written: tuple[nn.Module, Report]) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(written[1].path, load_external_data=False)
    assert not [node for node in model.graph.node if node.metadata_props]
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "Gemm"} <= kinds
    assert not kinds & {"BatchNormalization", "Identity", "Dropout", "Shape"}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["batch", 3, SIZE, SIZE], "logits": ["batch", CLASSES]}
    assert model.producer_name == "pynas"
    assert_metadata({prop.key: prop.value for prop in model.metadata_props})


@pytest.mark.parametrize("exporter", ["pt2"], indirect=True)
def test_pt2_file(written: tuple[nn.Module, Report]) -> None:
    extra = {"metadata.json": ""}
    program = torch.export.load(written[1].path, extra_files=extra)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert_metadata(json.loads(extra["metadata.json"]))


def assert_metadata(found: dict[str, str]) -> None:
    assert found.pop("torch") == torch.__version__
    assert {key: json.loads(value) for key, value in found.items()} == {
        "input_size": [3, SIZE, SIZE],
        "classes": CLASSES,
        "labels": ["ä", "b", "c", "d", "e"],
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
    }


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"input_size": 6}, (3, 6, 6)),
        ({"input_size": (4, 6)}, (3, 4, 6)),
        ({"input_size": [3, 4, 6]}, (3, 4, 6)),
        ({"samples": torch.zeros(1, 3, 4, 6, dtype=torch.uint8), "batch_sizes": (1,)}, (3, 4, 6)),
        ({"samples": torch.zeros(1, 3, 4, 6), "input_size": (4, 6), "batch_sizes": (2, 1)}, (3, 4, 6)),
    ],
)
def test_input_size(
    arguments: dict[str, Any], shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def opened(path: Path) -> Callable[[Tensor], Tensor]:
        answer = PT2.open(path)

        def run(batch: Tensor) -> Tensor:
            seen.append(tuple(batch.shape[1:]))
            return answer(batch)

        return run

    fake(monkeypatch, open=opened)
    export(tiny_net(), tmp_path / "net.fake", **arguments)
    assert set(seen) == {shape}


def test_other_types_and_layouts(tmp_path: Path) -> None:
    double = export(small_net().double(), tmp_path / "a.pt2", input_size=SIZE)
    assert double.relative_diff < 1e-13
    transposed = tiny_net().to(memory_format=torch.channels_last)
    assert export(transposed, tmp_path / "b.onnx", input_size=4).relative_diff < 1e-5


def test_format_overrules_a_strange_suffix(tmp_path: Path) -> None:
    report = export(tiny_net(), str(tmp_path / "net.bin"), input_size=4, format="pt2")
    assert (report.format, report.path) == ("pt2", (tmp_path / "net.bin").resolve())


def test_random_state_of_the_caller_stays(tmp_path: Path) -> None:
    net = tiny_net()
    state = torch.get_rng_state()
    export(net, tmp_path / "net.pt2", input_size=4)
    assert torch.equal(torch.get_rng_state(), state)
