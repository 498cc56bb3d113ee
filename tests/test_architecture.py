"""Architectures as data: what is refused, and that files survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pynas import Architecture, published
from pynas.registry import Registry


def content() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(published("fbnet_a").to_json())
    return parsed


def broken(**changes: Any) -> str:
    return json.dumps({**content(), **changes})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "exactly the fields"),
        (json.dumps({"space": "fbnet"}), "exactly the fields"),
        (broken(space="fbnett"), "Did you mean 'fbnet'"),
        (broken(version=2), "format version 2"),
        (broken(choices={"layer1": ["skip"]}), "leaves out 'layer2'"),
        (broken(choices={**content()["choices"], "layer23": ["skip"]}), "Unknown choice of space 'fbnet' 'layer23'"),
        (broken(choices={**content()["choices"], "layer3": ["k3_e7"]}), "Unknown option of 'layer3' 'k3_e7'"),
        (broken(choices={**content()["choices"], "layer3": ["skip", "k3_e1"]}), "takes one option, not 2"),
        (broken(choices={**content()["choices"], "layer3": "skip"}), "list of option names"),
        (broken(options={"depth": 3}), "do not fit space 'fbnet'"),
        (broken(options={"input_size": 8}), "too small"),
        (broken(options={"classes": -1}), "positive whole number"),
        (broken(options={"width": 0}), "width"),
        (broken(options={"stages": [[16, 1]]}), "triples"),
    ],
)
def test_broken_json(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        Architecture.from_json(text)
    path = tmp_path / "net.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="net.json"):
        Architecture.load(path)


def test_file_round_trip(tmp_path: Path) -> None:
    architecture = published("fbnet_c")
    assert Architecture.load(architecture.save(tmp_path / "c.json")) == architecture
    with pytest.raises(FileNotFoundError, match="no architecture file"):
        Architecture.load(tmp_path / "d.json")


def test_registry_refuses_doubles_and_suggests() -> None:
    colours: Registry[int] = Registry("colour")
    colours.add("red", 1)
    with pytest.raises(ValueError, match="registered already"):
        colours.add("red", 2)
    with pytest.raises(ValueError, match="Unknown colour 'rad'. Did you mean 'red'"):
        colours.get("rad")
