"""The report of the ranking experiment, on made-up results."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pynas import rank, read_truth

BENCH = Path(__file__).parents[1] / "bench"
KEYS = ["".join(map(str, digits)) for digits in itertools.product(range(3), repeat=8)][::79]
NOISE = {"fairnas": 0.004, "spos": 0.004, "ef": 0.05, "one_shot": 0.05}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("macro_ranking_report")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    rows = {}
    for key in KEYS:
        good = 60 + 30 * np.mean([int(digit) for digit in key]) / 2
        accuracies = (good + random.normal(0, 0.3, 3)).tolist()
        rows[key] = {"test_acc": accuracies, "params": 10 + int(key, 3), "flops": 20 + int(key[::-1], 3)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows))
    return path


def write(out: Path, table: Path, bench: Any, name: str, seed: int, keys: list[str] = KEYS) -> dict[str, float]:
    """A result whose one-shot accuracies are the true ones with noise."""
    truth, random = read_truth(table), np.random.default_rng([seed, *name.encode()])
    found = {key: truth.accuracy[key] / 2 + random.normal(0, NOISE[name]) for key in keys}
    history = [
        {"share": share, "mean": 0.3 * share, "least": 0.2 * share, "most": 0.5 * share} for share in (0.5, 0.75, 1.0)
    ]
    record = {"strategy": name, "seed": seed, "path_gradients": bench.PATH_GRADIENTS, "updates": {}}
    out.mkdir(exist_ok=True)
    (out / f"{name}-{seed}.json").write_text(json.dumps({**record, "history": history, "accuracies": found}))
    return found


def test_whole_report(bench: Any, table: Path, tmp_path: Path) -> None:
    """Equally noisy strategies are not resolved, far noisier ones are."""
    out = tmp_path / "out"
    accuracies = {(n, s): write(out, table, bench, n, s) for n in bench.STRATEGY_NAMES for s in bench.SEEDS}
    text = bench.report(out, table, resamples=200)
    assert "12 runs, 84 networks" in text
    assert "No run is missing" in text
    assert "Trained on: cpu." in text
    assert "fairnas against spos: not resolved at this budget; tau" in text
    assert "fairnas against ef: resolved: fairnas ranks better; tau +" in text
    for (name, seed), found in accuracies.items():
        ranking = rank(found, read_truth(table), resamples=1, k=(10,))
        assert f"| `{name}` | {seed} | {ranking.kendall.value:.3f} [" in text
        assert f"| {ranking.spearman.value:.3f} | {100 * ranking.regret[10].value:.2f} |" in text  # type: ignore[operator]
    taus = [rank(accuracies["ef", seed], read_truth(table), resamples=1).kendall.value for seed in bench.SEEDS]
    assert f"| `ef` | mean | {np.mean(taus):.3f}, {min(taus):.3f} to {max(taus):.3f} |" in text  # type: ignore[type-var]
    assert "| `fairnas` | 15.0 (10.0 to 25.0) | 22.5 (15.0 to 37.5) | 30.0 (20.0 to 50.0) | 0 of 6 times |" in text
    assert (out / "macro_ranking.png").read_bytes().startswith(b"\x89PNG")
    assert bench.report(out, table, resamples=200) == text


def test_difference_is_paired_over_networks(bench: Any, table: Path, tmp_path: Path) -> None:
    """Two strategies of the same accuracies differ by nothing, under every resample."""
    out = tmp_path / "out"
    for seed in bench.SEEDS:
        record = json.loads(json.dumps(write(out, table, bench, "fairnas", seed)))
        path = out / f"fairnas-{seed}.json"
        twin = json.loads(path.read_text()) | {"strategy": "spos", "accuracies": record}
        (out / f"spos-{seed}.json").write_text(json.dumps(twin))
    results, _ = bench.read(out)
    truth = read_truth(table)
    taus = bench.Taus(results, truth, bench.common_keys(results, truth), 50)
    assert taus.difference("fairnas", "spos") == (0.0, 0.0, 0.0, list(bench.SEEDS))


def test_partial_results(bench: Any, table: Path, tmp_path: Path) -> None:
    """What is missing is named, and too few seeds resolve nothing."""
    out = tmp_path / "out"
    write(out, table, bench, "fairnas", 0)
    assert "no seed in common" in bench.report(out, table, resamples=20)
    write(out, table, bench, "ef", 0, KEYS[:40])
    write(out, table, bench, "one_shot", 1)
    text = bench.report(out, table, resamples=50)
    assert "3 runs, 40 networks" in text
    assert "Missing: fairnas:1, fairnas:2, spos:0" in text
    assert "fairnas against ef: not resolved at this budget (1 of 3 seeds); tau" in text
    assert "fairnas against one_shot: no verdict, they have no seed in common" in text
    (out / "fairnas-0.json").unlink()
    assert "No verdict: there is no run of fairnas" in bench.report(out, table, resamples=20)


def test_broken_results(bench: Any, table: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no result yet"):
        bench.report(tmp_path, table)
    write(tmp_path, table, bench, "ef", 0)
    path = tmp_path / "ef-0.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"path_gradients": 3}))
    with pytest.raises(SystemExit, match="took 3 path-gradients"):
        bench.report(tmp_path, table)
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"ef-0\.json is no result"):
        bench.report(tmp_path, table)
