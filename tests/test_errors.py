"""Bad input: one clear sentence, in time, and nothing half written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import QUICK, SPACE
from tables import write_table
from torch import nn

import cost_models
import pynas
from pynas import FBNet, Recipe, Run


@pytest.fixture
def device() -> str:
    return write_table("board", options={**SPACE, "classes": 10})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith((".", ")")) or ": pynas " in text, text  # a sentence, or the command to type next
    assert "\n" not in text, text
    assert 20 < len(text) < 500, text
    return text


def image_folder(root: Path, classes: int = 3, images: int = 12) -> Path:
    random = np.random.default_rng(0)
    for name in "abcdefgh"[:classes]:
        (root / name).mkdir(parents=True)
        for number in range(images):
            pixels = random.integers(0, 255, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def empty_class(root: Path) -> str:
    (image_folder(root) / "empty").mkdir()
    return str(root)


def corrupt_image(root: Path) -> str:
    broken = image_folder(root) / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return str(root)


def one_class(root: Path) -> str:
    return str(image_folder(root, classes=1))


def no_images(root: Path) -> str:
    root.mkdir()
    return str(root)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"space": "fbnet_tny"}, "Did you mean 'fbnet_tiny'"),
    ({"strategy": "fbnt"}, "Did you mean 'fbnet'"),
    ({"strategy": "fbnet", "preset": "papr"}, "Did you mean 'paper'"),
    ({"preset": "quick"}, "preset goes with a strategy's name"),
    ({"device": "bord"}, "Did you mean 'board'"),
    ({"device": "../board"}, "device"),
    ({"latency_ms": 1e-6}, "the cheapest costs"),
    ({"latency_ms": -3.0}, "positive number of ms"),
    ({"latency_ms": float("nan")}, "positive number of ms"),
    ({"latency_ms": "fast"}, "'auto' or none"),
    ({"data": "digit"}, "digits"),
    ({"data": "./nowhere"}, "nowhere"),
    ({"data": "cifar10"}, "cifar10"),
    ({"slack": 0.0}, "slack"),
    ({"seed": -1}, "seed"),
    ({"baseline": -1}, "baseline"),
    ({"threads": 0}, "threads"),
    ({"amp": "fp16"}, "'off' or 'bf16'"),
    ({"limit": 3}, "limit"),
    ({"limit": "a"}, "limit"),
    ({"seed": 10**20}, "seed"),
    ({"data": None}, "data must be a name or a path"),
    ({"recipe": {"epochs": 3}}, "recipe must be a pynas.Recipe"),
    ({"space_options": {"stages": 5}}, "do not fit space"),
    ({"space_options": {"name": "x"}}, "no option 'name'"),
    ({"augment": "flip"}, "augment"),
    ({"on_corrupt": "ignore"}, "on_corrupt"),
    ({"batch_size": 1}, "batch_size >= 2"),
    ({"epochs": 1}, "warmup_epochs < epochs"),
    ({"space_options": {"depth": 3}}, "no option 'depth'"),
    ({"space_options": {"input_size": 1}}, "too small"),
    ({"space_options": {"stages": [[8, 1, 0]]}}, "triples"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS, ids=lambda value: str(value)[:40])
def test_wrong_settings(settings: dict[str, Any], says: str, device: str, out: Path) -> None:
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pynas.search(**{**QUICK, "device": device, "out": str(out), **settings})
    one_sentence(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [(empty_class, "empty"), (corrupt_image, "3.png"), (one_class, "class"), (no_images, "images")],
)
def test_bad_image_folders(make: Callable[[Path], str], says: str, device: str, out: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "images")
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pynas.search(**{**QUICK, "device": device, "out": str(out), "data": data, "limit": None})
    one_sentence(caught.value)
    assert not out.exists()


def edit_line(path: Path, number: int, change: Callable[[str], str]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[number] = change(lines[number])
    path.write_text("".join(lines))


TABLES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: edit_line(f / "latency.csv", 3, lambda line: line.replace("conv", "cnv")), "line 4"),
    (lambda f: edit_line(f / "latency.csv", 3, lambda line: ",".join(line.split(",")[:-2]) + "\n"), "line 4"),
    (lambda f: edit_line(f / "latency.csv", 0, lambda line: line.replace("kind", "sort")), "header"),
    (lambda f: (f / "latency.csv").write_text((f / "latency.csv").read_text()[:-20]), "latency.csv"),
    (lambda f: (f / "latency.csv").write_text(""), "latency.csv"),
    (lambda f: (f / "latency.csv").unlink(), "latency.csv"),
    (lambda f: (f / "device.toml").unlink(), "device.toml"),
    (lambda f: (f / "device.toml").write_text("name = "), "device.toml"),
]


@pytest.mark.parametrize(("damage", "says"), TABLES, ids=range(len(TABLES)))
def test_broken_tables(damage: Callable[[Path], object], says: str, device: str, out: Path) -> None:
    folder = cost_models.device_folder(device)
    damage(folder)
    before = files(folder)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pynas.search(device=device, out=str(out), **QUICK)
    one_sentence(caught.value)
    assert not out.exists()
    assert files(folder) == before


def test_unknown_op_names_the_measuring_command(device: str, out: Path) -> None:
    """A table without any block cannot price one; a strict table refuses what it would have to fit."""
    path = cost_models.device_folder(device) / "latency.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "mbconv" not in line))
    with pytest.raises(ValueError, match="pynas measure --space SPACE --device board") as caught:
        pynas.search(device=device, out=str(out), **QUICK)
    one_sentence(caught.value)
    path.write_text("".join(lines))
    settings = {**QUICK, "space_options": {**SPACE, "width": 2.0}}
    with pytest.raises(ValueError, match="strict table") as caught:
        pynas.search(device=device, out=str(out), strict_table=True, **settings)
    one_sentence(caught.value)
    assert not out.exists()


def test_out_cannot_be_written(device: str, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("here first")
    for out in (blocked, blocked / "runs"):
        with pytest.raises(OSError, match="Choose another folder with --out") as caught:
            pynas.search(device=device, out=str(out), **QUICK)
        one_sentence(caught.value)
    assert blocked.read_text() == "here first"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB: room for the beginning of a run only."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tiny file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(device: str, full_disk: Path) -> None:
    with pytest.raises(OSError, match="the disk is full") as caught:
        pynas.search(device=device, out=str(full_disk / "runs"), **QUICK)
    one_sentence(caught.value)
    left = files(full_disk)
    assert not [name for name in left if name.endswith(".tmp")]
    assert not [name for name, content in left.items() if not content]


@pytest.fixture
def finished(searched: Run) -> Run:
    return searched


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no run at") as caught:
        pynas.search(resume=str(tmp_path), quiet=True)
    one_sentence(caught.value)
    assert not files(tmp_path)


def test_resume_takes_no_other_settings(finished: Run) -> None:
    with pytest.raises(ValueError, match="leave out space, seed") as caught:
        pynas.search(resume=str(finished.folder), space="fbnet32", seed=4, quiet=True)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("checkpoints/search.pt", lambda old: old[: len(old) // 2], "checkpoint"),
        ("checkpoints/search.pt", lambda old: b"", "checkpoint"),
        ("checkpoints/search.pt", lambda old: b"not a checkpoint", "checkpoint"),
        ("config.yaml", lambda old: b"space: [", "config.yaml"),
        ("config.yaml", lambda old: b"space: fbnet_tiny\n", "lacks"),
        ("metrics.jsonl", lambda old: old[:-9], "metrics.jsonl, line"),
        ("device/latency.csv", lambda old: old[:-9], "latency.csv"),
    ],
)
def test_broken_run_folders(name: str, content: Callable[[bytes], bytes], says: str, finished: Run) -> None:
    (finished.folder / "architectures.jsonl").unlink()
    path = finished.folder / name
    path.write_bytes(content(path.read_bytes()))
    state = finished.folder / "checkpoints" / "search.pt"
    if name == "metrics.jsonl":  # is read when an epoch ends, so go back before the last
        state.unlink()
    before = files(finished.folder)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pynas.search(resume=str(finished.folder), quiet=True)
    one_sentence(caught.value)
    assert files(finished.folder) == before


def test_unfinished_run(finished: Run) -> None:
    (finished.folder / "architectures.jsonl").unlink()
    with pytest.raises(ValueError, match="has not finished") as caught:
        pynas.retrain(str(finished.folder), quiet=True)
    one_sentence(caught.value)


def test_nothing_trained_yet(finished: Run, tmp_path: Path) -> None:
    for call in (lambda: pynas.evaluate(finished, quiet=True), lambda: pynas.export(finished, quiet=True)):
        with pytest.raises(FileNotFoundError, match="pynas retrain") as caught:
            call()
        one_sentence(caught.value)
    assert not (finished.folder / "export").exists()


def test_broken_model(finished: Run) -> None:
    pynas.retrain(finished, epochs=1, quiet=True)
    path = finished.folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is broken") as caught:
        pynas.evaluate(finished, quiet=True)
    one_sentence(caught.value)


def test_net_of_another_space(finished: Run, tmp_path: Path) -> None:
    net = pynas.published("fbnet_a").save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="of space 'fbnet'") as caught:
        pynas.retrain(finished, net=str(net), quiet=True)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"path": "net.onnx"}, "input size"),
        ({"path": "net.onx", "input_size": 8}, "onnx"),
        ({"path": "nowhere/net.onnx", "input_size": 8}, "nowhere"),
        ({"path": "net.onnx", "input_size": 8, "format": "tflte"}, "format"),
        ({}, "where to write"),
    ],
)
def test_export_of_a_module(
    arguments: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises((ValueError, OSError), match=says) as caught:
        pynas.export(net, quiet=True, **arguments)
    one_sentence(caught.value)
    assert not files(tmp_path)


def test_measure(device: str) -> None:
    before = files(cost_models.device_folder(device))
    with pytest.raises(ValueError, match="Unknown runner 'trch'. Did you mean 'torch'") as caught:
        pynas.measure(device=device, runner="trch", quiet=True)
    one_sentence(caught.value)
    with pytest.raises(ValueError, match="other conditions") as caught:
        pynas.measure(device=device, quiet=True)
    one_sentence(caught.value)
    assert files(cost_models.device_folder(device)) == before


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"epochs": 0}, {"label_smoothing": 1.0}, {"batch_size": 1}])
def test_impossible_recipes(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must|needs") as caught:
        Recipe(**settings)
    one_sentence(caught.value)


def test_strategy_object_of_an_unregistered_class(device: str, out: Path) -> None:
    class Mine(FBNet):
        pass

    with pytest.raises(ValueError, match="not registered"):
        pynas.search(device=device, out=str(out), strategy=Mine(), quiet=True)
    assert not out.exists()
