"""The report of the experiment with SNAS's claims, on made-up results; and its pieces."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pynas

BENCH = Path(__file__).parents[1] / "bench"
GAP = {"snas": 0.02, "darts": -0.3, "single": -0.2, "uniform": 0.0}
TRAINED = {"snas": 0.7, "darts": 0.7, "single": 0.6, "uniform": 0.7}
NOISE = {"snas": 0.001, "darts": 0.001, "single": 0.001, "uniform": 0.05}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CELL_CLAIMS_TINY", "0")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cell_claims_report")


def child(accuracy: float, edges: int) -> dict[str, Any]:
    space = pynas.SPACES.get("cell")()
    names = [choice.name for choice in space.choices()]
    net = pynas.Architecture(
        "cell", {n: ("skip_connect" if i < edges else "none",) for i, n in enumerate(names)}, space.options()
    )
    sizes = {"params": 100 * edges, "macs": 1000 * edges, "edges": {"normal": edges, "reduce": 0}}
    both = {"accuracy": accuracy, "accuracy_without_recalibration": accuracy - 0.1}
    return {"net": net.to_json(), **both, **sizes, "nodes": {"normal": min(4, edges), "reduce": 0}}


def write(out: Path, bench: Any, arm: str, seed: int) -> None:
    """A search and, where there is one, a retraining."""
    kind, claims = arm.split("-")[0], importlib.import_module("cell_claims")
    random = np.random.default_rng([seed, *arm.encode()])
    rule = {"uniform": "draw", "snas": "argmax"}.get(kind, "top2")
    edges = 14 - 4 * bench.SNAS_ARMS.index(arm) if arm in bench.SNAS_ARMS else 8
    found = child(0.5 + GAP[kind] + random.normal(0, NOISE[kind]), edges)
    children = {rule: found} if kind == "uniform" else {"argmax": found, "top2": found}
    common = {"arm": arm, "seed": seed, "setting": dataclasses.asdict(claims.FULL), "training_cpu_s": 36.0}
    entropy = 0.5 if kind == "snas" else 2.0
    history = [{"gradient_passes": 10 * i, "mean_entropy": 2.08 - (2.08 - entropy) * i / 3} for i in range(1, 4)]
    told = json.loads(found["net"])["choices"]
    record = {
        **common,
        "kind": "search",
        "computed": {"gradient_passes": 30},
        "search_accuracy": 0.5,
        "rule": rule,
        "children": children,
        "most_probable_reads_image": arm != bench.SNAS_ARMS[-1],
        "history": history,
        "cells": [] if kind == "uniform" else [{name: options[0] for name, options in told.items()}] * 3,
    }
    out.mkdir(exist_ok=True)
    (out / f"{arm}-{seed}.json").write_text(json.dumps(record))
    if arm in bench.RETRAINED:
        accuracy = TRAINED[kind] + random.normal(0, 0.001)
        again = {**common, "kind": "retrain", "accuracy": accuracy, "params": 5, "macs": 6}
        (out / f"retrain-{arm}-{seed}.json").write_text(json.dumps(again))


def test_whole_report(bench: Any, tmp_path: Path) -> None:
    """Large differences are resolved, small or noisy ones are not."""
    for arm in bench.ARMS:
        for seed in bench.SEEDS:
            write(tmp_path, bench, arm, seed)
    text = bench.report(tmp_path)
    assert "21 searches, 15 retrainings" in text
    assert "No run is missing" in text
    assert "0.21 core-hours of searching, 0.15 core-hours of retraining" in text
    assert "gap, recalibrated, snas-0.01 against darts: resolved: snas-0.01 is higher; +32." in text
    assert "entropy, snas-0 against darts: resolved: darts is higher; -1.500 [" in text
    assert "retrained accuracy, snas-0.01 against darts: not resolved at this budget" in text
    assert "retrained accuracy, uniform against single: resolved: uniform is higher; +" in text
    assert "edges fall as eta grows in 3 of 3 seeds (seed 0: 14, 10, 6, 2;" in text
    assert "nodes fall as eta grows in 3 of 3 seeds (seed 0: 4, 4, 4, 2;" in text
    assert "| 0.25 | 2 | 0 | 2 | 0 | 200 | 2,000 |" in text
    assert "3 of 3 reached nothing and got an edge back" in text
    for name in ("claims", "sweep-0", "sweep-2", "strip-darts", "strip-snas-0.25"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.svg").exists()
    assert not (tmp_path / "strip-uniform.png").exists()


def test_difference_is_students(bench: Any) -> None:
    """Of 1, 2 and 3: mean 2, standard error 1/sqrt(3), quantile 4.3027 of two degrees of freedom."""
    records = {("a", seed): {"v": seed + 1} for seed in (0, 1, 2)} | {("b", seed): {"v": 0} for seed in (0, 1, 2)}
    found = bench.difference(records, "a", "b", lambda record: record["v"])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, abs=1e-5)
    assert not found.resolved  # the interval holds zero
    assert bench.difference(records, "a", "c", lambda record: record["v"]) is None


def test_partial_results(bench: Any, tmp_path: Path) -> None:
    write(tmp_path, bench, "darts", 0)
    write(tmp_path, bench, "snas-0.01", 0)
    text = bench.report(tmp_path)
    assert "Missing: uniform:0, uniform:1" in text
    assert "gap, bare, snas-0.01 against darts: not resolved at this budget; +3" in text
    assert "gap, bare, snas-0 against darts: no verdict, they have no seed in common." in text
    assert "edges fall as eta grows in 0 of 0 seeds (no seed is complete)" in text


def test_broken_results(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no result yet"):
        bench.report(tmp_path)
    write(tmp_path, bench, "darts", 0)
    write(tmp_path, bench, "single", 0)
    path = tmp_path / "darts-0.json"
    record = json.loads(path.read_text())
    record["setting"]["passes"] = 3
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="made with different sizes"):
        bench.report(tmp_path)
    path.write_text('{"kind": "search"}')
    with pytest.raises(SystemExit, match=r"darts-0\.json is no result"):
        bench.report(tmp_path)


def test_pieces(bench: Any, tmp_path: Path) -> None:
    claims = importlib.import_module("cell_claims")
    pieces = claims.pieces()
    assert len(pieces) == len(set(pieces)) == 36
    assert [claims.parse(piece)[1:] for piece in ("snas-0.25:2", "retrain-darts:0")] == [("snas-0.25", 2), ("darts", 0)]
    for wrong in ("foo:0", "darts", "darts:x"):
        with pytest.raises(SystemExit, match="Unknown piece"):
            claims.parse(wrong)
    with pytest.raises(SystemExit, match="Search first: "):
        claims.retrain(tmp_path, tmp_path, "darts", 0)


def test_arms_compute_the_same(bench: Any) -> None:
    """Bi-level DARTS has half the steps, of two passes each."""
    claims = importlib.import_module("cell_claims")
    space, steps = pynas.SPACES.get("cell")(), {}
    for arm in claims.ARMS:
        strategy = claims.strategy_of(arm, claims.FULL)
        strategy.suit(space)
        steps[arm] = strategy.length.total(None)  # from path_gradients alone
        passes = 2 if arm == "darts" else 1
        assert steps[arm] * passes == claims.FULL.passes
