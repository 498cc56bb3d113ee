"""Everything that can go wrong in an export: one sentence about it, and nothing left behind."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exporters import CLASSES, PT2, fake, tiny_net
from torch import Tensor, nn

from pynas.export import Quantising, export
from pynas.registry import MissingExtra


class Moody(nn.Module):
    """Decides by the values that come in, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file of an earlier export, which every failure must leave as it was, alone in its folder."""
    path = tmp_path / "net.fake"
    path.write_text("old")
    yield path
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def write_half(error: BaseException) -> Callable[..., str]:
    def write(program: Any, path: Path, metadata: Any) -> str:
        path.write_text("half")
        raise error

    return write


def write_two(program: Any, path: Path, metadata: Any) -> str:
    path.with_suffix(".data").write_text("two")
    return PT2.write(program, path, metadata)


def off_by(amount: float) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    def opened(path: Path) -> Callable[[Tensor], Tensor]:
        answer = PT2.open(path)

        def run(batch: Tensor) -> Tensor:
            found = answer(batch)
            found[0, 1] += amount if len(batch) == 3 else 0
            return found

        return run

    return opened


def answer_one(path: Path) -> Callable[[Tensor], Tensor]:
    return lambda batch: torch.zeros(1, CLASSES)


def not_run(path: Path) -> Callable[[Tensor], Tensor]:
    raise RuntimeError("No such operator: Foo.\nstack frames")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (
            {"open": off_by(9)},
            ValueError,
            r"^net\.fake was not written.* up to 9\.0e\+00 \(.* on 75\.0%; .*is 0\.0001\.$",
        ),
        ({"open": off_by(torch.nan)}, ValueError, r"was not written.*\(inf of the largest\)"),
        ({"open": answer_one}, ValueError, r"in shape \(3, 5\), its copy in \(1, 5\)"),
        ({"open": not_run}, ValueError, r"^The fake file does not run: No such operator: Foo\.$"),
        ({"write": write_half(RuntimeError())}, ValueError, r"^The net cannot be written as fake: RuntimeError\.$"),
        ({"write": write_half(OSError(errno.ENOSPC, "No space left"))}, OSError, "No space left"),
        ({"write": write_half(KeyboardInterrupt())}, KeyboardInterrupt, "^$"),
        ({"write": write_two}, ValueError, r"^net\.fake was not written: it would need net\.data beside it\.$"),
        ({"extra": "numpy no-such-package"}, MissingExtra, r"Format 'fake' needs .* pip install no-such-package$"),
    ],
)
def test_failing_format_leaves_the_old_file(
    fields: dict[str, Any], error: type[BaseException], words: str, monkeypatch: pytest.MonkeyPatch, old: Path
) -> None:
    fake(monkeypatch, **fields)
    with pytest.raises(error, match=words):
        export(tiny_net(), old, input_size=4)


@pytest.mark.parametrize(
    ("net", "arguments", "words"),
    [
        ("net", {}, r"takes a torch\.nn\.Module, not str"),
        (tiny_net(), {"input_size": None}, "Give the size of the images.*input_size=224"),
        (tiny_net(), {"input_size": (1, 4, 4)}, r"fails on an input of shape \(1, 1, 4, 4\).*to have 3 channels"),
        (tiny_net(), {"input_size": 0}, r"\(H, W\) or \(C, H, W\), not 0"),
        (tiny_net(), {"input_size": (2, 3, 4, 4)}, r"not \(2, 3, 4, 4\)"),
        (tiny_net(), {"input_size": 4.5}, r"not 4\.5"),
        (tiny_net(), {"samples": torch.zeros(3, 4, 4)}, r"\(N, C, H, W\), not of shape \(3, 4, 4\)"),
        (tiny_net(), {"samples": torch.zeros(1, 3, 5, 5)}, "contradict each other"),
        (tiny_net(), {"batch_sizes": ()}, "batch_sizes needs"),
        (tiny_net(), {"batch_sizes": (0,)}, "batch_sizes needs"),
        (tiny_net(), {"labels": ["one"]}, "1 labels were given for a net with 5 classes"),
        (tiny_net(), {"mean": [0.5]}, r"one value per channel \(3\), not 1 and 0"),
        (tiny_net(), {"format": "fakey"}, "Unknown format 'fakey'. Did you mean 'fake'"),
        (tiny_net(), {"format": "pt2"}, "'net.fake' is the name of a file in format 'fake', not 'pt2'"),
        (tiny_net(), {"precision": "int9"}, "Unknown precision 'int9'. Did you mean 'int8'"),
        (tiny_net(), {"precision": "int8"}, "Format 'fake' has no int8 here; onnx and pte have"),
        (tiny_net(), {"precision": "int8", "format": "tflite"}, "'tflite' is not written here: .*pt2"),
        (tiny_net(), {"target": "cortex-a72"}, "'fake' is the same for all CPUs; target goes with tvm"),
        (nn.Conv2d(3, 4, 1), {}, r"logits \(B, classes\), not in shape \(1, 4, 4, 4\)"),
        (nn.AdaptiveMaxPool2d(1, return_indices=True), {}, "one tensor, not tuple"),
        (Moody(), {}, "The net cannot be captured for fake: .*data-dependent"),
        (nn.Sequential(nn.Flatten(), nn.Threshold(9e9, torch.nan)), {}, "infinity or NaN"),
    ],
)
def test_wrong_arguments(net: Any, arguments: Any, words: str, monkeypatch: pytest.MonkeyPatch, old: Path) -> None:
    fake(monkeypatch)
    with pytest.raises(ValueError, match=words):
        export(net, old, **{"input_size": 4} | arguments)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("net.onx", ValueError, r"Unknown suffix '\.onx'\. Did you mean '\.onnx'.*give format="),
        ("net", ValueError, "Unknown suffix ''.*give format="),
        ("nowhere/net.pt2", FileNotFoundError, "no folder .*nowhere. Create it first"),
        ("file/net.pt2", FileNotFoundError, "no folder .*file"),
        ("folder.pt2", IsADirectoryError, "it is a folder"),
    ],
)
def test_wrong_paths(name: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=words):
        export(tiny_net(), tmp_path / name, input_size=4)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.pt2"}


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: Any) -> None:  # the tests may run as root, whom no permission stops
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        PermissionError, match=r"^Cannot write .*net\.pt2: Permission denied in .*Choose another folder"
    ):
        export(tiny_net(), tmp_path / "net.pt2", input_size=4)


def test_interrupted_replacement(monkeypatch: pytest.MonkeyPatch, old: Path) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    fake(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            export(tiny_net(), old, input_size=4)


def test_int8_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibrated on images: give data, or samples"):
        export(tiny_net(), tmp_path / "net.onnx", input_size=4, precision="int8")
    for wrong, words in (((0,), "at least 1, not 0"), ((8, 2.0), "between 0 and 1, not 2.0")):
        with pytest.raises(ValueError, match=words):
            Quantising(*wrong)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="needs the package onnxruntime: pip install onnxruntime$"):
        export(tiny_net(), tmp_path / "net.onnx", input_size=4)
    assert not [*tmp_path.iterdir()]
