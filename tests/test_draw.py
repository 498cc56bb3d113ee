"""Cells as graphs: what is drawn, of what, and into which files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import pynas
from pynas import Architecture, draw_cells, draw_credit, draw_strip, published
from pynas.draw import COLOURS, OTHER, save_figure
from pynas.ops.cell import NONE, OPTIONS
from pynas.reports import draw
from pynas.results import Run, write_candidates
from pynas.spaces.cell import CellSpace
from pynas.strategies import Candidate
from pynas.training.run import RunFolder

SPACE = CellSpace(input_size=8, cells=3, channels=2, nodes=3)
NOTHING = {choice.name: (NONE,) for choice in SPACE.choices()}


def net(**chosen: str) -> Architecture:
    return Architecture("cell", NOTHING | {name: (option,) for name, option in chosen.items()}, SPACE.options())


def texts(figure: Figure) -> list[list[str]]:
    return [[axes.get_title(loc="left") or axes.get_title(), *(text.get_text() for text in axes.texts)]
            for axes in figure.axes]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A search of three epochs in which edges die."""
    folder = RunFolder.create(tmp_path, {"objectives": None})
    write_candidates(folder, [Candidate(net(normal_0_2="skip_connect"), 0.5, 1.0, "argmax")])
    history = np.zeros((3, len(NOTHING), 8), dtype=np.float32)
    history[0, :, 4] = 1.0
    history[1, :, 0] = history[2, :, 0] = 1.0
    history[1, :2, 3] = history[2, 0, 3] = 2.0
    folder.write_array("theta.npy", history)
    for epoch in range(3):
        folder.log("search", epoch, {"credit": dict.fromkeys(NOTHING, 0.1 * epoch)})
    return Run.open(folder.path)


def test_every_edge_has_its_operation() -> None:
    (normal, reduction) = texts(draw_cells(published("snas_aggressive")))
    assert normal[0] == "normal cell: 8 edges"
    assert normal.count("sep conv 5x5") == 1
    assert normal.count("skip") == 5
    assert normal.count("dil conv 5x5") == 2
    assert reduction[0] == "reduction cell: 2 edges, 2 nodes vanished"
    assert set(COLOURS) == set(OPTIONS.names()) - {NONE}
    assert OTHER not in COLOURS.values()


def test_what_vanished_is_grey_and_its_edges_are_left_out() -> None:
    """Node 2 is not reached, so neither is what starts there."""
    figure = draw_cells(net(normal_1_3="max_pool_3x3", normal_2_4="sep_conv_3x3", normal_3_4="skip_connect"))
    normal, reduction = texts(figure)
    assert normal[0] == "normal cell: 2 edges, 1 node vanished"
    assert "sep conv 3x3" not in normal
    assert reduction[0] == "reduction cell: 0 edges, 3 nodes vanished"
    grey = {text.get_text() for text in figure.axes[0].texts if text.get_color() == "#767676"}
    assert grey == {"k-2", "n2"}


def test_labels_do_not_overlap() -> None:
    """Also where all 14 edges are there: every summit has a place of its own."""
    full = CellSpace()
    figure = draw_cells(Architecture("cell", {c.name: ("sep_conv_3x3",) for c in full.choices()}, full.options()))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 14 + 7
        apart = [not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
        assert all(apart)


def test_strip_of_epochs(run: Run) -> None:
    titles = [text[0].split("\n")[-1] for text in texts(draw_strip(run))]
    assert (
        titles
        == ["9 edges", "2 edges, 2 nodes vanished", "1 edge, 2 nodes vanished"]
        + ["9 edges"]
        + ["0 edges, 3 nodes vanished"] * 2
    )
    assert len(draw_strip(str(run.folder), columns=2).axes) == 4
    with pytest.raises(ValueError, match="columns must be a positive number"):
        draw_strip(run, columns=0)


def test_credit_of_edges(run: Run) -> None:
    figure = draw_credit(run)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [image.shape for image in images if image is not None and image.shape[1] == 3] == [(9, 3)] * 2


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_same_file_every_time(suffix: str, tmp_path: Path) -> None:
    files = [save_figure(draw_cells(published("snas_mild")), tmp_path / f"{i}.{suffix}").read_bytes() for i in (0, 1)]
    assert files[0] == files[1]
    assert files[0].startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    with pytest.raises(ValueError, match=r"\.png or \.svg, not as 'cells.pdf'"):
        save_figure(Figure(), tmp_path / "cells.pdf")


def test_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for what in ("cells", "epochs", "credit"):
        assert draw(str(run.folder), what=what) == run.folder / f"{what}.png"  # type: ignore[arg-type]
    assert draw("darts_v2", quiet=True) == Path("darts_v2.png")
    run.best.save("found.json")
    assert draw("found.json", "found.svg").is_file()
    assert "drawn: found.svg" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is drawn of a run"):
        draw("darts_v2", what="credit")
    with pytest.raises(ValueError, match="Did you mean 'darts_v2'"):
        draw("darts_v3")


def test_spaces_without_cells_and_runs_without_history(run: Run) -> None:
    with pytest.raises(ValueError, match="Space 'fbnet' has no cells to draw. Spaces that have: cell"):
        draw_cells(pynas.published("fbnet_a"))
    (run.folder / "theta.npy").unlink()
    with pytest.raises(ValueError, match="strategies snas and darts keep one"):
        draw_strip(run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    kept: list[dict[str, Any]] = [{**line, "credit": {}} for line in lines]
    RunFolder(run.folder).write_lines("metrics.jsonl", kept)
    with pytest.raises(ValueError, match="has no credit of edges"):
        draw_credit(run)
