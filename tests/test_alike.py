"""Boards on which nothing works: said once, after a few ops."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_boards import Moody, measured
from toy_device import OPS

from cost_models import boards, load_folder
from cost_models.boards import Failed
from cost_models.plan import Incomplete


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "PAUSES_S", (0.0, 0.0, 0.0, 0.0))


def test_when_every_op_fails_alike_a_few_are_enough_to_know(tmp_path: Path) -> None:
    board = Moody([Failed(f"failed: no numpy in session {number}") for number in range(99)])
    with pytest.raises(Incomplete) as caught:
        measured(tmp_path, board)
    assert len(board.timed) == 3 * boards.TRIES
    assert set(board.timed) == {spec.key for spec in OPS[:3]}
    assert set(caught.value.missing) == set(OPS)
    said = str(caught.value)
    assert said.count("no numpy") == 1
    assert f"{OPS[0].key} and 2 more: The board failed: no numpy" in said
    assert (
        f"{OPS[3].key} and {len(OPS) - 4} more: not tried, because nothing came through and 3 had failed alike" in said
    )
    assert board.closed


@pytest.mark.parametrize("different", [True, False])
def test_ops_that_fail_in_different_ways_or_beside_good_ones_are_all_tried(tmp_path: Path, different: bool) -> None:
    bad = [Failed(f"lacks {word}") for word in ("a", "b", "c", "d") for _ in range(boards.TRIES)]
    moods = bad if different else [[1.0] * 3, *[Failed("crashed")] * (4 * boards.TRIES)]
    board = Moody(list(moods))
    with pytest.raises(Incomplete, match=f"4 of {len(OPS)} ops") as caught:
        measured(tmp_path, board)
    assert len(caught.value.missing) == 4
    assert len(load_folder(tmp_path).rows) == len(OPS) - 4
