"""RepNAS through the front door: runs, budgets, the command line, and networks of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import write_table
from test_spaces import random_architecture
from torch import nn

import pynas
from pynas import Architecture, FBNet, RandomSearch, RepNAS, fuse
from pynas.cli import main
from pynas.ops.branches import BRANCHES
from pynas.plan import make_space
from pynas.spaces.hosts import HOSTS
from pynas.supernet import Supernet

TINY = {"host": "repvgg_tiny", "input_size": 8}


@pytest.fixture
def device() -> str:
    return write_table("board", "repnas", {**TINY, "classes": 10})


QUICK: dict[str, Any] = {
    "space": "repnas",
    "host": "repvgg_tiny",
    "space_options": {"input_size": 8},
    "strategy": RepNAS(epochs=3, frozen_epochs=1, joint_epochs=1, batch_size=48, logit_lr=0.05),
    "limit": 200,
    "baseline": 1,
    "quiet": True,
    "threads": 1,
}


def test_front_door(device: str, tmp_path: Path) -> None:
    """Searched, tested, compared, exported as it was trained; resumed to the same; one convolution a layer."""
    import onnx

    run = pynas.search(device=device, budget=20, latency_ms=1e6, out=str(tmp_path), **QUICK)
    figures = run.figures
    assert figures["branches"]["kept"] == sum(len(names) for names in run.best.choices.values()) == 20
    assert (figures["params"], figures["budget_ms"]) == (19_098, 1e6)
    assert len(figures["baseline"]) == 1
    record = json.loads((run.folder / "baseline.jsonl").read_text())
    assert sum(len(names) for names in Architecture.from_json(record["net"]).choices.values()) == 20
    kinds = [node.op_type for node in onnx.load(figures["export"]["path"]).graph.node]
    assert kinds.count("Conv") == 7
    assert not {"BatchNormalization", "AveragePool"} & set(kinds)
    assert pynas.evaluate(run, quiet=True) == pytest.approx(figures["test_accuracy"])
    assert run.best in [alone.architecture for alone in run.trained]
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["phase"] for m in metrics if m["stage"] == "search"] == ["frozen", "joint", "fixed"]

    again = shutil.copytree(run.folder, tmp_path / "again" / "0001")
    for name in ("architectures.jsonl", "result.json", "best.json", "trained.jsonl"):
        (again / name).unlink()
    shutil.rmtree(again / "model")
    resumed = pynas.search(resume=str(again), quiet=True)
    assert resumed.best == run.best
    assert resumed.figures["test_accuracy"] == figures["test_accuracy"]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run.folder, again)]
    assert weights[0] == weights[1]


def test_budgets_at_the_front_door(device: str, tmp_path: Path) -> None:
    settings = {**QUICK, "device": device, "out": str(tmp_path), "retrain": False}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"budget": 47}, "more than all of them"),
        ({"budget": "fast"}, "budget must be"),
        ({"latency_ms": 1e-6}, "whatever is chosen"),
        ({"recipe": pynas.Recipe()}, "leave out recipe"),
        ({"strategy": FBNet()}, "FBNet cannot search space 'repnas'.*random, repnas"),
        ({"objectives": "accuracy,latency"}, "takes no objectives"),
        ({"space": "fbnet_tiny", "host": None, "strategy": "fbnet", "budget": 3}, "Give latency_ms"),
        ({"space": "fbnet_tiny", "strategy": "fbnet"}, "no option 'host'"),
        ({"space": "fbnet_tiny", "host": None, "strategy": RepNAS()}, "RepNAS cannot search space 'fbnet_tiny'"),
        ({"host": "vgg16", "space_options": {"host": "repvgg_a0"}}, "named twice"),
    ]
    for changes, says in refused:
        with pytest.raises(ValueError, match=says):
            pynas.search(**{**settings, **changes})
    assert not list(tmp_path.iterdir())
    strategy = RandomSearch(epochs=2, candidates=2, batch_size=48)
    run = pynas.search(**{**settings, "strategy": strategy, "budget": 0.5})
    assert {sum(map(len, c.architecture.choices.values())) for c in run.candidates} == {23}
    assert [c.cost for c in run.candidates] == [23, 23]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "hosts"]) == 0
    assert capsys.readouterr().out.split() == list(HOSTS)
    with pytest.raises(SystemExit):
        main(["search", "--space", "repnas", "--budget", "44", "--strategy.lr", "0.2", "--preset", "released",
              "--print_config"])  # fmt: skip
    text = capsys.readouterr().out
    assert "RepNAS" in text
    assert "lr: 0.2" in text
    assert "preset: released" in text
    assert "budget: 44" in text


def own(num_classes: int = 7) -> nn.Module:
    """A user's network, as a host."""
    torch.manual_seed(5)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    more = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    return nn.Sequential(body, more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def test_a_network_of_ones_own_as_host() -> None:
    space = make_space("repnas", {"host": f"{__name__}:own", "input_size": 8})
    assert [(slot.name, slot.size) for slot in space.slots()] == [("0_0", 8), ("1_0", 4)]
    net = Supernet(space)
    best = random_architecture(space, 1)
    child = net.inherit(best)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(child.eval()(x), net.eval()(x, net.one_hot(best)))
    plain = own(space.classes)
    plain.load_state_dict(fuse(child).state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(x), child(x), rtol=1e-4, atol=1e-5)
    assert len(BRANCHES) == 7
