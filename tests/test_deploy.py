"""One command from a run to files for a device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import copied
from test_exporters import PT2

import pynas
from pynas.api import images_of, weighted
from pynas.cli import main
from pynas.deploy import Deployment, Row, _best
from pynas.export import FORMATS, HostLatency, Report, tvm_runner
from pynas.registry import MissingExtra

TFLITE = Path(pynas.__file__).parent / "export" / "pt2_to_tflite.py"
BENCH = Path(__file__).parents[1] / "bench" / "emulated_net.py"


@pytest.fixture(scope="module")
def finished(unbroken: pynas.Run, tmp_path_factory: pytest.TempPathFactory) -> pynas.Run:
    return copied(unbroken, tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def made(finished: pynas.Run) -> Deployment:
    with pytest.MonkeyPatch.context() as patch:
        fields: dict[str, Any] = {"name": "absent", "suffix": ".absent", "extra": "no-such-package"}
        patch.setitem(FORMATS._things, "absent", replace(PT2, **fields))
        fields = {"name": "narrow", "suffix": ".narrow", "write": refuse}
        patch.setitem(FORMATS._things, "narrow", replace(PT2, **fields))
        return pynas.deploy(finished, formats="onnx,pt2,absent,narrow,tflite", repeats=3, quiet=True)


def refuse(*_: Any) -> str:
    raise ValueError("The operator 'sigmoid' has no kernel.")


def test_every_format_has_its_row(made: Deployment, finished: pynas.Run) -> None:
    assert [row.name for row in made.rows] == ["net.onnx", "net.int8.onnx", "net.pt2", "absent", "narrow", "tflite"]
    assert made.accuracy == finished.figures["test_accuracy"]
    assert made.images == finished.figures["test_images"]
    for row in made.rows[:3]:
        assert row.report is not None
        assert row.report.path == (finished.folder / "export" / row.name).resolve()
        assert row.report.path.stat().st_size == row.report.size_bytes
        assert row.latency is not None
        assert row.latency.repeats == 3
    exact, small, plain = (row.report for row in made.rows[:3])
    assert exact is not None
    assert small is not None
    assert plain is not None
    for report in (exact, plain):
        assert report.accuracy == made.accuracy
        assert report.relative_diff < 1e-5
    assert small.accuracy is not None


def test_what_cannot_be_written_says_why(made: Deployment) -> None:
    absent, narrow, tflite = (row.reason for row in made.rows[3:])
    assert absent == str(MissingExtra("Format 'absent'", "no-such-package"))
    assert narrow.endswith("The operator 'sigmoid' has no kernel.")
    assert "net.pt2" in tflite


def test_predictions_are_of_the_runs_device(made: Deployment, finished: pynas.Run) -> None:
    assert made.device == "board"
    assert made.rows[0].predicted_ms == pytest.approx(finished.figures["predicted_ms"])
    assert made.rows[1].predicted_ms is None  # no table has rows in int8
    assert not any(row.own for row in made.rows)  # nor is "roofline" a runtime


def test_json_says_the_same(made: Deployment) -> None:
    told = json.loads(made.path.read_text())
    assert told["best"] == made.best
    assert [row["file"] for row in told["rows"]] == [row.name for row in made.rows]
    assert told["rows"][0]["report"]["accuracy"] == made.accuracy
    assert told["rows"][0]["latency"]["median_ms"] == made.rows[0].latency.median_ms
    assert told["rows"][3]["report"] is None


def row(name: str, ms: float | None, own: bool = False, warning: str = "") -> Row:
    report = Report(Path(name), "pt2", "1", 1, 1, 0.0, 0.0, 1.0, warning=warning)
    latency = None if ms is None else HostLatency(ms, 0.1, 3, "cpu", "torch")
    return Row("pt2", "float32", "host", report, latency=latency, predicted_ms=1.0, own=own)


@pytest.mark.parametrize(
    ("rows", "here", "best"),
    [
        ([row("a", 2.0), row("b", 1.0)], True, "b"),
        ([row("a", 2.0), row("b", 1.0, warning="loses")], True, "a"),
        ([row("a", 2.0, own=True), row("b", 1.0)], True, "b"),
        ([row("a", 2.0, own=True), row("b", 1.0)], False, "a"),
        ([row("a", 2.0), row("b", 1.0)], False, "b"),
        ([row("a", None)], False, "a"),
        ([row("a", 1.0, warning="loses")], True, "a"),
    ],
)
def test_best(rows: list[Row], here: bool, best: str, finished: pynas.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pynas.cost_models.load_folder(finished.folder / "device")
    if here:
        module = sys.modules["pynas.deploy"]  # the function has the same name
        cpu = str(table.provenance.machine["cpu"])
        monkeypatch.setattr(module, "HERE", (table.provenance.runner,))
        monkeypatch.setattr(module, "cpu_model", lambda: cpu)
    assert _best(rows, table)[0].name == best


def test_command(finished: pynas.Run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--formats", "pt2", "--device", "cortex-a72", "--repeats", "2"]
    assert main(["deploy", str(finished.folder), *flags]) == 0
    out = capsys.readouterr().out
    for words in ("net.pt2", "best for cortex-a72: net.pt2", "deploy.json", "test images"):
        assert words in out
    assert json.loads((finished.folder / "export" / "deploy.json").read_text())["device"] == "cortex-a72"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--formats", "onx"], "Unknown format 'onx'. Did you mean 'onnx'"),
        (["--device", "cortex-a27"], "Did you mean 'cortex-a72'"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--max_drop", "3"], "max_drop must lie between 0 and 1"),
        (["--formats", "tflite"], "No format could be written. tflite: "),
    ],
)
def test_misuse(flags: list[str], words: str, finished: pynas.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", str(finished.folder), *flags]) == 1
    assert words in capsys.readouterr().err


def test_a_run_without_a_trained_net_names_the_command(searched: pynas.Run) -> None:
    with pytest.raises(FileNotFoundError, match="pynas retrain"):
        pynas.deploy(searched, quiet=True)


def test_export_tells_accuracy_and_latency(finished: pynas.Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = pynas.export(finished, format="pt2", repeats=2)
    assert report.accuracy == finished.figures["test_accuracy"]
    assert report.latency is not None
    assert "measured on" in capsys.readouterr().out


def test_export_without_the_images_says_so(
    finished: pynas.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("The folder of images is gone.")

    monkeypatch.setattr("pynas.api.open_data", gone)
    report = pynas.export(finished, str(tmp_path / "net.pt2"), repeats=0)
    assert (report.accuracy, report.latency, report.images) == (None, None, 4)
    assert "not compared on images of the run: The folder of images is gone." in capsys.readouterr().out


@pytest.mark.tvm
def test_the_script_beside_a_library_needs_no_pynas(finished: pynas.Run, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    report = pynas.export(finished, str(tmp_path / "net.so"), repeats=0, quiet=True)
    saved, config = weighted(finished, None, "trained")
    data = images_of(saved, config)
    pixels = data.test.pixels(range(3))
    np.save(tmp_path / "images.npy", pixels.permute(0, 2, 3, 1).contiguous().numpy())
    with torch.no_grad():
        expected = saved.net(data.normalise(pixels))
    command = [sys.executable, f"{report.path}.py", "images.npy", "logits.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"image 0: {data.classes[int(expected[0].argmax())]}" in done.stdout
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=1e-4, atol=1e-5)


def test_the_script_takes_images_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"input_size": [3, 4, 5], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.5]}
    monkeypatch.setattr(tvm_runner, "SETTINGS", settings)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    expected = (pixels / 255 - settings["mean"]) / settings["std"]
    np.testing.assert_allclose(tvm_runner.prepared(pixels), expected, rtol=1e-5, atol=1e-6)
    normalised = expected.astype(np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(tvm_runner.prepared(normalised), expected.astype(np.float32))
    with pytest.raises(SystemExit, match=r"must be uint8 \(N, 4, 5, 3\) or float32 \(N, 3, 4, 5\), not float64"):
        tvm_runner.prepared(expected)


@pytest.mark.tvm
def test_code_for_another_cpu(finished: pynas.Run) -> None:
    pytest.importorskip("tvm")
    made = pynas.deploy(finished, formats=["tvm"], device="cortex-a72", repeats=2, quiet=True)
    here, there = made.rows
    assert here.report is not None
    assert here.report.relative_diff < 1e-5
    assert (there.target, there.own) == ("cortex-a72", there.report is not None)
    if there.report is None:
        assert "sudo apt-get install gcc-aarch64-linux-gnu" in there.reason
    elif there.report.not_run:
        assert "qemu-user" in there.report.not_run
        assert made.best == here.name
    else:
        assert there.report.images == 20
        assert there.report.relative_diff < 1e-5
        assert made.best == there.name == "net.cortex-a72.so"


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [([], 2, "usage: "), (["gone.pt2", "net.tflite"], 1, "There is no file gone.pt2. Write")],
)
def test_the_script_for_tflite_says_how_it_is_used(flags: list[str], status: int, words: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TFLITE, *flags], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == status
    assert words in done.stderr


@pytest.mark.slow
@pytest.mark.board
@pytest.mark.tvm
@pytest.mark.timeout(900)
def test_the_library_runs_on_an_emulated_board(finished: pynas.Run, tmp_path: Path) -> None:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    folder = os.environ.get("PYNAS_EMULATED_BOARD", str(tmp_path / "board"))  # set it to keep the board's system
    command = [sys.executable, str(BENCH), str(finished.folder), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 test images: logits differ from torch's by" in done.stdout
    assert "20 of the same class" in done.stdout
