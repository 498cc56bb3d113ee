"""Rank correlations and regret against a truth."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from shared import MACRO, shared_data

from pynas import SPACES, Architecture, rank, read_truth
from pynas.rank import scatter, write_png


def named(values: Any) -> dict[str, float]:
    return {f"net{index}": float(value) for index, value in enumerate(values)}


def tau_b(a: list[int], b: list[int]) -> float:
    """Kendall's tau-b by its definition."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    over = sum(x * y for x, y in signs)
    return float(over / np.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_kendall_is_tau_b(pairs: list[tuple[int, int]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    found = rank(named(a), named(b), resamples=1)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found.kendall.value is None
        assert found.spearman.value is None
        assert "order nothing" in found.verdict
        assert "nan" not in str(found).lower()
    else:
        assert found.kendall.value == pytest.approx(tau_b(a, b))


def test_tau_of_the_paper() -> None:
    """13 networks in the article: 76 of 78 pairs in order is its 0.9487."""
    true = np.arange(13)
    guessed = true.copy()
    guessed[[3, 4]], guessed[[8, 9]] = guessed[[4, 3]], guessed[[9, 8]]
    assert rank(named(guessed), named(true)).kendall.value == pytest.approx(74 / 78)
    assert round(74 / 78, 4) == 0.9487


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=3, max_size=6), st.integers(1, 6))
def test_regret_is_the_mean_over_ways_to_break_ties(pairs: list[tuple[int, int]], k: int) -> None:
    found = rank(named(x for x, _ in pairs), named(y for _, y in pairs), k=(k,), resamples=1)
    if k > len(pairs):
        assert not found.regret
        return
    orders = [order for order in itertools.permutations(pairs) if sorted(order, key=lambda p: -p[0]) == list(order)]
    best = [max(y for _, y in order[:k]) for order in orders]
    assert found.regret[k].value == pytest.approx(max(y for _, y in pairs) - float(np.mean(best)))


def test_regret_is_never_negative() -> None:
    """The mean of equal numbers rounds above them."""
    tied = {str(number): 0.1 for number in range(11)}
    for true in (0.1667, 0.5833, 0.9267):
        ranking = rank(tied, dict.fromkeys(tied, true), k=range(1, 12), resamples=3)
        assert min(estimate.low or 0.0 for estimate in ranking.regret.values()) >= 0


def test_intervals_are_seeded_and_hold_the_value() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=80)
    guessed = true + random.normal(size=80)
    first, again = (rank(named(guessed), named(true), resamples=300) for _ in range(2))
    assert first.kendall == again.kendall
    assert first.regret == again.regret
    assert rank(named(guessed), named(true), resamples=300, seed=1).kendall != first.kendall
    for estimate in (first.kendall, first.spearman):
        assert estimate.low is not None
        assert estimate.low < estimate.value < estimate.high  # type: ignore[operator]
    assert first.spearman.value == pytest.approx(spearmanr(guessed, true).statistic)
    assert "better than chance" in first.verdict
    assert "worse than chance" in rank(named(-guessed), named(true), resamples=300).verdict
    noise = rank(named(random.normal(size=80)), named(true), resamples=300)
    assert "Not resolved" in noise.verdict


def test_interval_of_kendall_has_its_coverage() -> None:
    """Normal pairs of correlation 0.6 have tau 2 / pi * asin(0.6): about 90 % of 90 % intervals hold it."""
    random, tau = np.random.default_rng(1), 2 / np.pi * np.arcsin(0.6)
    held, widths = 0, []
    for _ in range(40):
        a = random.normal(size=30)
        b = 0.6 * a + 0.8 * random.normal(size=30)
        found = rank(named(a), named(b), resamples=50, level=0.9, k=()).kendall
        assert found.low is not None
        assert found.high is not None
        held += found.low <= tau <= found.high
        widths.append(found.high - found.low)
    assert held >= 30
    assert 0.2 < float(np.mean(widths)) < 0.45  # 3.3 standard deviations of tau, each about 0.1


@dataclass(frozen=True)
class Scored:
    architecture: Architecture
    accuracy: float


def architectures(count: int) -> list[Architecture]:
    space = SPACES.get("fbnet_tiny")()
    return [
        Architecture(space.name, {c.name: (c.options[(i + j) % 9],) for j, c in enumerate(space.choices())})
        for i in range(count)
    ]


def test_runs_architectures_and_fingerprints_go_together() -> None:
    nets = architectures(5)
    scores = [Scored(net, index / 10) for index, net in enumerate(nets)]
    trained = [Scored(net, index / 5) for index, net in enumerate(nets)]
    run = SimpleNamespace(candidates=scores)
    for predicted in (scores, run, {score.architecture.fingerprint: score.accuracy for score in scores}):
        found = rank(predicted, trained, resamples=10)
        assert found.kendall.value == pytest.approx(1)
        assert found.keys == tuple(net.fingerprint for net in nets)


@pytest.mark.parametrize(
    ("predicted", "truth", "changes", "says"),
    [
        ({"a": 1, "b": 2, "x": 3}, {"a": 1, "b": 2, "c": 3}, {}, "1 of 3 predicted networks .* 'x'"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}, {}, "at least 3"),
        ({"a": 1, "b": 2, "c": float("nan")}, {"a": 1, "b": 2, "c": 3}, {}, "'c' has the predicted value nan"),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}, {"k": (0,)}, "Each k"),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}, {"level": 1.0}, "level"),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}, {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input_is_told(predicted: Any, truth: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rank(predicted, truth, **changes)


def test_a_network_with_two_scores_is_told() -> None:
    net = architectures(1)[0]
    with pytest.raises(ValueError, match="comes twice"):
        rank([Scored(net, 0.1), Scored(net, 0.2)], [Scored(net, 0.1)])


# Truth tables

ROW = {"test_acc": [90.0, 91.0], "params": 10, "flops": 20}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "truth.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_truth_is_read(tmp_path: Path) -> None:
    truth = read_truth(written(tmp_path, {"01201201": {**ROW, "mean_acc": 1}, "00000000": ROW, "22222222": ROW}))
    assert truth.accuracy["01201201"] == pytest.approx(0.905)
    assert truth.seeds["01201201"] == (0.9, 0.91)
    assert (truth.params["00000000"], truth.macs["00000000"]) == (10, 20)
    assert rank({"01201201": 1, "00000000": 2, "22222222": 3}, truth).verdict.startswith("All 3 true accuracies")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ([], "JSON object"),
        ({}, "JSON object"),
        ({"0120120": ROW}, "8 digits.*another space than 'macro'"),
        ({"0120120x": ROW}, "8 digits"),
        ({"01201203": ROW}, "option 3 at choice 8, which has 3.*another space"),
        ({"01201201": {"test_acc": [90.0]}}, "row '01201201' must be an object with test_acc, params, flops"),
        ({"01201201": {**ROW, "test_acc": []}}, "list of percentages"),
        ({"01201201": {**ROW, "test_acc": [float("nan")]}}, "list of percentages"),
        ({"01201201": {**ROW, "test_acc": [101]}}, "list of percentages"),
        ({"01201201": {**ROW, "flops": 1.5}}, "whole number"),
    ],
)
def test_broken_truth_is_told(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_truth(written(tmp_path, content))


def test_missing_truth_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no truth table"):
        read_truth(tmp_path / "none.json")


def test_truth_of_another_space_is_told(tmp_path: Path) -> None:
    truth = read_truth(written(tmp_path, {"01201201": ROW}))
    with pytest.raises(ValueError, match="networks of space 'macro', not of 'fbnet_tiny'"):
        rank([Scored(net, 0.5) for net in architectures(3)], truth)
    with pytest.raises(ValueError, match="is it of the same space"):
        rank({"a": 1.0, "b": 2.0, "c": 3.0}, truth)


def test_truth_of_other_numbers_of_options(tmp_path: Path) -> None:
    space = SPACES.get("fbnet_tiny")()
    nets = architectures(4)
    rows = {"".join(str((i + j) % 9) for j in range(6)): {**ROW, "test_acc": [50.0 + i]} for i in range(4)}
    truth = read_truth(written(tmp_path, rows), space=space.name, options=[9] * 6)
    found = rank([Scored(net, -index) for index, net in enumerate(nets)], truth, resamples=10)
    assert found.kendall.value == pytest.approx(-1)


def test_nas_bench_macro() -> None:
    """What its authors say of it: 6,561 networks, 22212220 the best; two seeds rank alike to .980."""
    truth = read_truth(shared_data(MACRO))
    assert len(truth.accuracy) == 6561
    best = max(truth.accuracy, key=lambda key: truth.accuracy[key])
    assert truth.accuracy["22212220"] == truth.accuracy[best] == pytest.approx(0.93127, abs=1e-5)
    assert (truth.params["22212220"], truth.macs["22212220"]) == (1985514, 85164544)
    one = {key: seeds[0] for key, seeds in truth.seeds.items()}
    two = {key: seeds[1] for key, seeds in truth.seeds.items()}
    assert rank(one, two, resamples=3).spearman.value == pytest.approx(0.980, abs=5e-4)
    assert rank({k: float(v) for k, v in truth.macs.items()}, truth, resamples=3).spearman.value == pytest.approx(
        0.748, abs=5e-4
    )


# Figures


def test_scatter_shows_every_network(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ranking = rank(named(random.random(20)), named(random.random(20)), resamples=50)
    figure = scatter(ranking, colours=named(range(20)), colour_name="MACs")
    axes, bar = figure.axes
    assert len(axes.collections[0].get_offsets()) == 20
    np.testing.assert_array_equal(np.asarray(axes.collections[0].get_offsets())[:, 0], ranking.predicted)
    assert f"{ranking.kendall.value:.3f}" in axes.get_title()
    assert bar.get_ylabel() == "MACs"
    path = write_png(figure, tmp_path / "scatter.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["scatter.png"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_png(figure, tmp_path / "none" / "scatter.png")
    with pytest.raises(ValueError, match="lacks 20 networks"):
        scatter(ranking, colours={})


def test_scatter_of_constant_predictions() -> None:
    ranking = rank(named([0.1] * 5), named(range(5)))
    assert ranking.verdict == "All 5 predictions are 0.1: they order nothing."
    assert "not defined" in scatter(ranking).axes[0].get_title()
