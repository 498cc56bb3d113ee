"""The front door, end to end on real images: search, resume after kill -9, retrain, evaluate, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import QUICK, SPACE, copied
from tables import write_table
from test_strategies import equal

import pynas
from pynas import FBNet, RandomSearch, Recipe, Run
from pynas.budget import cost_range
from pynas.plan import make_space
from pynas.supernet import cost_table


@pytest.fixture
def device() -> str:
    return write_table("board", options={**SPACE, "classes": 10})


def test_search_to_onnx(unbroken: Run, tmp_path: Path) -> None:
    run, figures = copied(unbroken, tmp_path), unbroken.figures
    names = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "theta.npy",
        "architectures.jsonl",
        "best.json",
        "result.json",
        "baseline.jsonl",
        "device/device.toml",
        "device/latency.csv",
        "checkpoints/search.pt",
        "model/model.safetensors",
        "model/config.json",
        "export/net.onnx",
    }
    assert not [name for name in names if name.endswith(".tmp")]
    assert np.load(run.folder / "theta.npy").shape == (3, 3, 9)
    assert 0.9 * figures["budget_ms"] <= figures["predicted_ms"] <= figures["budget_ms"]
    assert figures["export"]["difference"] < 1e-3
    assert len(figures["baseline"]) == 1
    assert "modelled" in figures["device"]
    assert figures["measured_ms"] is None
    assert (run.best, run.candidates, run.figures) == (unbroken.best, unbroken.candidates, figures)
    assert pynas.evaluate(run, quiet=True) == pytest.approx(figures["test_accuracy"])

    trained = pynas.retrain(run, epochs=2, quiet=True)
    assert pynas.evaluate(trained, quiet=True) == pytest.approx(trained.accuracy)
    report = pynas.export(run, str(tmp_path / "again.onnx"), quiet=True)
    assert report.argmax_agreement == 1.0

    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "again.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(logits, trained.model(x).numpy(), atol=1e-4)


def test_search_learns(device: str, tmp_path: Path) -> None:
    """Ten classes, so chance is a tenth: a short search and training must be far above it."""
    settings = {**QUICK, "recipe": Recipe(epochs=15, batch_size=32), "limit": 800, "baseline": 0}
    run = pynas.search(device=device, out=str(tmp_path), **settings)
    assert run.figures["test_accuracy"] > 0.8


def test_random_strategy_through_the_front_door(device: str, tmp_path: Path) -> None:
    settings = {**QUICK, "strategy": RandomSearch(epochs=2, candidates=2, batch_size=48), "retrain": False}
    run = pynas.search(device=device, out=str(tmp_path), **settings)
    assert [candidate.origin for candidate in run.candidates] == ["random", "random"]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_budgets_are_met(share: float, tmp_path: Path) -> None:
    """Five budgets between the cheapest and the dearest net: the returned net is predicted within 0.9 to 1.0 of
    each."""
    device = write_table("board")
    bounds = cost_range(cost_table(make_space("fbnet_tiny", {}), pynas.cost_models.load(device)))
    budget = bounds.low + share * (bounds.high - bounds.low)
    strategy = FBNet(epochs=2, warmup_epochs=1, batch_size=48, samples=2)
    settings = {**QUICK, "strategy": strategy, "retrain": False, "space_options": {}, "limit": 150}
    run = pynas.search(device=device, latency_ms=budget, out=str(tmp_path), **settings)
    for candidate in run.candidates:
        assert 0.9 * budget <= candidate.cost <= budget


def test_without_a_budget_the_papers_loss_is_used(device: str, tmp_path: Path) -> None:
    run = pynas.search(device=device, latency_ms=None, out=str(tmp_path), **{**QUICK, "retrain": False})
    assert run.candidates
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["latency_ms"] is None


COMMAND = """
import sys, torch
import pynas
from runs import QUICK
torch.set_num_threads(1)
out, device, resume = sys.argv[1:]
if resume:
    pynas.search(resume=resume)
else:
    settings = {**QUICK, "quiet": False, "threads": 1}
    pynas.search(device=device, out=out, **settings)
"""


def launch(home: Path, out: Path, resume: str = "") -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).resolve().parent), *[entry for entry in sys.path if entry]])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(home)}
    command = [sys.executable, "-P", "-c", COMMAND, str(out), "board", resume]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def tensors(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True)["task"] for path in (folder / "checkpoints").glob("*.pt")}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 150
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def kill_in(stage: str, process: subprocess.Popen[str], run: Path) -> None:
    """Kill -9 in mid-epoch, some time after the first checkpoint of a stage."""
    wait_for(run / "checkpoints" / f"{stage}.pt")
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL


def same_end(first: Path, second: Path) -> None:
    """Theta, all weights and all figures of two runs are the same, bit for bit."""
    ends = [tensors(folder) for folder in (first, second)]
    assert ends[0].keys() == ends[1].keys() >= {"search.pt", "retrain.pt", "random-1.pt"}
    assert equal(*ends)
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for result in results:
        del result["export"]
    assert results[0] == results[1]
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (first, second)]
    assert lines[0] == lines[1]


def test_kill_9_and_resume(home: Path, unbroken: Run, tmp_path: Path) -> None:
    """Killed in mid-epoch without warning and resumed, in the search and again in the training: as the unbroken run."""
    run = tmp_path / "0001"
    kill_in("search", launch(home, tmp_path), run)
    assert not (run / "architectures.jsonl").exists()
    kill_in("retrain", launch(home, tmp_path, str(run)), run)
    assert not (run / "result.json").exists()
    pynas.search(resume=str(run), quiet=True)
    same_end(unbroken.folder, run)


def test_ctrl_c_saves_and_prints_the_resume_command(home: Path, unbroken: Run, tmp_path: Path) -> None:
    process, run = launch(home, tmp_path), tmp_path / "0001"
    wait_for(run / "checkpoints" / "search.pt")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"pynas search --resume {run}" in output
    pynas.search(resume=str(run), quiet=True)
    same_end(unbroken.folder, run)
