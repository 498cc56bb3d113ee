"""What importing costs, what runs as documentation, and that imports point down."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cost_models
import pynas

MODULES = [
    module.name
    for package in (pynas, cost_models)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith(("__main__", "._C"))
]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


IMPORTED = """
import json, sys
import pynas, pynas.export, torch
told = {"modules": list(sys.modules), "cuda": torch.cuda.is_initialized()}
sys.modules["tvm"] = None  # importing it fails from here on
told["table"] = pynas.cost_models.load("cortex-a72", strict=True).name
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a fresh process finds after importing the package."""
    told: dict[str, Any] = json.loads(run(IMPORTED))
    return told


def test_import_is_lean(imported: dict[str, Any]) -> None:
    heavy = {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "matplotlib",
        "jinja2",
        "pymoo",
        "tvm",
        "sklearn",
        "torchvision",
        "jsonargparse",
        "scipy",
        "torch._dynamo",
    }
    assert not heavy & set(imported["modules"])


def test_import_does_not_initialise_cuda(imported: dict[str, Any]) -> None:
    assert imported["cuda"] is False


def test_shipped_tables_need_no_tvm(imported: dict[str, Any]) -> None:
    assert imported["table"] == "cortex-a72"


def test_cost_models_need_no_torch() -> None:
    loaded = run("import sys, cost_models; print(' '.join(sys.modules))").split()
    assert not {"torch", "pynas"} & set(loaded)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "TVM is not installed" not in str(error):
            raise
        pytest.skip("TVM is not installed")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
    assert module.__doc__, f"{name} does not say what it is"


def test_public_names_are_documented() -> None:
    for name in pynas.__all__:
        assert getattr(pynas, name).__doc__, name


def test_export_and_fuse_are_functions() -> None:
    """Packages and functions share these names; the functions must win."""
    assert callable(pynas.export)
    assert callable(pynas.fuse)
    assert callable(pynas.published)
    assert callable(pynas.rank)
    assert callable(pynas.report)


def test_files_stay_small() -> None:
    for package in (pynas, cost_models):
        for path in Path(package.__path__[0]).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path
