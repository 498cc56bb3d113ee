"""Reports: what they show of finished, broken and hostile runs, how they are written, and the list of runs."""

from __future__ import annotations

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import cell_run
from report_checks import Page, checked
from runs import copied
from test_strategies import BRANCHES, SHORT

import pynas
from pynas import STRATEGIES, EvolutionSettings, Recipe, Run, api, settings
from pynas.cli import COMMANDS, main
from pynas.plots.style import DARK
from pynas.report import head, svg
from pynas.report.page import report
from pynas.report.parts import Listing
from pynas.report.ranks import as_plain
from pynas.report.sections import SECTIONS, build
from pynas.report.sources import command, in_lines
from pynas.report.told import Told
from pynas.timed_nets import random_nets
from pynas.training.run import RunFolder

PLOTS = (pynas.plot_curves, pynas.plot_entropy, pynas.plot_latency, pynas.plot_layers, pynas.plot_network,
         pynas.plot_theta, pynas.plot_trained)  # fmt: skip


@pytest.fixture(scope="module")
def page(unbroken: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return checked(report(unbroken, path=path, quiet=True))


def test_a_finished_run_has_every_section_that_it_can_have(page: Page, unbroken: Run) -> None:
    keys = [planned.key for planned in SECTIONS]
    assert page.sections == [key for key in keys if key not in ("cells", "deployment", "ranking", "comparison")] + [
        "left-out"
    ]
    found = {"Found against random", "Layer by layer", "Where the latency goes", "Predicted and measured"}
    searched = {"Entropy", "Probability of every option", "Loss", "Accuracy", "Temperature", "Expected latency"}
    assert found | searched <= set(page.titles)
    said = " ".join(page.words)
    assert f"{unbroken.figures['test_accuracy']:.2%}" in said
    assert "roofline" in said  # where the latencies come from
    assert "space 'fbnet_tiny' has no cells" in said
    assert "pynas search" in said


def test_numbers_of_the_page_are_those_of_the_run(page: Page, unbroken: Run) -> None:
    (layers,) = [shown for shown in page.figures if shown.title == "Where the latency goes"]
    rows = np.array(layers.cells[6:]).reshape(-1, 6)
    assert sum(float(ms) for ms in rows[:, 2]) == pytest.approx(unbroken.figures["predicted_ms"], rel=1e-3)
    (theta,) = [shown for shown in page.figures if shown.title == "Probability of every option"]
    table = np.array(theta.cells[11:]).reshape(3, 11)
    assert table[:, 1:10].astype(float).sum(1) == pytest.approx([1, 1, 1], abs=0.01)
    assert table[:, 10].tolist() == [options[0] for options in unbroken.best.choices.values()]


def test_same_run_same_page(page: Page, unbroken: Run, tmp_path: Path) -> None:
    again = checked(report(str(unbroken.folder), path=tmp_path / "again.html", quiet=True))
    assert (again.words, again.styles, again.figures) == (page.words, page.styles, page.figures)


def test_a_run_of_cells(tmp_path: Path) -> None:
    """Strips of cells and credit, and a search that trained nothing yet."""
    run = cell_run(tmp_path)
    page = checked(report(run, quiet=True))
    assert {"Cells over the epochs", "Credit of edges", "Layer by layer"} <= set(page.titles)
    assert (run.folder / "report.html").is_file()
    assert "its network was not trained" in " ".join(page.words)


def shown(run: Run) -> tuple[set[str], dict[str, str]]:
    """Titles of what a report would show, and what it leaves out with the reasons."""
    sections, left = build(Told.of(run.folder))
    titles = [getattr(part, "title", "") for section in sections for part in section.parts]
    return set(titles), dict(left)


def test_a_search_in_progress(unbroken: Run, tmp_path: Path) -> None:
    """Theta is read from the checkpoint, and what is not there yet is named."""
    run = copied(unbroken, tmp_path)
    for name in ("architectures.jsonl", "result.json", "theta.npy", "trained.jsonl"):
        (run.folder / name).unlink()
    titles, left = shown(run)
    assert {"Probability of every option", "Loss"} <= titles
    assert left["Layer by layer"] == "the search has not finished"
    assert "searching, epoch 3 of 3" in head.verdict(Told.of(run.folder))
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "checkpoints" / "search.pt").unlink()
    page = checked(report(run.folder, quiet=True))
    assert page.titles == []
    assert "no epoch is finished" in " ".join(page.words)


def test_a_broken_file_costs_its_part_alone(unbroken: Run, tmp_path: Path) -> None:
    run = copied(unbroken, tmp_path)
    for broken in ("theta.npy", "device/latency.csv", "ranking.json"):
        (run.folder / broken).write_text("{")
    titles, left = shown(run)
    assert {"Layer by layer", "Entropy", "Loss", "Predicted and measured"} <= titles
    assert "theta.npy is broken" in left["Theta"]
    assert "latency.csv" in left["Where the latency goes"]
    assert "ranking.json is broken" in left["Ranking"]
    assert "Sources of the numbers" not in left


def test_hostile_names_are_text(unbroken: Run, tmp_path: Path) -> None:
    """Class names, paths and whatever stands in a file of the run come out as they are, and as nothing else."""
    evil = "<script>alert('x')</script><img src=http://e.vil onerror=y>\"'&$\\frac$"
    run = copied(unbroken, tmp_path)
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**config, "data": f"/images/{evil}", "device": evil}))
    figures = json.loads((run.folder / "result.json").read_text())
    figures |= {"device": f"{evil}: measured", "kernels": evil, "measured_ms": 1.0, "measured_spread_ms": 0.1}
    (run.folder / "result.json").write_text(json.dumps(figures))
    environment = json.loads((run.folder / "env.json").read_text())
    (run.folder / "env.json").write_text(json.dumps({**environment, "system": evil}))
    moved = run.folder.rename(tmp_path / "<b>run")
    text = report(moved, quiet=True).read_text()
    page = Page(text)
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert evil in "".join(page.words)
    assert "<script" not in text
    assert checked(report([moved, unbroken], path=tmp_path / "both.html", quiet=True))


def test_several_runs_are_compared(unbroken: Run, searched_once: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(unbroken.folder), str(searched_once.folder), "--quiet", "true"]) == 0
    page = checked(tmp_path / "report.html")
    assert page.sections[:4] == ["runs", "found", "curves", "networks"]
    assert page.titles.count(str(unbroken.folder)) == page.titles.count(str(searched_once.folder)) == 1
    assert "searched, not trained" in page.words


def test_what_rank_found_is_shown(unbroken: Run, tmp_path: Path) -> None:
    run = copied(unbroken, tmp_path)
    space = run.best.search_space()
    nets = [candidate.architecture.fingerprint for candidate in run.candidates]
    nets = list(dict.fromkeys([*nets, *(net.fingerprint for net in random_nets(space, 4, 0))]))
    scores = {net: 0.4 + 0.1 * place for place, net in enumerate(nets)}
    found = pynas.rank(scores, scores)
    RunFolder(run.folder).write_json("ranking.json", as_plain(found))
    assert "Do scores of the search order networks?" in shown(run)[0]
    (run.folder / "ranking.json").unlink()
    (run.folder / "ranking.png").write_bytes(b"png")
    assert "Ranking" in shown(run)[0]


def test_what_deploy_wrote_is_shown(unbroken: Run, tmp_path: Path) -> None:
    run = copied(unbroken, tmp_path)
    made = pynas.deploy(run, formats="onnx,tflite", int8=False, repeats=1, quiet=True)
    (part,) = [
        part for section in build(Told.of(run.folder))[0] if section.key == "deployment" for part in section.parts
    ]
    assert isinstance(part, Listing)
    rows = {row[0]: row for row in part.table.rows}
    assert rows["net.onnx"][3] == f"{made.accuracy:.2%}"
    assert rows["net.onnx"][6] == ""
    assert len(rows) == 2
    assert f"Best for {made.device}: net.onnx" in part.table.note


@pytest.fixture
def begun(unbroken: Run, tmp_path: Path) -> Path:
    """A run that has asked for something, and done nothing yet."""
    return RunFolder.create(tmp_path / "begun", RunFolder(unbroken.folder).config()).path


def test_nothing_is_left_of_a_report_that_fails(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "place" / "report.html"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        report(begun, path=target)
    target.parent.mkdir()
    target.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="the disk is full"):
        report(begun, path=target, quiet=True)
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]


def test_errors_say_what_to_type(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "There is no run at" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "pynas report needs: runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"written as \.html, not as 'report.pdf'"):
        report(begun, path=tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="Name a run"):
        report([])
    (tmp_path / "config.yaml").write_text("space: fbnet_tiny\n")
    with pytest.raises(ValueError, match="is not that of a search"):
        report(tmp_path)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: str(plot.__name__))
def test_plots_return_figures(plot: Any, unbroken: Run) -> None:
    """Of the width that was asked for, from a run or its folder, in colours that dark pages have."""
    for given, width in ((unbroken, 340), (str(unbroken.folder), 720)):
        figure = plot(given, width=width)
        assert figure.get_figwidth() * 72 == pytest.approx(width)
        assert svg.to_svg(figure, "a").startswith("<svg")
    with pytest.raises(FileNotFoundError, match="There is no run"):
        plot("nowhere")


def test_labels_do_not_overlap(unbroken: Run) -> None:
    """Of the drawings that place their words themselves, at both widths."""
    deep = pynas.published("fbnet_c")
    for net in (unbroken.best, deep, pynas.published("snas_mild")):
        for width in (322, 1008):
            figure = pynas.plot_network(net, width)
            figure.set_dpi(72)  # so that extents are pixels of the page
            figure.draw_without_rendering()
            for axes in figure.axes:
                boxes = [text.get_window_extent() for text in axes.texts]
                assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)], (net, width)
                assert min(box.x0 for box in boxes) >= -1
                assert max(box.x1 for box in boxes) <= width + 1


def test_colours_have_counterparts() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([0, 1], color="#123456")
    with pytest.raises(ValueError, match="#123456 has no counterpart on dark pages"):
        svg.to_svg(figure, "a")
    assert set(DARK) == {colour.lower() for colour in DARK}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_command_asks_for_the_same_search(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says to type resolves to the settings of the run, through the real parser."""
    subsets = "one" not in STRATEGIES.get(name).PICKS
    asked = _defaults() | {"strategy": STRATEGIES.get(name)(**SHORT[name]), "seed": 3, "limit": 300, "threads": 1}
    if subsets:
        asked |= {"space": "repnas", "space_options": BRANCHES, "budget": 0.5, "latency_ms": None}
    else:
        asked |= {"recipe": Recipe(epochs=2, lr=0.1), "space_options": {"width": 0.5}, "data": "a folder/it's"}
    if STRATEGIES.get(name).PURSUES:
        asked |= {"objectives": "accuracy,macs", "limits": {"params": 1e6}, "directions": {"macs": "max"}}
        asked |= {"latency_ms": 0.5, "evolution": EvolutionSettings(population=12)}
    config = settings.resolve(asked)
    words = shlex.split(command(config))
    assert shlex.split(in_lines(command(config)).replace("\\\n", "")) == words
    assert words[:2] == ["pynas", "search"]
    seen: dict[str, Any] = {}

    @functools.wraps(api.search)
    def search(**given: Any) -> None:
        seen.update(given)

    monkeypatch.setitem(COMMANDS, "search", search)
    assert main(words[1:]) == 0
    assert settings.resolve(_defaults() | seen) == config


def _defaults() -> dict[str, Any]:
    import inspect

    return {name: p.default for name, p in inspect.signature(api.search).parameters.items()}


def test_runs_are_listed(unbroken: Run, searched: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(unbroken, tmp_path / "all")
    other = searched.folder.rename(tmp_path / "all" / "0002")
    RunFolder.create(tmp_path / "all", RunFolder.open(other).config())
    broken = RunFolder.create(tmp_path / "all", {"asked": "nothing"})
    (tmp_path / "all" / "no-run").mkdir()
    found = pynas.runs(tmp_path / "all", quiet=True)
    assert [listed.folder.name for listed in found] == ["0001", "0002", "0003", "0004"]
    assert [listed.status for listed in found[:3]] == ["finished", "searched, not trained", "begun"]
    assert "is not that of a search" in found[3].status
    assert found[0].accuracy == run.figures["test_accuracy"]
    assert found[1].accuracy == Run.open(other).candidates[0].accuracy
    assert main(["runs", str(tmp_path / "all")]) == 0
    said = capsys.readouterr().out
    assert "finished" in said
    assert broken.path.name in said
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert main(["runs", str(tmp_path / "all" / "no-run")]) == 0
    assert "There is no run in" in capsys.readouterr().out
