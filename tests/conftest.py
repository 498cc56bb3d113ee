"""Fixed seeds, one thread, and folders of its own for every test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pynas
from cost_models.analytic import Roofline
from cost_models.base import CostModel


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written: tables of devices lie in a folder of the test's own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.delenv("PYNAS_DATA", raising=False)


@pytest.fixture
def model() -> CostModel:
    """Latency in milliseconds of an imagined small core; no device is needed."""
    return Roofline(gmacs_per_s=2.0, gbytes_per_s=4.0, overhead_us=10.0)


@pytest.fixture
def board(tmp_path: Path) -> str:
    """A device whose table covers `fbnet_tiny`, filled from a roofline; returns its name."""
    from tables import write_table

    return write_table("board")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder of tables with that of the device "board", for the space of `runs.QUICK`."""
    from runs import SPACE
    from tables import write_table

    folder = tmp_path_factory.mktemp("home-of-all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        write_table("board", options={**SPACE, "classes": 10})
    return folder


def _search(home: Path, out: Path, **settings: Any) -> pynas.Run:
    from runs import QUICK

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("XDG_DATA_HOME", str(home))
        return pynas.search(device="board", out=str(out), **{**QUICK, **settings})


@pytest.fixture(scope="session")
def unbroken(home: Path, tmp_path_factory: pytest.TempPathFactory) -> pynas.Run:
    """A whole run of `runs.QUICK`, to be read; `runs.copied` gives one to write to."""
    return _search(home, tmp_path_factory.mktemp("unbroken"))


@pytest.fixture(scope="session")
def searched_once(home: Path, tmp_path_factory: pytest.TempPathFactory) -> pynas.Run:
    return _search(home, tmp_path_factory.mktemp("searched"), retrain=False)


@pytest.fixture
def searched(searched_once: pynas.Run, tmp_path: Path) -> pynas.Run:
    """A run of the test's own that has been searched, and has trained nothing yet."""
    from runs import copied

    return copied(searched_once, tmp_path / "searched")
