"""Ranking of real searches: against a table, and against networks that were trained alone in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import copied
from shared import MACRO, shared_data
from tables import write_table

import pynas
from pynas import FairNAS, Recipe, Run, rank
from pynas.cli import main
from pynas.evolution import to_genome
from pynas.reports import rank_run
from pynas.results import note_trained, read_trained
from pynas.training.run import RunFolder

SPACE = {"input_size": 8, "width": 0.25, "stages": [[32, 1, 2], [64, 2, 2]], "head_channels": 32}
SEARCH: dict[str, Any] = {
    "space": "macro",
    "strategy": FairNAS(epochs=2, batch_size=48, lr=0.05, evaluations=27, calibrate=64),
    "objectives": "accuracy,macs",
    "space_options": SPACE,
    "recipe": Recipe(epochs=1, batch_size=48),
    "limit": 200,
    "threads": 1,
    "retrain": False,
    "quiet": True,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All 27 networks of a small space like NAS-Bench-Macro's, judged."""
    folder = tmp_path_factory.mktemp("macro")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("XDG_DATA_HOME", str(folder))
        write_table("board", "macro", {**SPACE, "classes": 10})
        return pynas.search(device="board", out=str(folder / "runs"), **SEARCH)


def key(net: Any) -> str:
    return "".join(map(str, to_genome(net.architecture)))


def table(run: Run, path: Path) -> Path:
    """A truth in which every network is as accurate as it was judged."""
    rows = {key(net): {"test_acc": [100 * net.accuracy], "params": net.params, "flops": net.macs} for net in run.judged}
    path.write_text(json.dumps(rows))
    return path


def test_against_a_table(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(whole.judged) == 27
    run, truth = copied(whole, tmp_path), table(whole, tmp_path / "truth.json")
    assert main(["rank", str(run.folder), "--truth", str(truth)]) == 0
    said = capsys.readouterr().out
    assert "27, against truth.json, 27 networks" in said
    assert "1.000 [1.000, 1.000]" in said
    assert "better than chance" in said
    assert (run.folder / "ranking.png").read_bytes().startswith(b"\x89PNG")
    found = rank(run, pynas.read_truth(truth, options=[3, 3, 3]))
    assert sorted(found.keys) == sorted(key(net) for net in run.judged)


def test_a_table_of_another_space(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"test_acc": [90.0], "params": 1, "flops": 1}
    (tmp_path / "other.json").write_text(json.dumps({"01201201": row}))
    before = sorted(path.name for path in whole.folder.iterdir())
    assert main(["rank", str(whole.folder), "--truth", str(tmp_path / "other.json")]) == 1
    said = capsys.readouterr().err
    assert "a key must be 3 digits" in said
    assert "another space than 'macro'" in said
    assert len(said.strip().splitlines()) == 1
    assert main(["rank", str(whole.folder), "--truth", "nowhere.json"]) == 1
    assert "There is no truth table nowhere.json" in capsys.readouterr().err
    assert sorted(path.name for path in whole.folder.iterdir()) == before
    other = pynas.Truth("a table", "fairnas", {}, {}, {}, {})
    with pytest.raises(ValueError, match="holds networks of space 'fairnas', not of 'macro'"):
        rank(whole, other)


def test_against_networks_trained_alone(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs three of them; what was trained but never judged is left out."""
    run = copied(whole, tmp_path)
    assert main(["rank", str(run.folder)]) == 1
    assert (
        "at least 3 networks, not 0. Train more of the run's networks alone: pynas retrain" in capsys.readouterr().err
    )
    for number in (1, 2, 3):
        pynas.retrain(run, net=number, quiet=True)
    assert main(["rank", str(run.folder), "--path", str(tmp_path / "alone.png")]) == 0
    assert "3, against 3 networks trained alone" in capsys.readouterr().out
    assert (tmp_path / "alone.png").exists()
    found = rank(run, run.trained)
    assert found.predicted.tolist() == [net.accuracy for net in run.candidates[:3]]
    assert found.true.tolist() == [alone.accuracy for alone in run.trained]
    assert "than chance" not in found.verdict  # three networks are in order by chance once in six times


def test_what_was_trained_but_not_judged_is_judged(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the search would have: a run's random networks, for instance. From Python, only what was judged counts."""
    run = copied(whole, tmp_path)
    left_out, path = run.judged[-3:], run.folder / "architectures.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-3]))
    (run.folder / "submodels.jsonl").unlink()
    for number, net in enumerate(left_out):
        record = {"net": net.architecture.to_json(), "accuracy": 0.1 * number, "seed": 0, "images": 9, "recipe": {}}
        note_trained(RunFolder(run.folder), f"random-{number}", record)
    with pytest.raises(ValueError, match=rf"not 0.*pynas retrain {run.folder} --net NUMBER"):
        rank(Run.open(run.folder), run.trained)
    found = rank_run(str(run.folder), quiet=True)
    assert found.predicted.tolist() == [net.accuracy for net in left_out]
    assert len((run.folder / "submodels.jsonl").read_text().splitlines()) == 3
    (run.folder / "checkpoints" / "search.pt").unlink()
    assert main(["rank", str(run.folder)]) == 1
    assert "Only networks that were judged in the search count. There are no weights" in capsys.readouterr().out


def test_picture_that_is_no_png(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(whole.folder), "--path", str(tmp_path / "ranking.pdf")]) == 1
    assert "not as 'ranking.pdf'. Give a name that ends in .png" in capsys.readouterr().err


def test_trainings_by_one_recipe_are_compared(whole: Run, tmp_path: Path) -> None:
    """The recipe of most networks counts, of several such the last; seeds of a network are averaged."""
    folder = RunFolder(tmp_path)
    assert read_trained(folder) == ()
    first, second = ([net.architecture.to_json() for net in whole.judged[i : i + 3]] for i in (0, 3))

    def train(stage: str, net: str, accuracy: float, recipe: int, seed: int = 0) -> None:
        record = {"net": net, "accuracy": accuracy, "seed": seed, "images": 9, "recipe": {"epochs": recipe}}
        note_trained(folder, stage, record)

    train("a", first[0], 0.5, recipe=1)
    train("b", first[0], 0.6, recipe=1, seed=1)
    train("b", first[0], 0.7, recipe=1, seed=1)  # the same stage again
    kept = (tmp_path / "trained.jsonl").read_text()
    train("a", first[0], 0.5, recipe=1)  # a stage that a break made run twice
    assert (tmp_path / "trained.jsonl").read_text() == kept
    (alone,) = read_trained(folder)
    assert (alone.accuracy, alone.seeds, alone.recipe) == (pytest.approx(0.6), (0, 1), {"epochs": 1})
    train("c", second[0], 0.9, recipe=2)
    assert [each.recipe for each in read_trained(folder)] == [{"epochs": 2}]
    train("d", first[1], 0.8, recipe=1)
    assert [each.architecture.to_json() for each in read_trained(folder)] == first[:2]
    (tmp_path / "trained.jsonl").write_text('{"stage": "a"}\n')
    with pytest.raises(ValueError, match="trained.jsonl is broken"):
        read_trained(folder)
    (tmp_path / "trained.jsonl").write_text('{"stage": "a')
    with pytest.raises(ValueError, match=r"trained.jsonl, line 1 is broken. Remove the line and resume.$"):
        read_trained(folder)


def test_nas_bench_macro_ranks_a_run_of_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = shared_data(MACRO)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    small = {"input_size": 8, "width": 0.125, "head_channels": 32}
    write_table("board", "macro", {**small, "classes": 10})
    strategy = FairNAS(epochs=1, batch_size=48, lr=0.05, evaluations=12, calibrate=32)
    run = pynas.search(
        device="board", out=str(tmp_path / "runs"), **{**SEARCH, "space_options": small, "strategy": strategy}
    )
    table = pynas.read_truth(truth)
    found = rank(run, table)
    assert len(found.keys) == 12
    assert found.true.tolist() == [table.accuracy[word] for word in found.keys]
    assert found.kendall.value is not None
