"""From a distribution to children: the rules of SNAS and DARTS, what is kept of children; ENAS's controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cell_search import begun, digits, problem, stepped

from pynas import ENAS, SNAS, SPACES, Architecture
from pynas.choices import Gates
from pynas.counting import count
from pynas.spaces.cell import CellSpace
from pynas.strategies.children import FILE, Floats, arg_max, derived, judged, read_child, supernet_accuracy, top_two
from pynas.strategies.controller import Controller
from pynas.training.data import Data
from pynas.training.evaluate import accuracy, recalibrate
from pynas.training.run import RunFolder

SPACE = CellSpace(input_size=8, cells=5, channels=2, nodes=4)
NAMES = [choice.name for choice in SPACE.choices()]
OPTIONS = SPACE.choices()[0].options


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


def distribution(favoured: dict[str, tuple[str, float]], rest: str = "none") -> Floats:
    """Log-probabilities in which each of these edges has an operation with so many nats more than all others; what is
    not named has `rest`, by five nats."""
    logits = np.zeros((len(NAMES), len(OPTIONS)))
    for row, name in enumerate(NAMES):
        option, ahead = favoured.get(name, (rest, 5.0))
        logits[row, OPTIONS.index(option)] = ahead
    found: Floats = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return found


def there(architecture: Architecture) -> dict[str, str]:
    return {name: option for name, (option,) in architecture.choices.items() if option != "none"}


def test_argmax_takes_none_where_it_wins() -> None:
    """SNAS: edges vanish, however few are left."""
    wins = {
        "normal_0_2": ("sep_conv_3x3", 1.0),
        "normal_2_5": ("skip_connect", 0.3),
        "reduce_1_4": ("dil_conv_5x5", 2.0),
    }
    assert there(arg_max(SPACE, distribution(wins))) == {name: option for name, (option, _) in wins.items()}


def test_argmax_gives_an_edge_back_where_the_image_would_be_lost() -> None:
    strong = {"reduce_0_2": ("max_pool_3x3", 1.0)}
    log_p = distribution(strong)
    row = NAMES.index("normal_1_4")
    log_p[row, OPTIONS.index("avg_pool_3x3")] += 4.0  # nearest to winning
    found = arg_max(SPACE, log_p)
    assert there(found) == {"reduce_0_2": "max_pool_3x3", "normal_1_4": "avg_pool_3x3"}
    assert SPACE.reads_image(found.choices)
    # Reductions may go altogether where normal cells pass the image around them.
    around = {"normal_0_2": ("skip_connect", 1.0), "normal_1_2": ("skip_connect", 1.0)}
    assert set(there(arg_max(SPACE, distribution(around)))) == set(around)
    assert SPACE.reads_image(arg_max(SPACE, distribution({})).choices)


def test_top_two_keeps_the_two_strongest_edges_of_every_node() -> None:
    """DARTS: by their best operation but `none`, which may itself be the most probable by far."""
    ahead = {f"normal_{source}_5": ("sep_conv_5x5", 1.0 + source) for source in range(5)}
    found = there(top_two(SPACE, distribution(ahead)))
    assert {name: found[name] for name in found if name.endswith("_5") and name.startswith("normal")} == {
        "normal_3_5": "sep_conv_5x5",
        "normal_4_5": "sep_conv_5x5",
    }
    assert len(found) == 16
    log_p = distribution(ahead)
    log_p[:, 0] += 10.0
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    assert len(there(top_two(SPACE, log_p))) == 16


def test_in_a_space_without_cells_rules_take_the_most_probable_options() -> None:
    space = SPACES.get("fbnet_tiny")()
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(9), 6))
    for rule in (arg_max, top_two):
        chosen = [option for (option,) in rule(space, log_p).choices.values()]
        assert chosen == [space.choices()[i].options[int(row.argmax())] for i, row in enumerate(log_p)]


def test_a_child_outside_the_budget_gives_way() -> None:
    given = problem(0.8)
    choices = given.space.choices()
    logits = np.zeros((len(choices), 8))
    logits[:, 3] = 6.0  # skips: far below the budget's window
    found = derived(given, logits - np.log(np.exp(logits).sum(1, keepdims=True)), "argmax", 2)
    assert found[0][0] == "most probable"
    assert given.budget is not None
    for _, network in found:
        assert 0.9 * given.budget <= given.table.cost(network) <= given.budget
    free = derived(problem(), logits - np.log(np.exp(logits).sum(1, keepdims=True)), "argmax", 0)
    assert [origin for origin, _ in free] == ["argmax"]
    assert set(there(free[0][1]).values()) == {"skip_connect"}


def test_children_are_judged_with_the_weights_that_they_inherit(data: Data, tmp_path: Path) -> None:
    """With batch norms as they are and recalibrated: as the networks that are built alone."""
    strategy = SNAS(epochs=2, batch_size=16, calibrate=64, samples=1, drop_path=0.3)
    feed = begun(strategy, data, problem())
    stepped(strategy, feed, range(4))
    run = RunFolder.create(tmp_path, {})
    (best, *_) = strategy.derive(feed, run)
    child = read_child(run, best.architecture)
    alone = strategy.net.inherit(best.architecture)
    assert child["accuracy_without_recalibration"] == pytest.approx(accuracy(alone, data.arch, data))
    recalibrate(alone, data.weights, data, 64)
    assert child["accuracy"] == best.accuracy == pytest.approx(accuracy(alone, data.arch, data))
    gates = strategy._looking(1)
    assert child["search_accuracy"] == pytest.approx(supernet_accuracy(strategy.net, gates, feed))
    kept = run.read_json(FILE)["children"]
    assert kept[0]["choices_not_none"] == len(there(best.architecture))
    assert strategy.derive(feed, run)[0] == best
    bare = judged(strategy.net, strategy.problem, feed, [("argmax", best.architecture)], 0, None)
    assert bare[0].accuracy == child["accuracy_without_recalibration"]
    assert count(alone, (3, 8, 8)).params < count(strategy.net.inherit(full()), (3, 8, 8)).params


def full() -> Architecture:
    space = problem().space
    return Architecture("cell", {c.name: ("sep_conv_5x5",) for c in space.choices()}, space.options())


# ENAS


def controller(**changes: Any) -> Controller:
    return Controller(SPACE, ENAS(**changes))


def test_controller_writes_cells_node_by_node() -> None:
    """PAPERS E: for every node two inputs and two operations, in both cells; the two inputs differ."""
    writer = controller()
    for _ in range(20):
        rollout = writer.sample()
        assert rollout.decisions == 2 * 4 * 4
        chosen = {name: OPTIONS[option] for name, option in zip(NAMES, rollout.path, strict=True)}
        for cell in ("normal", "reduce"):
            for node in range(2, 6):
                into = [name for name in NAMES if name.startswith(cell) and name.endswith(f"_{node}")]
                assert sum(chosen[name] != "none" for name in into) == 2
        assert float(rollout.log_probability.detach()) < 0
    assert float(rollout.entropy.detach()) > 0


def test_controller_starts_with_separable_convolutions() -> None:
    """`op_bias` favours them, and squashing bounds by how much."""
    torch.manual_seed(0)
    drawn = [OPTIONS[option] for _ in range(40) for option in controller(hidden=20).sample().path]
    taken = [option for option in drawn if option != "none"]
    share = sum(option.startswith("sep_conv") for option in taken) / len(taken)
    # Two of seven operations, ahead by 2 * (1.1 / 2.5) / 2 + 0.5 nats at most.
    ahead = np.exp(1.1 / 2.5 + 0.5)
    assert share == pytest.approx(2 * ahead / (2 * ahead + 5), abs=0.06)


def test_reinforce_learns_what_is_rewarded() -> None:
    """With a stub for what the supernet says: accuracy is the share of edges that skip."""
    free = {"op_bias": 0.0, "tanh_constant": 5.0, "op_tanh_reduce": 1.0}  # the article's constants bind probabilities
    strategy = ENAS(epochs=2, batch_size=16, controller_lr=0.02, baseline_decay=0.9, controller_samples=4, **free)
    feed = begun(strategy, digits(), problem())

    def skips(x: torch.Tensor, gates: dict[str, Gates]) -> torch.Tensor:
        taken = [gate.run[0] for gate in gates.values() if gate.run != (0,)]
        right = round(len(x) * sum(option == 3 for option in taken) / len(taken))
        logits = torch.zeros(len(x), 2)
        logits[:right, 0] = logits[right:, 1] = 1.0
        return logits

    strategy.net.forward = skips  # type: ignore[method-assign, assignment]
    feed.arch = lambda: (torch.zeros(24, 3, 8, 8), torch.zeros(24, dtype=torch.int64))  # type: ignore[method-assign]
    rewards = [strategy._controller_step(feed)["reward"] for _ in range(20)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.2


def test_learning_rate_restarts() -> None:
    """PAPERS E: cosines of 10, 20, 40, ... epochs from 0.05 to 0.0005."""
    strategy = ENAS()
    assert [strategy.lr(epoch) for epoch in (0, 10, 30, 70)] == pytest.approx([0.05] * 4)
    assert strategy.lr(5) == strategy.lr(20) == pytest.approx(0.02525)
    assert strategy.lr(29.999) == pytest.approx(0.0005, rel=1e-3)
