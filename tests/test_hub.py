"""A network as a folder: the same to the last bit, and safe whoever sent it."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pynas
from pynas.architecture import Architecture
from pynas.hub import MOST_BYTES, read_pretrained
from pynas.registry import SPACES
from pynas.results import load_model
from pynas.training.data import open_data
from pynas.training.evaluate import accuracy


@pytest.fixture(scope="module")
def saved(unbroken: pynas.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unbroken.save_pretrained(tmp_path_factory.mktemp("hub") / "net")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    copy = tmp_path / "net"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_accuracy_after_reload_is_that_before(unbroken: pynas.Run, saved: Path) -> None:
    before, found = load_model(unbroken.folder), read_pretrained(saved)
    images = open_data("digits", size=before.input_size, limit=300)
    assert accuracy(found.net, images.test, images) == accuracy(before.net, images.test, images)
    assert accuracy(found.net, images.test, images) == unbroken.figures["test_accuracy"] == found.facts["test_accuracy"]
    assert (found.classes, found.mean, found.std) == (before.classes, before.mean, before.std)
    for name, tensor in before.net.state_dict().items():
        assert torch.equal(found.net.state_dict()[name], tensor)


def test_from_pretrained_is_a_plain_net(saved: Path) -> None:
    state = torch.get_rng_state()
    net: Any = pynas.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert net.architecture == read_pretrained(saved).architecture
    assert net.pretrained_cfg["input_size"] == (3, 8, 8)


def test_card_says_what_it_is(unbroken: pynas.Run, saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: ")
    for words in (
        f"{unbroken.figures['test_accuracy']:.2%} of 359 images of digits",
        f"{unbroken.figures['macs']:,}",
        "pynas.from_pretrained",
        "seed 0",
    ):
        assert words in card
    assert {file.name for file in saved.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_saving_again_replaces_and_strangers_stay(unbroken: pynas.Run, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    unbroken.save_pretrained(folder)
    pynas.from_pretrained(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        unbroken.save_pretrained(other)
    with pytest.raises(NotADirectoryError, match="it is a file"):
        unbroken.save_pretrained(other / "thesis.tex")
    with pytest.raises(ValueError, match="none of number 99"):
        unbroken.save_pretrained(tmp_path / "new", net=99)
    with pytest.raises(FileNotFoundError, match="no trained network"):
        pynas.Run(tmp_path, unbroken.best, unbroken.candidates).save_pretrained(tmp_path / "new")


@pytest.mark.parametrize("space", list(SPACES))
def test_every_space_goes_through_a_folder(space: str, tmp_path: Path) -> None:
    from pynas.hub import Pretrained, write_pretrained

    small: dict[str, dict[str, Any]] = {"repnas": {"host": "repvgg_tiny"}, "cell": {"cells": 3, "channels": 4}}
    made = SPACES.get(space)(**small.get(space, {}))
    choices = {choice.name: choice.options[-1:] for choice in made.choices()}
    architecture = Architecture(space, choices, {**made.options(), "classes": 3})
    net = architecture.build().eval()
    facts = {"test_accuracy": 0.5, "test_images": 2, "data": "none"}
    write_pretrained(tmp_path, Pretrained(net, architecture, ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, facts), "card")
    found = read_pretrained(tmp_path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(found.net.state_dict()[name], tensor)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def net_options(**changes: Any) -> Callable[[Path], None]:
    return edit(lambda config: config["model_args"]["net"]["options"].update(changes))


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return spoil


def cut(name: str, share: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def last(state: dict[str, Any]) -> str:
    return max(name for name in state if name.endswith("weight"))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "config cut short": (cut("config.json", 0.5), "it is no JSON"),
    "weights cut short": (cut("model.safetensors", 0.9), "is damaged or no safetensors file"),
    "weights cut in the header": (cut("model.safetensors", 0.001), "is damaged or no safetensors file"),
    "weights empty": (text("model.safetensors", b""), "is damaged or no safetensors file"),
    "weights are a pickle": (text("model.safetensors", b"\x80\x04cos\nsystem\n"), "is damaged or no safetensors file"),
    "header of 4 GB": (text("model.safetensors", struct.pack("<Q", 1 << 32) + b"{}"), "is damaged or no safetensors"),
    "a wrong shape": (
        tensors(lambda state: state.update({last(state): torch.zeros(3, 3)})),
        r"has shape \(3, 3\) there, and \(",
    ),
    "a wrong type": (
        tensors(lambda state: state.update({last(state): state[last(state)].double()})),
        "as F64, the network as F32",
    ),
    "a tensor missing": (tensors(lambda state: state.pop(last(state))), "it lacks '"),
    "a tensor too many": (
        tensors(lambda state: state.update({"../../evil": torch.zeros(1)})),
        r"besides what the network has '../../evil'",
    ),
    "unknown space": (
        edit(lambda config: config["model_args"]["net"].update(space="fbnet_tny")),
        "Unknown space 'fbnet_tny'. Did you mean 'fbnet_tiny'",
    ),
    "a path for a space": (
        edit(lambda config: config["model_args"]["net"].update(space="../x")),
        "Unknown space '../x'",
    ),
    "an unknown option": (
        edit(lambda config: config["model_args"]["net"]["choices"].update(layer1=["k9"])),
        "Unknown .*",
    ),
    "a choice missing": (edit(lambda config: config["model_args"]["net"]["choices"].clear()), "leaves out"),
    "an unknown key": (edit(lambda config: config.update(weights_file="/etc/passwd")), "Unknown key 'weights_file'"),
    "a key missing": (edit(lambda config: config.pop("num_classes")), "it lacks 'num_classes'"),
    "more arguments": (edit(lambda config: config["model_args"].update(hook="os:system")), "exactly the field 'net'"),
    "another architecture": (edit(lambda config: config.update(architecture="resnet18")), "'resnet18', not 'pynas'"),
    "code as a host": (
        edit(
            lambda config: config["model_args"].update(
                net={"space": "repnas", "choices": {}, "options": {"host": "evil_module:make"}, "version": 1}
            )
        ),
        "would have to be imported, which loading never does",
    ),
    "a network of a million layers": (net_options(stages=[[8, 10**9, 1]]), "are too large"),
    "a network of a million channels": (net_options(head_channels=10**9), "are too large"),
    "not a size": (net_options(stages="many"), "config.json cannot be used: "),
    "a negative size": (net_options(head_channels=-3), "cannot be"),
    "deep JSON": (text("config.json", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "rather deep JSON": (text("config.json", "[" * 50 + "]" * 50), "nested too deeply"),
    "large JSON": (text("config.json", " " * (MOST_BYTES + 1)), "more than 8,388,608"),
    "an endless number": (text("config.json", "9" * 6000), "it is no JSON|cannot be used"),
    "no number": (text("config.json", '{"num_classes": NaN}'), "it holds NaN"),
    "a list": (text("config.json", "[]"), "no JSON object"),
    "no text": (text("config.json", b"\xff\xfe{}"), "it is no JSON"),
    "fewer classes": (edit(lambda config: config["pretrained_cfg"]["label_names"].pop()), "but 9 classes are named"),
    "classes that are numbers": (
        edit(lambda config: config["pretrained_cfg"].update(label_names=list(range(10)))),
        "list of names",
    ),
    "std of zero": (edit(lambda config: config["pretrained_cfg"].update(std=[0, 1, 1])), "three numbers above 0"),
    "mean of text": (edit(lambda config: config["pretrained_cfg"].update(mean="0.5")), "'mean' must be three numbers"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_and_broken_folders(what: str, folder: Path) -> None:
    spoil, words = HOSTILE[what]
    spoil(folder)
    with pytest.raises(ValueError, match=words) as caught:
        pynas.from_pretrained(folder)
    told = str(caught.value)
    assert str(folder) in told
    assert "\n" not in told
    assert len(told) < 500
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no {name} in "):
        pynas.from_pretrained(folder)
    (folder / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"There is no {name} in "):
        pynas.from_pretrained(folder)


def test_code_of_the_user_cannot_be_saved(tmp_path: Path) -> None:
    from pynas.hub import Pretrained, write_pretrained

    class Named(Architecture):
        def __post_init__(self) -> None:
            pass

    net = Pretrained(nn.Identity(), Named("repnas", {}, {"host": "mine:make"}), ("a",), (0.0,) * 3, (1.0,) * 3, {})
    with pytest.raises(ValueError, match="is a function of yours"):
        write_pretrained(tmp_path / "net", net, "")
    assert not (tmp_path / "net").exists()
