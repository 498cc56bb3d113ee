"""Several objectives through the front door: a Pareto set, limits, members of it, and exact resumption."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tables import write_table
from test_strategies import equal

import pynas
from pynas import EvolutionSettings, FairNAS, RandomSearch, Recipe, Run
from pynas.console import Show
from pynas.pareto import Goal, front
from pynas.strategies import STRATEGIES, Problem
from pynas.summary import show_result
from pynas.supernet import cost_table
from pynas.training.data import open_data
from pynas.training.feed import Feed

SPACE = {"input_size": 8, "stem_stride": 1, "stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32}
EVOLVED: dict[str, Any] = {
    "space": "fairnas",
    "strategy": FairNAS(epochs=2, batch_size=48, lr=0.05, evaluations=60, calibrate=96),
    "objectives": "accuracy,latency",
    "evolution": EvolutionSettings(population=10, children=25),
    "recipe": Recipe(epochs=2, batch_size=48),
    "space_options": SPACE,
    "limit": 300,
    "baseline": 1,
    "retrain": False,
    "threads": 1,
    "quiet": True,
}
FEW = FairNAS(epochs=1, batch_size=48, lr=0.05, evaluations=16, calibrate=32)
PURSUING = [name for name, cls in STRATEGIES.items() if cls.PURSUES]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home-of-objectives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        write_table("board", "fairnas", {**SPACE, "classes": 10})
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(home))


@pytest.fixture(scope="module")
def evolved(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole search with objectives; to be read."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("XDG_DATA_HOME", str(home))
        return pynas.search(device="board", out=str(tmp_path_factory.mktemp("evolved")), **EVOLVED)


def search(out: Path, **changes: Any) -> Run:
    settings = {**EVOLVED, "strategy": FEW, "evolution": None, **changes}
    return pynas.search(device="board", out=str(out), **settings)


def test_the_set_is_what_none_dominates(evolved: Run) -> None:
    assert len(evolved.judged) == len({net.architecture.fingerprint for net in evolved.judged}) == 60
    values = [(net.accuracy, net.cost) for net in evolved.judged]
    best = {i for i, (a, c) in enumerate(values) if not any(x >= a and y <= c and (x, y) != (a, c) for x, y in values)}
    assert {i for i, net in enumerate(evolved.judged) if net.front} == best
    assert evolved.candidates == tuple(net for net in evolved.judged if net.front)
    assert [net.accuracy for net in evolved.candidates] == sorted(
        (n.accuracy for n in evolved.candidates), reverse=True
    )
    assert evolved.best == evolved.candidates[0].architecture
    assert evolved.candidates[0].accuracy == max(net.accuracy for net in evolved.judged)
    counted = pynas.count(evolved.best.build(), (3, 8, 8))
    assert (evolved.candidates[0].params, evolved.candidates[0].macs) == (counted.params, counted.macs)


def test_the_run_folder_holds_it(evolved: Run) -> None:
    assert Run.open(evolved.folder) == evolved
    config = yaml.safe_load((evolved.folder / "config.yaml").read_text())
    asked = (config["objectives"], config["limits"], config["directions"], config["latency_ms"])
    assert asked == (["accuracy", "latency_ms"], {}, {}, None)
    lines = [json.loads(line) for line in (evolved.folder / "metrics.jsonl").read_text().splitlines()]
    volumes = [line["hypervolume"] for line in lines if line["stage"] == "evolution"]
    assert volumes == sorted(volumes)
    assert [line["evaluations"] for line in lines if line["stage"] == "evolution"] == [10, 35, 60]
    assert (evolved.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


COMMAND = """
import os, signal, sys, torch
import pynas
from pynas.training import submodels
from test_objectives import EVOLVED

out, resume, name, count = sys.argv[1:]
append, told = submodels.append_score, []

def stop_after_some(*args):
    append(*args)
    told.append(args)
    if len(told) == int(count):
        os.kill(os.getpid(), getattr(signal, name))

submodels.append_score = stop_after_some
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
torch.set_num_threads(1)
if resume:
    pynas.search(resume=resume)
else:
    pynas.search(device="board", out=out, **{**EVOLVED, "quiet": False})
"""


def stopped(home: Path, out: Path, resume: str, name: str, count: int) -> subprocess.CompletedProcess[str]:
    """A search, or a run that goes on, in a process that gets a signal once it has judged so many networks."""
    path = os.pathsep.join([str(Path(__file__).resolve().parent), *[entry for entry in sys.path if entry]])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(home)}
    command = [sys.executable, "-P", "-c", COMMAND, str(out), resume, name, str(count)]
    return subprocess.run(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=250,
        check=False,
    )


def scores(run: Path) -> list[str]:
    return (run / "submodels.jsonl").read_text().splitlines()


def test_interrupted_generations_go_on_bit_for_bit(home: Path, evolved: Run, tmp_path: Path) -> None:
    """Killed without warning in the second generation, stopped by Ctrl-C in the third, and resumed."""
    run = tmp_path / "0001"
    killed = stopped(home, tmp_path, "", "SIGKILL", 15)
    assert killed.returncode == -signal.SIGKILL
    assert len(scores(run)) == 15
    broken = stopped(home, tmp_path, str(run), "SIGINT", 27)
    assert broken.returncode != 0
    assert f"pynas search --resume {run}" in broken.stdout
    assert len(scores(run)) == 42
    assert not (run / "architectures.jsonl").exists()
    again = pynas.search(resume=str(run), quiet=True)
    assert again.judged == evolved.judged
    assert scores(run) == scores(evolved.folder)  # nothing was judged twice
    states = [
        {path.name: torch.load(path, weights_only=True)["task"] for path in (folder / "checkpoints").glob("*.pt")}
        for folder in (run, evolved.folder)
    ]
    assert any(name.startswith("evolution") for name in states[0])
    assert equal(*states)
    for name in ("architectures.jsonl", "pareto.png"):
        assert (run / name).read_bytes() == (evolved.folder / name).read_bytes()


def nets(found: Sequence[Any]) -> Any:
    return np.array([(net.accuracy, net.cost, net.macs, net.params) for net in found], dtype=float)


@pytest.mark.parametrize("name", PURSUING)
def test_every_strategy_of_shared_weights_pursues_goals(name: str, home: Path) -> None:
    """Three objectives, a limit on a fourth, and more parameters the better; weights are those it begins with."""
    space = pynas.SPACES.get("fairnas")(**SPACE, classes=10)
    macs, params = (cost_table(space, model()) for model in (pynas.cost_models.Macs, pynas.cost_models.Params))
    table = cost_table(space, pynas.cost_models.load("board"))
    goals = (
        Goal("accuracy", "max"),
        Goal("macs", "min", 5e5),
        Goal("params", "max"),
        Goal("latency_ms", "min", 0.55, False),
    )
    strategy = dataclasses.replace(STRATEGIES.get(name).preset("quick"), evaluations=24, calibrate=32)
    problem = Problem(space, table, 0.55, 0.1, 0, goals=goals)
    strategy.check(problem)
    strategy.prepare(problem)
    found = strategy.derive(Feed(open_data("digits", size=8, limit=200), batch_size=48, seed=0))
    assert len(found) == 24
    rows = []
    for net in found:
        costs = [each.cost(net.architecture) for each in (macs, params, table)]
        assert costs[0] <= 5e5
        assert costs[2] <= 0.55
        rows.append((net.accuracy, *costs))
    assert [net.front for net in found] == sorted((net.front for net in found), reverse=True)
    assert set(front(rows, goals).tolist()) == {index for index, net in enumerate(found) if net.front}


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"objectives": "accuracy,latncy"}, "Unknown objective 'latncy'. Did you mean 'latency_ms'"),
    ({"objectives": ["accuracy", "accuracy"]}, "named twice"),
    ({"objectives": ""}, "at least one objective"),
    ({"objectives": "latency,macs"}, "accuracy must be an objective or have a limit"),
    ({"limits": {"mcs": 4e8}}, "Did you mean 'macs'"),
    ({"limits": {"macs": "few"}}, "limit of macs must be a finite number"),
    ({"limits": {"macs": float("nan")}}, "limit of macs must be a finite number"),
    ({"limits": {"accuracy": 90}}, "between 0 and 1, not 90: 0.9 stands for 90 %"),
    ({"limits": {"macs": 1e3}}, "No network of this space has macs <= 1000: the nearest has 269,760"),
    ({"limits": {"params": 10}}, "No network of this space has params <= 10: the nearest has 7,634"),
    ({"limits": {"params": 1e9}, "directions": {"params": "max"}}, "has params >= 1e[+]09: the nearest has 22,058"),
    ({"limits": {"latency": 1e-3}}, "the cheapest costs"),
    ({"latency_ms": 1e-3}, "the cheapest costs"),
    ({"latency_ms": 5.0, "limits": {"latency": 4.0}}, "limited twice"),
    ({"limits": {"macs": 2.8e5, "params": 2e4}, "directions": {"params": "max"}}, "meets all of macs .* at once"),
    ({"directions": {"params": "max"}}, "direction of params, which is neither"),
    ({"directions": {"latency": "max"}}, "direction of latency_ms is always 'min'"),
    ({"objectives": "accuracy,params", "directions": {"params": "more"}}, "Unknown direction of params 'more'"),
    ({"evolution": EvolutionSettings(population=20)}, "population of 20 does not fit into 16 evaluations"),
    ({"evolution": {"population": 20}}, "evolution must be a pynas.EvolutionSettings"),
    ({"strategy": "fbnet"}, "takes no objectives: .*fairnas, spos, ef, one_shot|takes no objectives: .*ef, fairnas"),
    ({"strategy": "random", "limits": {"macs": 4e8}}, "takes no objectives"),
    ({"objectives": None, "limits": {"macs": 4e8}}, "limits goes with objectives"),
]


@pytest.mark.parametrize(("changes", "says"), ERRORS, ids=lambda value: str(value)[:50])
def test_wrong_wishes_are_told_before_any_work(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        search(tmp_path / "runs", **changes)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_impossible_evaluations() -> None:
    with pytest.raises(ValueError, match="evaluations >= 8, not 7"):
        FairNAS(evaluations=7)


def test_a_limit_that_training_does_not_reach(tmp_path: Path) -> None:
    """Is told with the nearest value; a changed limit goes on with the supernet and the scores that there are."""
    with pytest.raises(ValueError, match="accuracy >= 0.999; the nearest has accuracy 0.*change limits in") as caught:
        search(tmp_path, limits={"accuracy": 0.999})
    run = tmp_path / "0001"
    assert f"pynas search --resume {run}" in str(caught.value)
    before = scores(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["limits"] = {"accuracy": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(pynas.search(resume=str(run), quiet=True).judged) == 16
    assert scores(run)[: len(before)] == before


def test_networks_of_the_set_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best is trained, exported and compared; others on request, with their own weights or the supernet's."""
    run = search(tmp_path, retrain=True)
    assert run.figures["fingerprint"] == run.best.fingerprint
    assert run.figures["baseline"][0]["cost"] == pytest.approx(run.candidates[0].cost, rel=0.11)
    assert run.figures["export"]["difference"] < 1e-3
    assert run.figures["fitted"] == 0
    show_result(dataclasses.replace(run, figures={**run.figures, "fitted": 3}), Show())
    said = capsys.readouterr().out
    assert "3 of its ops fitted" in said
    assert "--net 2" in said
    show_result(dataclasses.replace(run, candidates=run.candidates[:1]), Show())
    assert "--net 2" not in capsys.readouterr().out  # there is none
    with pytest.raises(FileNotFoundError, match="Train one with: pynas retrain .* --net 2"):
        pynas.export(run, net=2, quiet=True)
    with pytest.raises(ValueError, match="numbered from 1 to"):
        pynas.retrain(run, net=99, quiet=True)
    best = (run.folder / "model" / "model.safetensors").read_bytes()
    trained = pynas.retrain(run, net=2, quiet=True)
    assert trained.architecture == run.candidates[1].architecture
    assert pynas.evaluate(run, net=2, quiet=True) == pynas.evaluate(trained, quiet=True) == trained.accuracy
    report = pynas.export(run, net=2, quiet=True)
    assert report.path == run.folder / "nets" / "2" / "export" / "net.onnx"
    assert report.argmax_agreement == 1.0
    assert (run.folder / "model" / "model.safetensors").read_bytes() == best
    assert {alone.architecture.fingerprint for alone in run.trained} >= {
        run.candidates[0].architecture.fingerprint,
        run.candidates[1].architecture.fingerprint,
    }
    assert next(a for a in run.trained if a.architecture == trained.architecture).accuracy == trained.accuracy

    inherited = pynas.evaluate(run, net=1, weights="inherited", quiet=True)
    assert 0 < inherited != pynas.evaluate(run, net=1, quiet=True)
    report = pynas.export(run, str(tmp_path / "i.onnx"), net=1, weights="inherited", quiet=True)
    assert report.argmax_agreement == 1.0
    (run.folder / "checkpoints" / "search.pt").unlink()
    with pytest.raises(ValueError, match="no weights to inherit: .*search.pt is gone"):
        pynas.evaluate(run, net=1, weights="inherited", quiet=True)
    with pytest.raises(ValueError, match="Did you mean 'inherited'"):
        pynas.evaluate(run, net=1, weights="inherit", quiet=True)  # type: ignore[arg-type]


def test_inherited_weights_are_those_that_were_judged(evolved: Run) -> None:
    """On the images that it was judged on, a network that inherits has the accuracy of the table."""
    from pynas import api, pipeline
    from pynas.plan import make_plan
    from pynas.training.evaluate import accuracy

    folder, config = api.opened(evolved.folder)
    plan = make_plan(config, Show(quiet=True), folder)
    for net in evolved.candidates[:2]:
        child = pipeline.inherited(plan, net.architecture, folder)
        assert accuracy(child, plan.data.arch, plan.data) == net.accuracy


def test_random_search_has_nothing_to_inherit(tmp_path: Path) -> None:
    strategy = RandomSearch(epochs=1, candidates=1, batch_size=48)
    run = search(tmp_path, strategy=strategy, objectives=None, latency_ms=None)
    with pytest.raises(ValueError, match="no weights to inherit: strategy random shares none"):
        pynas.export(run, weights="inherited", quiet=True)


def test_plot(evolved: Run, tmp_path: Path) -> None:
    axes = pynas.plot_pareto(evolved).axes[0]
    dominated, found, _ = axes.collections
    assert len(found.get_offsets()) == len(evolved.candidates)
    assert len(dominated.get_offsets()) == 60 - len(evolved.candidates)
    assert "latency on board" in axes.get_xlabel()
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["1", "2"]
    by_macs = pynas.plot_pareto(evolved.folder, "macs").axes[0]
    place = np.asarray(by_macs.collections[1].get_offsets())[0]
    best = evolved.candidates[0]
    assert best.macs is not None
    np.testing.assert_allclose(place, (best.macs / 1e6, 100 * best.accuracy))
    with pytest.raises(ValueError, match="Did you mean 'params'"):
        pynas.plot_pareto(evolved, "parms")


def test_plot_of_limits(tmp_path: Path) -> None:
    run = search(tmp_path, objectives="accuracy,params", limits={"macs": 6e5, "accuracy": 0.01, "latency": 0.6})
    assert all(net.macs is not None and net.macs <= 6e5 and net.cost <= 0.6 for net in run.judged)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["latency_ms"] == 0.6
    labels = [line.get_label() for line in pynas.plot_pareto(run, "macs").axes[0].lines]
    assert "limit 0.6" in labels
    assert "limit 1 %" in labels


def test_plot_without_objectives(tmp_path: Path) -> None:
    run = search(tmp_path, objectives=None)
    assert len(run.candidates) == len(run.judged) > 1
    with pytest.raises(ValueError, match="searched without objectives"):
        pynas.plot_pareto(run)
