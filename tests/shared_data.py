"""Data that tests use where it is at hand: too large, or under another licence, for this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MACRO = "nas_bench_macro/nas-bench-macro_cifar10.json"


def shared(name: str) -> Path:
    """A file of the folder named by PYNAS_SHARED_DATA, else of `../shared/data`; skips the test where it is absent."""
    folder = os.environ.get("PYNAS_SHARED_DATA")
    path = (Path(folder) if folder else Path(__file__).parents[2] / "shared" / "data") / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand; set PYNAS_SHARED_DATA to the folder that holds it")
    return path
