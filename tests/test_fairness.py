"""Equal chances: what counts of updates say, and that each strategy that trains shared weights keeps its promise."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import QUICK

import pynas
from cost_models import Macs
from pynas import EF, SPACES, SPOS, Choice, FairNAS, FBNet, Gates, OneShot
from pynas.cli import main
from pynas.kernels.paths import uniform_paths
from pynas.strategies import Problem, Strategy
from pynas.strategies.fairnas import fair_round
from pynas.strategies.one_shot import kept_options
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed
from pynas.training.loop import Progress
from pynas.training.run import RunFolder
from pynas.updates import UpdateCounts, uniform_equal_probability, uniform_variance

SMALL = {"input_size": 8, "stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32}
LARGE_LR = {"lr": 0.05, "samples": 2}


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=8, limit=200)


def begun(strategy: Strategy, data: Data, space: str = "macro", batch_size: int = 32) -> Feed:
    torch.manual_seed(0)
    options = {**SMALL, "classes": 10} | ({"stem_stride": 1} if space.startswith("fairnas") else {})
    here = SPACES.get(space)(**options)
    strategy.prepare(Problem(here, cost_table(here, Macs()), None, 0.1, 0))
    return Feed(data, batch_size=batch_size, seed=0)


def run(strategy: Strategy, feed: Feed, epochs: int = 1) -> dict[str, Any]:
    for epoch in range(epochs):
        for step in range(strategy.steps(feed, epoch)):
            strategy.step(feed, Progress(epoch, step))
        record = strategy.end_epoch(epoch)
    return record


def choices(count: int, options: int) -> list[Choice]:
    return [Choice(f"c{i}", tuple(f"o{j}" for j in range(options))) for i in range(count)]


# Definitions (PAPERS D2)


@pytest.mark.parametrize(("draws", "probability"), [(6, 0.015432), (12, 0.003438), (60, 7.456e-5), (600, 2.463e-7)])
def test_probability_of_equal_counts(draws: int, probability: float) -> None:
    assert uniform_equal_probability(draws, 6) == pytest.approx(probability, rel=2e-4)
    assert uniform_equal_probability(draws + 1, 6) == 0


def test_variance_of_uniform_counts() -> None:
    assert uniform_variance(6, 6) == pytest.approx(0.8333, abs=1e-4)
    assert uniform_variance(60, 6) == pytest.approx(8.333, abs=1e-3)


@pytest.mark.parametrize("draws", [6, 60])
def test_counts_of_uniform_paths_spread_as_they_must(draws: int) -> None:
    """SPOS's draws on 20,000 layers of six options: variance and share of equal counts, within five standard errors."""
    layers = 20_000
    counts = UpdateCounts(choices(layers, 6))
    for step in range(draws):
        counts.add_paths(uniform_paths(1, [6] * layers, seed=3, step=step))
    errors = (counts.counts - draws / 6).square()
    standard_error = float(errors.mean(1).std()) / math.sqrt(layers)
    assert abs(float(errors.mean()) - uniform_variance(draws, 6)) < 5 * standard_error
    p = uniform_equal_probability(draws, 6)
    equal = float((counts.counts == draws / 6).all(1).double().mean())
    assert abs(equal - p) < 5 * math.sqrt(p / layers)
    verdict = counts.verdict()
    assert (verdict.strict, verdict.expectation, verdict.path_gradients, verdict.paths) == (False, True, draws, 1)


def test_biased_draws_are_found_out() -> None:
    counts = UpdateCounts(choices(8, 4))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        paths = torch.multinomial(torch.tensor([1.3, 1.0, 1.0, 1.0]).expand(8, 4), 1, generator=generator).T
        counts.add_paths(paths)
    assert not counts.verdict().expectation


def test_chi_square_is_pearsons() -> None:
    from scipy.stats import chisquare

    counts = UpdateCounts(choices(1, 3))
    for option, times in enumerate((12, 9, 21)):
        for _ in range(times):
            counts.add_paths(torch.tensor([[option]]))
    assert counts.verdict().p == pytest.approx(chisquare([12, 9, 21]).pvalue)


def test_counts_of_gates_and_their_table() -> None:
    unequal = [Choice("a", ("x", "y")), Choice("b", ("x", "y", "z"))]
    counts = UpdateCounts(unequal)
    gates = {
        "a": Gates(torch.tensor([[0.25, 0.75], [0.75, 0.25]]), (0, 1), (0, 1)),
        "b": Gates(torch.tensor([0.0, 1.0, 0.0]), (0, 1, 2), (1,)),
    }
    counts.add_gates(gates)
    assert counts.table() == {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 0, "y": 1, "z": 0}}
    assert (counts.verdict().path_gradients, counts.verdict().strict) == (1.5, False)
    again = UpdateCounts(unequal)
    again.load_state_dict(counts.state_dict())
    counts.add_gates(gates)
    again.add_gates(gates)
    assert again.report() == counts.report()


# Strict fairness


@pytest.mark.parametrize("settings", [{}, {"batches": "each"}, {"unequal": "lcm"}], ids=str)
def test_strict_fairness_holds_after_every_step(settings: dict[str, Any], data: Data) -> None:
    strategy = FairNAS(epochs=2, batch_size=32, **LARGE_LR, **settings)
    feed = begun(strategy, data)
    steps = 0
    for epoch in range(2):
        for step in range(strategy.steps(feed, epoch)):
            strategy.step(feed, Progress(epoch, step))
            steps += 1
            assert (strategy.counts.counts == steps).all()
    report = strategy.end_epoch(1)
    assert report["updates"]["layer2"] == {"identity": steps, "k3_e3": steps, "k5_e6": steps}
    assert report["fairness"]["strict"]
    assert report["fairness"]["p"] == 1
    assert report["fairness"]["path_gradients"] == 3 * steps


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    options=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lcm=st.booleans(),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**6),
)
def test_layers_of_unequal_length(options: list[int], lcm: bool, seed: int, start: int) -> None:
    """Counts never differ by more than one, and not at all where the number of options divides that of the models."""
    models = math.lcm(*options) if lcm else max(options)
    if models > 100:
        models = max(options)
    counts = [torch.zeros(k, dtype=torch.int64) for k in options]
    for step in range(4 if start else 6):
        # From any step on: what was dealt before leaves a deck open at most.
        paths = fair_round(options, models, seed, start + step).long()
        assert paths.shape == (models, len(options))
        for layer, k in enumerate(options):
            counts[layer] += paths[:, layer].bincount(minlength=k)
            if models % k == 0:
                assert (counts[layer] == (step + 1) * models // k).all()
            else:
                assert int(counts[layer].max() - counts[layer].min()) <= (2 if start else 1)


def test_rounds_of_equal_layers_are_permutations_of_the_kernel() -> None:
    from pynas.kernels.paths import fair_paths

    assert torch.equal(fair_round([6] * 19, 6, 5, 8), fair_paths(1, [6] * 19, seed=5 + (6 << 32), step=8)[0])


def test_layers_are_independent() -> None:
    """Pairs of options of two layers meet equally often, also where the layers differ in their number of options."""
    rounds = torch.cat([fair_round([3, 3, 2], 6, 0, step) for step in range(2000)]).long()
    for other, k in ((1, 3), (2, 2)):
        met = (rounds[:, 0] * k + rounds[:, other]).bincount(minlength=3 * k).double()
        assert float(((met - met.mean()).square() / met.mean()).sum()) < 25


def test_order_of_the_models_makes_no_difference(data: Data) -> None:
    """PAPERS F17: gradients and weights, to the bit where one model had them, to rounding where all share them."""
    first = FairNAS(epochs=1, batch_size=32, **LARGE_LR)
    feed = begun(first, data, "fairnas")
    assert first.shared.net.net.head.dropout.p > 0
    other = copy.deepcopy(first)
    paths = fair_round(first.options, first.models, 0, 0).tolist()
    batch = first.shared.draw(feed, 1, "shared")[0]
    for strategy, order in ((first, paths), (other, paths[::-1])):
        torch.manual_seed(7)
        strategy.shared.update([(strategy.shared.gates(path), batch) for path in order], feed, 0)
    names = {name for name, _ in first.shared.net.named_parameters()}
    theirs = dict(other.shared.net.named_parameters())
    for name, parameter in first.shared.net.named_parameters():
        assert parameter.grad is not None
        assert theirs[name].grad is not None
        if ".options." in name:
            assert torch.equal(parameter.grad, theirs[name].grad), name
            assert torch.equal(parameter, theirs[name]), name
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=1e-5)
    assert any(".options." in name for name in names)
    buffers = dict(other.shared.net.named_buffers())
    for name, buffer in first.shared.net.named_buffers():
        if ".options." in name:
            assert torch.equal(buffer, buffers[name]), name


def test_gradients_of_a_step_are_summed(data: Data) -> None:
    """Algorithm 1: one update by the sum over the models, each taken at the weights before the step."""
    strategy = FairNAS(epochs=1, batch_size=32, lr=0.5, momentum=0.0, weight_decay=0.0, samples=1)
    feed = begun(strategy, data)
    net, shared = strategy.shared.net, strategy.shared
    before = copy.deepcopy(net.state_dict())
    paths = fair_round(strategy.options, strategy.models, 0, 0).tolist()
    batch = shared.draw(feed, 1, "shared")[0]
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for path in paths:
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(batch[0], shared.gates(path)), batch[1]).backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
    shared.update([(shared.gates(path), batch) for path in paths], feed, 0)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.5 * total[name], atol=1e-5, rtol=1e-4)


def test_what_does_not_run_stays_as_it_is(data: Data) -> None:
    """No decay and no momentum for options that a step has no gradient of."""
    strategy = SPOS(epochs=2, batch_size=32, **LARGE_LR)
    feed = begun(strategy, data)
    run(strategy, feed)
    before = {name: p.detach().clone() for name, p in strategy.shared.net.named_parameters()}
    counts = strategy.counts.counts.clone()
    strategy.step(feed, Progress(1, 0))
    drawn = strategy.counts.counts - counts
    for row, choice in enumerate(strategy.shared.net.choices):
        for column, option in enumerate(choice.options):
            inside = f".{choice.name}.mixed.options.{option}."
            moved = [not torch.equal(before[n], p) for n, p in strategy.shared.net.named_parameters() if inside in n]
            assert all(moved) if drawn[row, column] else not any(moved), (choice.name, option)


# The baselines, and equal budgets


@pytest.mark.parametrize(
    "strategy",
    [
        FairNAS(epochs=4, batch_size=32, path_gradients=61, **LARGE_LR),
        FairNAS(epochs=4, batch_size=32, path_gradients=60, batches="each", **LARGE_LR),
        SPOS(epochs=4, batch_size=32, path_gradients=60, **LARGE_LR),
        EF(epochs=4, batch_size=32, path_gradients=61, **LARGE_LR),
        EF(epochs=4, batch_size=32, path_gradients=60, batches="shared", **LARGE_LR),
        OneShot(epochs=4, batch_size=32, path_gradients=60, **LARGE_LR),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_equal_path_gradients(strategy: Any, data: Data) -> None:
    feed = begun(strategy, data)
    fairness = run(strategy, feed, epochs=4)["fairness"]
    tolerance = 0.1 if isinstance(strategy, OneShot) else 0
    assert fairness["path_gradients"] == pytest.approx(60, rel=tolerance)
    steps = [strategy.steps(feed, epoch) for epoch in range(4)]
    assert max(steps) - min(steps) <= 1
    # The cosine spans the whole training: its last step is small, whatever the budget.
    last = strategy.step(feed, Progress(3, steps[3] - 1))["lr"]
    assert 0 < last < 0.1 * strategy.lr


def test_a_pass_over_the_images_is_an_epoch(data: Data) -> None:
    """Without a budget: every batch once, in whole steps."""
    batches = len(data.weights) // 32
    for strategy, steps in (
        (FairNAS(batch_size=32), batches),
        (FairNAS(batch_size=32, batches="each"), batches // 3),
        (SPOS(batch_size=32), batches),
        (EF(batch_size=32), batches // 3),
        (EF(batch_size=32, batches="shared", repeats=6), batches),
        (OneShot(batch_size=32), batches),
    ):
        feed = begun(strategy, data)
        assert strategy.steps(feed, 0) == strategy.steps(feed, strategy.epochs - 1) == steps


def test_ef_repeats_a_path(data: Data) -> None:
    """k updates in a row, each on its own batch, and counts in multiples of k."""
    strategy = EF(epochs=1, batch_size=32, **LARGE_LR)
    feed = begun(strategy, data)
    strategy.step(feed, Progress(0, 0))
    assert sorted(strategy.counts.counts.flatten().tolist()) == [0] * 6 + [3] * 3
    assert feed.state_dict()["weights_step"] == 3
    norm: Any = strategy.shared.net.net.stem
    assert int(norm.bn.num_batches_tracked) == 3


def test_verdicts_of_the_strategies(data: Data) -> None:
    """The article's table: only FairNAS is strictly fair, SPOS and EF are fair in expectation."""
    found = {}
    for strategy in (
        FairNAS(epochs=6, batch_size=48, **LARGE_LR),
        SPOS(epochs=6, batch_size=48, **LARGE_LR),
        EF(epochs=6, batch_size=48, batches="shared", **LARGE_LR),
        OneShot(epochs=6, batch_size=48, **LARGE_LR),
    ):
        feed = begun(strategy, data, batch_size=48)
        fairness = run(strategy, feed, epochs=6)["fairness"]
        found[type(strategy).__name__] = (fairness["expectation"], fairness["strict"])
    assert found == {"FairNAS": (True, True), "SPOS": (True, False), "EF": (True, False), "OneShot": (True, False)}


def test_fbnet_is_not_fair(data: Data) -> None:
    """Soft gates favour what theta favours, and so do the gradients of the weights behind them."""
    strategy = FBNet(epochs=2, warmup_epochs=1, batch_size=8, tau_start=1.0)
    feed = begun(strategy, data, batch_size=8)
    with torch.no_grad():
        strategy.theta.logits[:, 1] += 2.0
    fairness = run(strategy, feed)["fairness"]
    assert fairness["path_gradients"] == 3 * feed.steps_weights
    assert not fairness["expectation"]
    assert not fairness["strict"]
    assert fairness["paths"] == 3  # all options run in every pass


def test_path_dropout_of_one_shot() -> None:
    """The rate of a layer of k options rises to drop^(1/k); one option stays; every option is dropped as often."""
    options, draws = [6, 3, 1], 4000
    for share in (0.0, 0.5, 1.0):
        kept = [kept_options(options, 0.05, share, 1, step) for step in range(draws)]
        for layer, k in enumerate(options):
            rate = share * 0.05 ** (1 / k)
            expected = (k * (1 - rate) + rate**k) / k
            shares = [sum(option in row[layer] for row in kept) / draws for option in range(k)]
            assert shares == pytest.approx([expected] * k, abs=5 * math.sqrt(0.25 / draws))
            assert all(row[layer] for row in kept)
    assert kept_options(options, 0.0, 1.0, 1, 0) == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0]]


def test_papers_schedule() -> None:
    """PAPERS D3."""
    for cls in (FairNAS, SPOS, EF, OneShot):
        strategy = cls.preset("paper")
        assert (strategy.epochs, strategy.batch_size, strategy.lr) == (150, 256, 0.045)
        assert (strategy.momentum, strategy.weight_decay, strategy.path_gradients) == (0.9, 4e-5, 0)


@pytest.mark.parametrize(
    ("cls", "settings", "says"),
    [
        (FairNAS, {"batches": "shard"}, "batches of strategy fairnas"),
        (FairNAS, {"lr": 0.0}, "lr > 0"),
        (SPOS, {"momentum": 1.0}, "momentum"),
        (SPOS, {"path_gradients": -1}, "path_gradients must not be negative"),
        (EF, {"repeats": -1}, "repeats"),
        (OneShot, {"drop": 1.0}, "drop must lie in"),
        (FairNAS, {"samples": 0}, "samples >= 1"),
    ],
    ids=str,
)
def test_impossible_hyper_parameters(cls: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**settings)


def test_too_many_models_a_step() -> None:
    class Space:
        name = "odd"

        def choices(self) -> list[Choice]:
            return [Choice(f"c{k}", tuple(map(str, range(k)))) for k in (5, 7, 9, 11)]

    with pytest.raises(ValueError, match="3465, is too many networks for a step. Use unequal='deal'"):
        FairNAS(unequal="lcm").suit(Space())  # type: ignore[arg-type]


# The front door


def test_table_of_runs(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search writes its counts, keeps what it judged, and the command prints the article's table."""
    quick = {**QUICK, "device": "board", "out": str(tmp_path), "retrain": False, "limit": 200}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home))
        for strategy in (FairNAS(epochs=2, batch_size=48, samples=3), SPOS(epochs=2, batch_size=48, samples=3)):
            run = pynas.search(**{**quick, "strategy": strategy})
            assert len(run.candidates) == 3
            assert (run.folder / "submodels.jsonl").read_text().count("\n") == 3
    capsys.readouterr()
    assert main(["fairness", str(tmp_path / "0001"), str(tmp_path / "0002")]) == 0
    out = capsys.readouterr().out
    assert [word for word in ("fairnas", "spos", "yes yes", "yes no", "6 to 6", "p=1") if word not in out] == []
    assert main(["fairness", str(tmp_path / "0003")]) == 1
    assert "There is no run at" in capsys.readouterr().err


def test_run_without_counts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, {"strategy": {"name": "fairnas"}})
    with pytest.raises(ValueError, match="no epoch of its search is finished"):
        pynas.fairness([str(folder.path)], quiet=True)
