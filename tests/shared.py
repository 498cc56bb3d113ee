"""Data that the repository does not hold: tests that need it are skipped where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MACRO = "nas_bench_macro/nas-bench-macro_cifar10.json"
BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file or folder of the shared data, in $PYNAS_SHARED_DATA or else in shared/data beside the repository.

    Skips the running test where it is not there.
    """
    path = Path(os.environ.get("PYNAS_SHARED_DATA") or BESIDE) / name
    if not path.exists():
        pytest.skip(f"needs the shared data {name}; set PYNAS_SHARED_DATA to the folder that holds it")
    return path
