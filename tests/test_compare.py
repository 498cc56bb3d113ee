"""Comparisons: what strategies compute, equal budgets, tables, resuming, bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import write_table
from test_strategies import ROOFLINE, SHORT, SPACE

import pynas
from pynas import STRATEGIES, Recipe, pipeline
from pynas.architecture import SPACES
from pynas.cli import main
from pynas.compare import Comparison, compare
from pynas.comparison import rows, tables
from pynas.comparison.budget import computed, matched
from pynas.comparison.rows import Point, Row, reached, usable
from pynas.strategies import Problem, Strategy
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed
from pynas.training.loop import Interrupted, Progress

DARTS = {"darts-first": "first", "darts-second": "second", "darts-single": "single"}
NAMES = [*(name for name in STRATEGIES if name != "darts"), *DARTS, "fbnet-score"]
CELLS = {"input_size": 8, "cells": 3, "channels": 2, "nodes": 2}
ASKED: dict[str, Any] = {
    "strategies": "spos,random",
    "space": "fbnet_tiny",
    "data": "digits",
    "device": "board",
    "space_options": SPACE,
    "limit": 200,
    "epochs": 4,
    "batch_size": 40,
    "changes": {"spos": {"samples": 2}, "random": {"candidates": 2}},
    "recipe": Recipe(epochs=1, batch_size=50),
    "quiet": True,
}


def made(name: str) -> Strategy:
    if name == "fbnet-score":
        return pynas.FBNet(**{**SHORT["fbnet"], "batch_size": 24}, sampling="hard", hard_gradient="score")
    if name in DARTS:
        return pynas.DARTS(**{**SHORT["darts"], "batch_size": 24, "order": DARTS[name]})
    strategy: Strategy = STRATEGIES.get(name)(**{**SHORT[name], "batch_size": 24})
    return strategy


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=8, limit=150)


@contextmanager
def backward_images() -> Iterator[list[int]]:
    """Images whose logits a gradient comes back to, one entry a pass."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, given: Any, out: Any) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == 10 and out.requires_grad:
            out.register_hook(lambda gradient: seen.append(len(gradient)))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_backward_passes_and_budgets_are_equal(name: str, data: Data) -> None:
    """The oracle is what comes back through the network in a whole search."""
    subsets = "one" not in made(name).PICKS
    space = SPACES.get("repnas")(host="repvgg_tiny", input_size=8) if subsets else SPACES.get("fbnet_tiny")(**SPACE)
    feed = Feed(data, batch_size=24, seed=0)
    budget = 9 * feed.steps_weights * 24
    strategy = matched(name, made(name), space, feed, budget)
    torch.manual_seed(0)
    table = cost_table(space, ROOFLINE)
    strategy.prepare(Problem(space, table, None, 0.1, 0))
    with backward_images() as seen:
        for epoch in range(strategy.epochs):
            for step in range(strategy.steps(feed, epoch)):
                strategy.step(feed, Progress(epoch, step))
    assert sum(seen) == computed(strategy, feed)
    assert 0.9 * budget <= sum(seen) <= budget
    per_step = max(strategy.gradient_passes(feed, e) / max(1, strategy.steps(feed, e)) for e in range(strategy.epochs))
    if hasattr(strategy, "path_gradients"):  # exact up to a step
        assert budget - sum(seen) < per_step * 24


def test_too_little_computation(data: Data) -> None:
    space, feed = SPACES.get("fbnet_tiny")(**SPACE), Feed(data, batch_size=24, seed=0)
    with pytest.raises(ValueError, match="24 gradient computations are less than a step of fairnas"):
        matched("fairnas", made("fairnas"), space, feed, 24)
    with pytest.raises(ValueError, match="24 gradient computations do not suit fbnet"):
        matched("fbnet", made("fbnet"), space, feed, 24)


def test_random_search_takes_what_divides(data: Data) -> None:
    space, feed = SPACES.get("fbnet_tiny")(**SPACE), Feed(data, batch_size=24, seed=0)
    for epochs, (candidates, used) in {12: (6, 12), 7: (7, 7), 23: (4, 20), 25: (5, 25)}.items():
        budget = epochs * feed.steps_weights * 24
        strategy: Any = matched("random", pynas.RandomSearch(60, 24, 6), space, feed, budget)
        assert used <= strategy.epochs <= epochs
        assert strategy.epochs % strategy.candidates == 0
        assert strategy.epochs == max(epochs - epochs % c for c in range(3, 13) if c <= epochs)
        if epochs % candidates == 0:
            assert strategy.candidates == candidates


# Whole comparisons


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        write_table("board", options={**SPACE, "classes": 10})
        write_table("cells", "cell", {**CELLS, "classes": 10})
    return folder


@pytest.fixture
def boards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(home))


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("XDG_DATA_HOME", str(home))
        out = tmp_path_factory.mktemp("whole") / "comparison"
        return compare(**ASKED, seeds="0,1", retrain=False, target_accuracy=0.3, out=str(out))


def test_tables_and_pictures(whole: Comparison) -> None:
    names = [row.folder for row in whole.rows]
    assert names == ["spos-0", "random-0", "spos-1", "random-1"]
    assert len({row.gradients for row in whole.rows}) == 1
    told = json.loads((whole.folder / "comparison.json").read_text())
    assert [run["folder"] for run in told["runs"]] == names
    with (whole.folder / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, whole.rows, strict=True):
        run = pynas.Run.open(whole.folder / line["folder"])
        assert line["net"] == str(run.best)
        assert int(line["macs"]) == pynas.count(run.best.build(), (3, 8, 8)).macs
        assert int(line["params"]) == pynas.count(run.best.build(), (3, 8, 8)).params
        assert int(line["gradients"]) == row.gradients
        assert "modelled" in line["latency"]
    spos, random = whole.rows[:2]
    assert spos.child_accuracy == pynas.evaluate(whole.folder / "spos-0", weights="inherited", quiet=True)
    assert random.child_accuracy is None  # its networks share no weights
    assert spos.entropy is None
    text = (whole.folder / "comparison.md").read_text()
    assert text.count("| spos |") == text.count("| random |") == 1
    assert f"| {spos.gradients:,} |" in text
    for picture in ("curves", "children"):
        assert (whole.folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (whole.folder / f"{picture}.svg").read_text()


def test_every_run_is_an_ordinary_one(whole: Comparison, boards: None) -> None:
    again = pynas.search(resume=str(whole.folder / "random-0"), quiet=True)
    assert str(again.best) == whole.rows[1].net


def test_broken_comparison_goes_on(
    whole: Comparison, boards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    execute = pipeline.execute

    def broken(plan: Any, run: Any, show: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(run.path.name)
        return execute(plan, run, show)

    asked = {**ASKED, "seeds": [0], "retrain": False, "target_accuracy": 0.3, "out": str(tmp_path / "c")}
    monkeypatch.setattr(pipeline, "execute", broken)
    with pytest.raises(Interrupted, match="Go on with: the same command"):
        compare(**asked)
    assert not (tmp_path / "c" / "comparison.md").exists()
    (tmp_path / "c" / "random-0" / "config.yaml").unlink()  # as if killed while the folder was made
    monkeypatch.setattr(pipeline, "execute", execute)
    found = compare(**asked)

    def timeless(row: Row) -> Row:
        return dataclasses.replace(row, seconds=0, curve=tuple(dataclasses.replace(p, seconds=0) for p in row.curve))

    assert list(map(timeless, found.rows)) == list(map(timeless, whole.rows[:2]))
    monkeypatch.setattr(pipeline, "execute", broken)  # nothing is run again
    assert compare(**asked).rows == found.rows
    for changed in ({"seeds": "0,1"}, {"epochs": 5}):
        with pytest.raises(ValueError, match="holds another comparison, with other settings of"):
            compare(**{**asked, **changed})


def test_cells_and_retraining(boards: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting of a strategy in a space of cells, whose strip is drawn, through the command line."""
    flags = {
        "strategies": "single",
        "changes": json.dumps({"single": {"strategy": "darts", "order": "single", "samples": 0}}),
        "space": "cell",
        "space_options": json.dumps(CELLS),
        "data": "digits",
        "device": "cells",
        "limit": 100,
        "epochs": 2,
        "batch_size": 40,
        "watch": 20,
        "recipe.epochs": 1,
        "out": tmp_path / "c",
    }
    assert main(["compare", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    shown = capsys.readouterr().out
    assert "gradients until usable" in shown
    (run,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"]
    assert (run["label"], run["strategy"]) == ("single", "darts")
    assert run["curve_source"] == rows.HELD_OUT
    assert run["gradients"] == 160
    assert len(run["curve"]) == 4  # not more parts than steps
    assert run["retrain_gradients"] == 64  # one batch of the recipe's 64 among 100 images
    assert 0 <= run["trained_accuracy"] <= 1
    assert run["entropy"] == pytest.approx(2.08, abs=0.01)
    assert (tmp_path / "c" / "cells-single.svg").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategies": "spos,rando"}, "Unknown strategy 'rando'. Did you mean 'random'"),
        ({"strategies": ""}, "Name the strategies to compare"),
        ({"strategies": "spos,spos", "changes": None}, "'spos' is named twice"),
        ({"changes": {"snas": {"eta": 1}}}, "Unknown label in changes 'snas'"),
        ({"changes": {"spos": {"epochs": 3}}}, "epochs of 'spos' follows from"),
        ({"changes": {"spos": {"bogus": 3}}}, "Unknown hyper-parameter of strategy SPOS 'bogus'"),
        ({"strategies": "a/b", "changes": {"a/b": {"strategy": "spos"}}}, "stands in file names"),
        ({"seeds": "0,0"}, "seeds must be one or more different numbers"),
        ({"seeds": "0,x"}, "seeds must be whole numbers from 0 on, such as 0,1,2, not 'x'"),
        ({"seeds": [-1]}, "seeds must be whole numbers"),
        ({"seeds": ""}, "seeds must be whole numbers"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more"),
        ({"target_accuracy": 70}, "target_accuracy must lie between 0 and 1"),
        ({"epochs": 1}, "do not suit random"),
        ({"latency_ms": 1e-6}, "No network of this space meets 1e-06 ms"),
        ({"device": "boardd"}, "Unknown device 'boardd'"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    changed: dict[str, Any], message: str, boards: None, tmp_path: Path
) -> None:
    if message.startswith("do not"):
        changed = {**changed, "changes": {"random": {"candidates": 4}}}
    with pytest.raises(ValueError, match=message):
        compare(**{**ASKED, "out": str(tmp_path / "c"), **changed})
    assert not (tmp_path / "c").exists()


def test_folder_of_something_else(boards: None, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        compare(**{**ASKED, "out": str(tmp_path)})


def test_space_that_a_strategy_cannot_search(boards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, problem: Problem) -> None:
        raise ValueError("it has no paths.")

    monkeypatch.setattr(pynas.SPOS, "prepare", refuse)
    with pytest.raises(ValueError, match="spos cannot search space 'fbnet_tiny': it has no paths"):
        compare(**{**ASKED, "out": str(tmp_path / "c")})
    assert not (tmp_path / "c").exists()


# What a target costs


def row(seed: int, child: float | None, trained: float | None, curve: tuple[float, ...] = ()) -> Row:
    points = tuple(Point(100 * (i + 1), 1.0, accuracy, None, 1.0) for i, accuracy in enumerate(curve))
    known = {"label": "a", "strategy": "snas", "seed": seed, "folder": "a", "net": "", "gradients": 1000}
    rest = {"forward_passes": None, "seconds": 1.0, "search_accuracy": None, "entropy": None, "params": 1, "macs": 1}
    return Row(
        **known,  # type: ignore[arg-type]
        **rest,  # type: ignore[arg-type]
        retrain_gradients=None if trained is None else 500,
        child_accuracy=child,
        child_accuracy_without_recalibration=child,
        trained_accuracy=trained,
        predicted_ms=1.0,
        latency="",
        measured_ms=None,
        curve=points,
        curve_source=rows.HELD_OUT,
    )


def test_restarts_and_retraining_are_counted() -> None:
    assert usable([row(0, 0.8, 0.9)], 0.7) == rows.Usable(1000, "without retraining")
    assert usable([row(0, 0.2, 0.9)], 0.7) == rows.Usable(1500, "retrained")
    assert usable([row(0, 0.2, 0.3), row(1, 0.8, 0.9)], 0.7) == rows.Usable(2500, "without retraining, after 1 restart")
    assert usable([row(0, 0.2, 0.3), row(1, 0.1, 0.2), row(2, None, 0.7)], 0.7) == rows.Usable(
        4500, "retrained, after 2 restarts"
    )
    assert usable([row(0, 0.2, 0.3), row(1, 0.1, None)], 0.7) is None
    assert usable([row(0, 0.2, 0.3)], None) == rows.Usable(1500, "retrained")
    assert usable([row(0, 0.2, None)], None) == rows.Usable(1000, "without retraining")
    assert tables.table([row(0, 0.2, 0.3)], 0.7)[0][-1] == "never"


def test_when_a_curve_reaches_a_target() -> None:
    run = row(0, None, None, (0.2, 0.5, 0.4, 0.6))
    assert [reached(run, target) for target in (0.1, 0.5, 0.6, 0.7)] == [100, 200, 400, None]
    two = [run, row(1, None, None, (0.1, 0.2))]
    assert tables.table(two, 0.5)[0][-2] == "200 (1 of 2 never)"
