"""Fixed seeds, one thread, and folders of its own for every test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
