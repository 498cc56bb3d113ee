"""The contract of search strategies, for every registered one, on real images in seconds."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from report_checks import checked
from tables import write_table

import cost_models
from cost_models.analytic import Roofline
from cost_models.base import CostModel
from pynas import STRATEGIES, FBNet, RandomSearch, Supernet
from pynas.architecture import SPACES
from pynas.branch_budget import BranchBudget, branch_table
from pynas.budget import BudgetedPaths, cost_range
from pynas.report.page import report
from pynas.results import write_candidates
from pynas.strategies import Candidate, Problem, Strategy
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed
from pynas.training.loop import Diverged, Interrupted, Progress, train
from pynas.training.run import RunFolder

SHORT: dict[str, dict[str, Any]] = {
    "fbnet": {"epochs": 3, "warmup_epochs": 1, "batch_size": 48, "samples": 3, "weight_lr": 0.05},
    "fairnas": {"epochs": 3, "batch_size": 48, "samples": 3},
    "spos": {"epochs": 6, "batch_size": 48, "samples": 3},
    "ef": {"epochs": 6, "batch_size": 48, "samples": 3, "repeats": 2},
    "one_shot": {"epochs": 3, "batch_size": 48, "samples": 3},
    "snas": {"epochs": 3, "batch_size": 48, "samples": 3, "weight_lr": 0.1, "drop_path": 0.0},
    "darts": {"epochs": 3, "batch_size": 48, "samples": 3, "weight_lr": 0.1, "order": "first"},
    "enas": {"epochs": 6, "batch_size": 48, "samples": 3, "controller_steps": 2, "controller_samples": 2},
    "uniform": {"epochs": 3, "batch_size": 48, "samples": 3, "weight_lr": 0.1},
    "random": {"epochs": 4, "candidates": 2, "batch_size": 48, "lr": 0.05},
    "repnas": {"epochs": 4, "frozen_epochs": 1, "joint_epochs": 1, "batch_size": 48, "lr": 0.05, "logit_lr": 0.05},
}
BRANCHES = {"host": "repvgg_tiny", "input_size": 8}  # for strategies that choose subsets
SPACE = {"input_size": 8, "stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32}
VARIANTS = [
    FBNet(**SHORT["fbnet"], sampling="hard"),
    FBNet(**SHORT["fbnet"], sampling="hard", hard_gradient="score"),
    FBNet(**SHORT["fbnet"], sampling="hard", draw="image"),
    FBNet(**SHORT["fbnet"], draw="image", objective="paper"),
    FBNet(**SHORT["fbnet"], skip_dropout=0.5, entropy_weight=0.1, anneal_from="start"),
]


ROOFLINE = Roofline(gmacs_per_s=2.0, gbytes_per_s=4.0, overhead_us=10.0)


class Silent:
    def advance(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=8, limit=300)


def problem(model: CostModel, share: float = 0.5, amp: Any = "off") -> Problem:
    space = SPACES.get("fbnet_tiny")(**SPACE)
    table = cost_table(space, model)
    bounds = cost_range(table)
    return Problem(space, table, bounds.low + share * (bounds.high - bounds.low), 0.1, 0, amp)


def branches() -> Problem:
    """Half of all branches, in a space of subsets."""
    space = SPACES.get("repnas")(**BRANCHES)
    table, budget = branch_table(space, BranchBudget("ratio", 0.5), batch_size=48)
    return Problem(space, table, budget, 0.1, 0)


def given_to(name: str) -> Problem:
    """What the contract asks of a strategy."""
    return problem(ROOFLINE) if "one" in STRATEGIES.get(name).PICKS else branches()


def start(strategy: Strategy, data: Data, given: Problem) -> Feed:
    torch.manual_seed(0)
    strategy.prepare(given)
    return Feed(data, batch_size=strategy.batch_size, seed=0)


def folder(path: Path) -> RunFolder:
    return RunFolder.create(path, {"asked": "nothing"})


def make(name: str) -> Strategy:
    return STRATEGIES.get(name)(**SHORT[name])


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@dataclass(frozen=True)
class Whole:
    """An unbroken search, shared by the tests that compare with it."""

    given: Problem
    state: dict[str, Any]
    found: list[Candidate]
    losses: list[float]
    last: dict[str, Any]
    run: RunFolder


@pytest.fixture(scope="module", params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(name: str, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    strategy, given = make(name), given_to(name)
    settings = {"name": name, "settings": dataclasses.asdict(strategy)}
    space = {"space": given.space.name, "space_options": dict(given.space.options()), "strategy": settings}
    asked = {**space, "data": "digits", "device": "board", "latency_ms": given.budget, "objectives": None, "seed": 0}
    feed, run = start(strategy, data, given), RunFolder.create(tmp_path_factory.mktemp("whole"), asked)
    train(strategy, feed, run, "search", Silent(), "--resume")
    records = run.metrics("search")
    losses = [record.get("weight_loss", record["loss"]) for record in records]
    assert len(losses) == strategy.epochs
    state = copy.deepcopy(strategy.state_dict())
    found = strategy.derive(start_feed(data, strategy))
    write_candidates(run, found)
    history = getattr(strategy, "theta_history", None)
    if history is not None:
        run.write_array("theta.npy", history())
    return Whole(given, state, found, losses, records[-1], run)


def test_learns_and_meets_the_budget(whole: Whole) -> None:
    assert min(whole.losses[1:]) < whole.losses[0]
    assert whole.found == sorted(whole.found, key=lambda candidate: -candidate.accuracy)
    assert whole.given.budget is not None
    for candidate in whole.found:
        assert 0.9 * whole.given.budget <= candidate.cost <= whole.given.budget
        assert candidate.cost == pytest.approx(whole.given.table.cost(candidate.architecture))
        assert 0 <= candidate.accuracy <= 1


def test_counts_the_updates_of_every_option(name: str, data: Data, whole: Whole) -> None:
    """Each layer's add up to the same: what a pass gives is shared out among the options."""
    updates = whole.last["updates"]
    assert {name: tuple(row) for name, row in updates.items()} == {
        choice.name: choice.options for choice in whole.given.space.choices()
    }
    totals = [sum(row.values()) for row in updates.values()]
    fairness = whole.last["fairness"]
    if whole.given.space.choices()[0].pick == "any":  # the budget is the net's: layers may differ
        steps = start_feed(data, make(name)).steps_weights * len(whole.losses)
        assert whole.given.budget is not None
        assert sum(totals) == steps * whole.given.budget
    else:
        assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-3)
    assert totals[0] > 0
    assert fairness["path_gradients"] >= sum(totals) / len(totals) * (1 - 1e-3)
    assert fairness["least"] <= fairness["most"]
    assert 0 <= fairness["p"] <= 1


def test_its_report_shows_whatever_it_logs(name: str, whole: Whole) -> None:
    """The section of every trace that the strategy leaves has its figure."""
    write_table("board", whole.given.space.name, dict(whole.given.space.options()))
    cost_models.load("board").copy_to(whole.run.path / "device")
    page = checked(report(whole.run.path, quiet=True))
    wanted = ["Layer by layer", "Where the latency goes", "Loss", "Accuracy"]
    logged = {"tau": "Temperature", "temperature": "Temperature", "expected_cost": "Expected latency"}
    logged |= {"entropy": "Entropy", "controller_entropy": "Entropy", "logit_spread": "Logits of branches"}
    wanted += [title for key, title in logged.items() if key in whole.last]
    assert set(wanted) <= set(page.titles)
    learns = hasattr(STRATEGIES.get(name), "theta_history") or "controller_entropy" in whole.last
    assert ("theta" in page.sections) == (learns or "entropy" in whole.last)
    assert any(shown.section == "theta" and shown.title != "Entropy" for shown in page.figures) == learns
    assert "learns no distribution" in " ".join(page.words) or learns


@pytest.mark.parametrize("stop_at", [3, 10])
def test_resumes_bit_for_bit(name: str, stop_at: int, data: Data, whole: Whole, tmp_path: Path) -> None:
    """Interrupted in mid-epoch and resumed in fresh objects, a search ends as an unbroken one."""

    class Breaks(Silent):
        left = stop_at

        def advance(self, text: str) -> None:
            import signal

            Breaks.left -= 1
            if Breaks.left == 0:
                signal.raise_signal(signal.SIGINT)

    broken, run = make(name), folder(tmp_path)
    with pytest.raises(Interrupted, match="--resume"):
        train(broken, start(broken, data, whole.given), run, "search", Breaks(), "--resume")
    again = make(name)
    feed = start(again, data, whole.given)
    torch.manual_seed(99)
    train(again, feed, run, "search", Silent(), "--resume")
    assert equal(again.state_dict(), whole.state)
    assert again.derive(feed) == whole.found


def start_feed(data: Data, strategy: Strategy) -> Feed:
    return Feed(data, batch_size=strategy.batch_size, seed=0)


def test_same_seed_same_result(name: str, data: Data, whole: Whole, tmp_path: Path) -> None:
    strategy = make(name)
    feed = start(strategy, data, given_to(name))
    train(strategy, feed, folder(tmp_path), "search", Silent(), "--resume")
    assert equal(strategy.state_dict(), whole.state)
    assert strategy.derive(feed) == whole.found


@pytest.mark.parametrize("strategy", VARIANTS, ids=range(len(VARIANTS)))
def test_variants_of_fbnet(strategy: FBNet, data: Data, model: CostModel) -> None:
    feed = start(strategy, data, problem(model))
    before = strategy.theta.logits.detach().clone()
    for epoch in range(2):
        for step in range(strategy.steps(feed, epoch)):
            assert torch.tensor(list(strategy.step(feed, Progress(epoch, step)).values())).isfinite().all()
        record = strategy.end_epoch(epoch)
    assert not torch.equal(before, strategy.theta.logits)
    assert 0 < record["skip_share"] < 1
    assert len(record["entropy"]) == 3
    assert strategy.derive(feed)


def test_hard_sampling_trains_one_option_a_layer(data: Data, model: CostModel) -> None:
    strategy = FBNet(**SHORT["fbnet"], sampling="hard")
    feed = start(strategy, data, problem(model))
    strategy.step(feed, Progress(0, 0))
    for module in strategy.net.gated().values():
        trained = [n for n, op in module.mixed.options.items() if any(p.grad is not None for p in op.parameters())]
        assert len(trained) <= 1


def test_theta_step_leaves_weights_alone(data: Data, model: CostModel) -> None:
    strategy = FBNet(**SHORT["fbnet"])
    feed = start(strategy, data, problem(model))
    before = {name: p.detach().clone() for name, p in strategy.net.named_parameters()}
    strategy.step(feed, Progress(1, feed.steps_weights))
    assert all(torch.equal(before[name], p) for name, p in strategy.net.named_parameters())
    assert strategy.theta.logits.grad is not None


def test_weight_step_leaves_theta_alone(data: Data, model: CostModel) -> None:
    strategy = FBNet(**SHORT["fbnet"])
    feed = start(strategy, data, problem(model))
    strategy.step(feed, Progress(0, 0))
    assert (strategy.theta.logits == 0).all()


def test_papers_schedule() -> None:
    """PAPERS A6 and A7: 90 epochs, w alone for 10, tau 5 falling by exp(-0.045) an epoch."""
    strategy = FBNet.preset("paper")
    assert (strategy.epochs, strategy.batch_size, strategy.warmup_epochs) == (90, 192, 10)
    assert (strategy.weight_lr, strategy.weight_momentum, strategy.weight_decay) == (0.1, 0.9, 1e-4)
    assert (strategy.theta_lr, strategy.theta_decay, strategy.alpha, strategy.beta) == (0.01, 5e-4, 0.2, 0.6)
    assert strategy.tau(0) == strategy.tau(10) == 5.0
    assert strategy.tau(11) / strategy.tau(10) == pytest.approx(0.955997, abs=1e-6)
    from_start = FBNet(anneal_from="start", tau_end=5 * 0.955997**90)
    assert [round(from_start.tau(epoch), 3) for epoch in (10, 50, 80)] == [3.188, 0.527, 0.137]
    assert "216 GPU-hours" in FBNet.COST


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8, 0.98])
def test_every_budget_is_met(share: float, data: Data, model: CostModel) -> None:
    """Whatever theta says: budgets from the cheapest to the dearest net are met to within a tenth."""
    strategy = FBNet(**SHORT["fbnet"])
    space = SPACES.get("fbnet_tiny")()
    table = cost_table(space, model)
    bounds = cost_range(table)
    budget = bounds.low + share * (bounds.high - bounds.low)
    strategy.prepare(Problem(space, table, budget, 0.1, 0))
    with torch.no_grad():
        strategy.theta.logits.normal_(std=4.0)
    small = open_data("digits", size=16, limit=200)
    for candidate in strategy.derive(Feed(small, batch_size=48, seed=0)):
        assert 0.9 * budget <= candidate.cost <= budget


def test_random_nets_differ_and_meet_the_budget(model: CostModel) -> None:
    strategy = RandomSearch(epochs=12, candidates=12)
    given = problem(model)
    strategy.prepare(given)
    assert len({a.fingerprint for a in strategy.architectures}) == 12


def test_bf16(data: Data, model: CostModel) -> None:
    strategy = FBNet(**SHORT["fbnet"])
    feed = start(strategy, data, problem(model, amp="bf16"))
    for progress in (Progress(1, 0), Progress(1, feed.steps_weights)):
        assert 0 < strategy.step(feed, progress)["loss"] < 20


def test_diverged_search_stops_with_step_and_lr(data: Data, model: CostModel, tmp_path: Path) -> None:
    strategy = FBNet(**{**SHORT["fbnet"], "weight_lr": 1e30})
    feed, run = start(strategy, data, problem(model)), folder(tmp_path)
    with pytest.raises(Diverged, match=r"epoch 1, step \d+ at learning rate [\d.]+e\+\d+"):
        train(strategy, feed, run, "search", Silent(), "--resume")
    assert not run.checkpoint_path("search").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "epochs >= 1"),
        ({"warmup_epochs": 90}, "warmup_epochs < epochs"),
        ({"theta_lr": -1.0}, "theta_lr must be a positive number"),
        ({"tau_end": float("nan")}, "tau_end of strategy fbnet must be a finite number"),
        ({"skip_dropout": 2.0}, "skip_dropout"),
    ],
)
def test_impossible_hyper_parameters(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FBNet(**settings)


def test_unknown_preset_and_hyper_parameter() -> None:
    with pytest.raises(ValueError, match="Did you mean 'paper'"):
        FBNet.preset("papre")
    with pytest.raises(ValueError, match="Did you mean 'tau_start'"):
        FBNet.preset("quick", tau_strat=1.0)


def test_gates_of_a_supernet_are_cleared(model: CostModel) -> None:
    net = Supernet(SPACES.get("fbnet_tiny")(**SPACE))
    with pytest.raises(RuntimeError, match="has no gates"):
        net.net(torch.randn(1, 3, 8, 8))


def test_loose_budget_does_not_slow_networks_down(data: Data, model: CostModel) -> None:
    strategy = FBNet(**SHORT["fbnet"])
    start(strategy, data, problem(model, share=5.0))
    logits = torch.ones(())
    assert float(strategy.target.loss(logits, logits, logits * 100)) == 1.0
    assert strategy.target.update(100.0)["multiplier"] == 0.0
    with torch.no_grad():
        strategy.theta.logits[:, 5] = 9.0
    path = BudgetedPaths(
        strategy.table, strategy.theta.log_probabilities().double().detach().numpy(), 1e6
    ).most_likely()
    assert path == [5, 5, 5]


@pytest.mark.parametrize(
    "settings",
    [{"sampling": "sfot"}, {"objective": "papr"}, {"draw": "imgae"}, {"samples": 2.5}, {"theta_lr": True}],
    ids=str,
)
def test_words_and_numbers_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        FBNet(**settings)
