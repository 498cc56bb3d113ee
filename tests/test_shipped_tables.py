"""The tables that come with the package: honest labels, whole spaces, usable offline without TVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tables import write_table

import cost_models
import pynas
from cost_models.places import SHIPPED
from cost_models.trust import self_check
from pynas import FBNet, Recipe
from pynas.console import Show
from pynas.plan import make_space, open_elsewhere, space_specs
from pynas.supernet import cost_table

CORES = ("cortex-a55", "cortex-a72", "neoverse-n1")
SPACES = ("fbnet", "fbnet32", "fbnet_tiny")
QUICK: dict[str, Any] = {
    "strategy": FBNet(epochs=2, warmup_epochs=1, batch_size=64, samples=2),
    "recipe": Recipe(epochs=1, batch_size=64),
    "limit": 200,
    "baseline": 0,
    "quiet": True,
}


def test_all_that_is_shipped_is_known_here() -> None:
    assert sorted(folder.name for folder in SHIPPED.iterdir()) == sorted(CORES)


@pytest.mark.parametrize("core", CORES)
def test_nothing_modelled_is_called_measured(core: str) -> None:
    table = cost_models.load(core)
    assert (table.provenance.source, table.provenance.runner) == ("modelled", "tvm-model")
    assert "modelled" in table.describe()
    assert "measured" not in table.describe()
    again = f"pynas measure --runner tvm-model --core {core} --space SPACE"
    assert table.provenance.machine["rebuild"] == again


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_covered_without_a_fault(core: str, name: str) -> None:
    space = make_space(name, {})
    table = cost_models.load(core, strict=True)
    assert set(cost_table(space, table).sources) == {"modelled"}
    assert [finding for finding in self_check(table, space_specs(space)) if finding.check != "order"] == []


@pytest.mark.parametrize("name", SPACES)
def test_a_server_core_is_faster_than_a_phone_core(name: str) -> None:
    fast, slow = (cost_table(make_space(name, {}), cost_models.load(core)) for core in ("neoverse-n1", "cortex-a55"))
    assert bool((fast.values <= slow.values).all())
    assert fast.fixed < slow.fixed


def test_search_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    run = pynas.search(
        device="cortex-a72",
        latency_ms=0.15,
        out=str(tmp_path),
        **QUICK,
    )
    figures = run.figures
    assert 0.9 * 0.15 <= figures["predicted_ms"] <= 0.15
    assert figures["measured_ms"] is None
    assert figures["elsewhere"] == []
    assert "modelled on Cortex-A72" in figures["device"]


def test_a_result_is_priced_on_the_board_that_most_people_have(board: str, tmp_path: Path) -> None:
    run = pynas.search(
        device=board,
        out=str(tmp_path),
        **QUICK,
    )
    (price,) = run.figures["elsewhere"]
    table = cost_table(make_space("fbnet_tiny", {}), cost_models.load("cortex-a72"))
    assert price["predicted_ms"] == pytest.approx(table.cost(run.best))
    assert (price["device"], price["source"], price["fitted"]) == ("cortex-a72", "modelled", 0)

    (run.folder / "result.json").unlink()  # as if stopped before, and the table made anew since
    other = cost_models.load(write_table("cortex-a72"))
    assert cost_table(make_space("fbnet_tiny", {}), other).cost(run.best) != pytest.approx(price["predicted_ms"])
    resumed = pynas.search(resume=str(run.folder), quiet=True)
    assert resumed.figures["elsewhere"] == [price]


def test_a_damaged_table_of_another_device_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = cost_models.device_folder("cortex-a72")
    broken.mkdir(parents=True)
    (broken / "device.toml").write_text("name = ")
    assert open_elsewhere(make_space("fbnet_tiny", {}), "host", Show()) == ()
    assert "cortex-a72 is left out of the result" in capsys.readouterr().out
