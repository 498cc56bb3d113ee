"""RepNAS: hosts, the space of branches, budgets and gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_spaces import random_architecture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cost_models import OpSpec, Params, TrainingMemory
from cost_models.torch_training import TorchTraining
from pynas import FAMILIES, Architecture, RepNAS, Slot, count, fuse, rep
from pynas.branch_budget import BranchBudget, branch_table, read_budget, step_specs, training
from pynas.branch_sampler import BranchSampler
from pynas.plan import make_space
from pynas.registry import SearchSpace
from pynas.spaces.hosts import HOSTS
from pynas.spaces.repnas import RepNASSpace
from pynas.strategies.base import Problem
from pynas.subsets import SubsetCosts, log10_networks, subset_architecture
from pynas.supernet import cost_table
from pynas.training.data import open_data
from pynas.training.feed import Feed
from pynas.training.loop import Progress

# Folded parameters, those of RepVGG's training form, folded MACs in thousands, branches of the article and of the
# released code. A0 is given; parameters and MACs of the others agree with RepVGG's tables, rounded to millions.
FIGURES = {
    "repvgg_a0": (8_309_384, 9_108_968, 1_361_451, 149, 132),
    "repvgg_a1": (12_789_864, 14_092_264, 2_363_967, 149, 132),
    "repvgg_a2": (25_499_944, 28_210_600, 5_116_952, 149, 132),
    "repvgg_b0": (14_339_048, 15_817_960, 3_057_601, 191, 168),
    "repvgg_b1": (51_829_480, 57_415_016, 11_815_485, 191, 168),
    "repvgg_b1g2": (41_360_104, 45_782_376, 8_809_742, 191, 168),
    "repvgg_b1g4": (36_125_416, 39_966_056, 7_306_871, 191, 168),
    "repvgg_b2": (80_315_112, 89_022_376, 18_376_610, 191, 168),
    "repvgg_b2g2": (63_956_712, 70_846_376, 13_680_136, 191, 168),
    "repvgg_b2g4": (55_777_512, 61_758_376, 11_331_899, 191, 168),
    "repvgg_b3": (110_960_872, 123_085_288, 26_208_883, 191, 168),
    "repvgg_b3g2": (87_404_776, 96_911_848, 19_445_961, 191, 168),
    "repvgg_b3g4": (75_626_728, 83_825_128, 16_064_500, 191, 168),
    "repvgg_tiny": (19_098, 21_658, 793, 46, 42),
    "vgg16": (14_719_818, 16_373_514, 313_202, 87, 78),
    "mobilenet_v2": (3_497_704, 3_538_696, 300_774, 121, 108),
}
TINY = {"host": "repvgg_tiny", "input_size": 8}


def tiny(**changes: Any) -> SearchSpace:
    return make_space("repnas", {**TINY, **changes})


def drawn(space: SearchSpace, budget: float, seed: int = 0) -> BranchSampler:
    table, limit = branch_table(space, BranchBudget("count", budget), batch_size=8)
    return BranchSampler(space.choices(), space.slots(), table, limit, seed)


def many(space: SearchSpace) -> int:
    return sum(len(choice.options) for choice in space.choices())


@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name: str) -> None:
    """PAPERS C6."""
    with torch.device("meta"):  # B3 has half a gigabyte of weights
        space = make_space("repnas", {"host": name})
        assert isinstance(space, RepNASSpace)
        plain = space.plain().eval()
        form = rep.fixed(space, "repvgg").build()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            assert plain(torch.zeros(1, 3, space.input_size, space.input_size)).shape == (1, space.classes)
    params = [sum(p.numel() for p in net.parameters()) for net in (plain, form)]
    macs = round(counter.get_total_flops() / 2000)
    released = make_space("repnas", {"host": name, "preset": "released"})
    assert (*params, macs, many(space), many(released)) == FIGURES[name]
    assert cost_table(space, Params()).cost(rep.fixed(space, "repvgg")) == params[1]


def test_size_of_the_space() -> None:
    """PAPERS C2: 50 blocks of seven branches are 2.29e105 networks."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(50)))
    slots = [block.slot for block in rep.convert(net)[1:]]  # type: ignore[index]
    assert 10 ** log10_networks([slot.choice for slot in slots]) == pytest.approx(2.29e105, rel=2e-3)
    assert pytest.approx(2.2935e105, rel=1e-4) == 2**350


def test_released_searches_six_and_keeps_44() -> None:
    """PAPERS C2, C5: skip is always on, strided 1x1-KxK are plain; 0.34 of 132 is 44."""
    space = make_space("repnas", {"host": "repvgg_a0", "preset": "released"})
    table, limit = branch_table(space, read_budget(None), batch_size=8)
    assert (int(table.mask.sum()), limit) == (132, 44)
    assert {len(choice.options) for choice in space.choices()} == {6}
    net = make_space("repnas", {**TINY, "preset": "released"}).build(mixed)
    kinds = [list(block.branches) for _, block in rep.blocks(net)]
    assert sum("skip" in branches for branches in kinds) == 4
    article = make_space("repnas", {"host": "repvgg_a0"})
    assert branch_table(article, read_budget(None), batch_size=8)[1] == int(0.34 * (132 + 17))


def mixed(slot: Slot) -> nn.Module:
    return FAMILIES.get("rep").mixed(slot)


@pytest.mark.parametrize("budget", [1, 5, 23, 46])
def test_exactly_so_many_gates_are_on(budget: int) -> None:
    """PAPERS F3: exactly C gates are 1, the others 0; d gate / d logit is that of sigmoid(r)."""
    space = tiny()
    sampler = drawn(space, budget)
    with torch.no_grad():
        sampler.logits.normal_()
    for step in range(5):
        draw = sampler.draw(step)
        values = torch.cat([draw.gates[slot.name].values for slot in space.slots()])
        assert sorted(set(values.tolist()) | {0.0, 1.0}) == [0.0, 1.0]
        assert int(values.sum()) == int(draw.taken.sum()) == budget
        run = sum(len(draw.gates[slot.name].run) for slot in space.slots())
        assert run == budget
        assert draw.empty == sum(not draw.gates[slot.name].run for slot in space.slots())
        gradient = torch.autograd.grad(values.sum(), sampler.logits)[0]
        p = (sampler.logits + sampler.noise(step)).sigmoid()
        torch.testing.assert_close(gradient, p * (1 - p) * sampler.costs.mask)
    r = sampler.logits + sampler.noise(7)
    inside, taken = r[sampler.costs.mask], sampler.draw(7).taken[sampler.costs.mask]
    assert budget == 46 or inside[taken].min() > inside[~taken].max()  # the largest over the whole net


def test_noise_is_logistic_and_repeats() -> None:
    """PAPERS C5: the difference of two Gumbel draws."""
    sampler = drawn(tiny(), 10, seed=3)
    noise = torch.stack([sampler.noise(step) for step in range(400)])
    assert torch.equal(noise[7], sampler.noise(7))
    assert not torch.equal(noise[7], drawn(tiny(), 10, seed=4).noise(7))
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(torch.pi / 3**0.5, rel=0.02)
    assert torch.equal(sampler.best().sum(), torch.tensor(10))


def test_only_drawn_branches_train() -> None:
    strategy = RepNAS(epochs=4, frozen_epochs=1, joint_epochs=2, batch_size=24, logit_lr=0.1)
    space = tiny(sharing=False)
    table, limit = branch_table(space, BranchBudget("count", 9), batch_size=24)
    data = open_data("digits", size=8, limit=100)
    strategy.prepare(Problem(space, table, limit, 0.1, 0))
    feed = Feed(data, batch_size=24, seed=0)
    assert strategy.step(feed, Progress(0, 0))["branches"] == 9
    on = strategy.sampler.draw(1)
    for (_, block), slot in zip(rep.blocks(strategy.net), space.slots(), strict=True):
        run = {block.names[index] for index in on.gates[slot.name].run} or {"kxk"}
        trained = {name for name, b in block.branches.items() if all(p.grad is not None for p in b.parameters())}
        assert trained == run
    assert (strategy.sampler.logits == 0).all()  # frozen
    strategy.step(feed, Progress(1, 0))
    assert strategy.sampler.logits.abs().max() > 0
    best = strategy.sampler.best()
    norm = next(m for m in strategy.net.modules() if isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked)
    strategy.step(feed, Progress(3, 0))
    assert strategy.kept is not None
    assert torch.equal(strategy.kept, best)
    assert int(norm.num_batches_tracked or 0) <= 1  # began anew
    assert all(
        set(m.run) <= {i for i, t in enumerate(row) if t}
        for m, row in zip((strategy._draw().gates[slot.name] for slot in space.slots()), best.tolist(), strict=True)
    )


@pytest.mark.parametrize("at_fix", ["shared", "separate"])
def test_shared_kernels_after_the_search(at_fix: Any) -> None:
    """The found net equals the supernet under its gates, whether slices were copied or not."""
    strategy = RepNAS(epochs=2, frozen_epochs=1, joint_epochs=0, batch_size=24, at_fix=at_fix)
    space = tiny()
    table, limit = branch_table(space, BranchBudget("ratio", 0.4), batch_size=24)
    data = open_data("digits", size=8, limit=100)
    strategy.prepare(Problem(space, table, limit, 0.1, 0))
    feed = Feed(data, batch_size=24, seed=0)
    for epoch in range(2):
        for step in range(2):
            strategy.step(feed, Progress(epoch, step))
    shared = [block.kernel is not None for _, block in rep.blocks(strategy.net)]
    assert set(shared) == {at_fix == "shared"}
    x = feed.weights()[0]
    assert strategy.kept is not None
    with torch.no_grad():
        expected = strategy.net.eval()(x, strategy.sampler.fixed(strategy.kept).gates)
        torch.testing.assert_close(strategy.result()(x), expected)
        torch.testing.assert_close(fuse(strategy.result())(x), expected, rtol=1e-4, atol=1e-5)


def test_papers_schedule() -> None:
    """PAPERS C5."""
    strategy = RepNAS.preset("paper")
    assert [strategy.phase(e) for e in (0, 14, 15, 49, 50, 149)] == ["frozen"] * 2 + ["joint"] * 2 + ["fixed"] * 2
    assert (strategy.epochs, strategy.batch_size, strategy.lr, strategy.momentum, strategy.weight_decay) == (
        150,
        256,
        0.1,
        0.9,
        1e-4,
    )
    assert (strategy.logit_lr, strategy.logit_beta, strategy.logit_decay, strategy.clip) == (1e-4, 0.5, 5e-4, 5.0)
    recipe = strategy.recipe()
    assert (recipe.epochs, recipe.lr, recipe.decay, recipe.ema_decay) == (150, 0.1, "weights", 0.0)


@pytest.mark.parametrize(
    ("value", "kind", "amount"),
    [
        (44, "count", 44),
        (1, "count", 1),
        (1.0, "ratio", 1),
        (0.34, "ratio", 0.34),
        ("34%", "ratio", 0.34),
        ("250 ms", "ms", 250),
        ("1.5MB", "MB", 1.5),
        ("7", "count", 7),
        (None, "ratio", 0.34),
    ],
)
def test_budgets_are_read(value: Any, kind: str, amount: float) -> None:
    assert read_budget(value) == BranchBudget(kind, pytest.approx(amount))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -3, 1.5, "lots", "12 s", float("nan"), float("inf"), True, "140%", "ms", "1e400"])
def test_budgets_that_cannot_be(value: Any) -> None:
    with pytest.raises(ValueError, match="budget must be a number of branches"):
        read_budget(value)


def test_memory_budget_is_met() -> None:
    space = tiny()
    costs = SubsetCosts.of(cost_table(space, TrainingMemory(8)))
    least = costs.low + float((costs.values - costs.empty[:, None])[costs.mask].min().clamp_min(0))
    with pytest.raises(ValueError, match="leaves room for no branch"):
        branch_table(space, BranchBudget("MB", 0.9 * least), batch_size=8)
    for share in (0.1, 0.5, 0.9):
        budget = costs.low + share * (costs.high - costs.low)
        table, limit = branch_table(space, BranchBudget("MB", budget), batch_size=8)
        sampler = BranchSampler(space.choices(), space.slots(), table, limit, 0)
        for step in range(5):
            cost = table.cost(subset_architecture(space, sampler.draw(step).taken))
            assert 0.95 * budget < cost <= budget * (1 + 1e-9)
    assert table.unit == "MB a step"


def test_training_steps_are_timed() -> None:
    """Every op of a step has a module that can be timed forward and backward."""
    runner = TorchTraining(batch=2)
    for spec in (OpSpec("pointwise_conv", 4, 4, 6, kernel=3), OpSpec("linear", 8, 3, 1)):
        assert min(runner.time_ms(training(spec), spec, 1)) > 0
    specs = step_specs(tiny())
    assert {spec.kind for spec in specs} == {
        "conv", "row", "column", "pointwise_conv", "pointwise_avg", "norm", "pool", "linear"
    }  # fmt: skip
    with pytest.raises(ValueError, match="needs a table of such steps"):
        branch_table(tiny(), BranchBudget("ms", 5), batch_size=2)


def test_fallback_is_counted_apart() -> None:
    space = tiny()
    nothing = Architecture("repnas", {choice.name: () for choice in space.choices()}, space.options())
    assert str(nothing) == "repnas[- - - - - - -]"
    counted, _ = branch_table(space, BranchBudget("count", 3), batch_size=8)
    assert counted.cost(nothing) == 0
    everywhere = rep.fixed(space, "plain")
    memory = cost_table(space, TrainingMemory(8))
    assert memory.cost(nothing) == memory.cost(everywhere) > 0
    assert count(nothing.build(), (3, 8, 8)) == count(everywhere.build(), (3, 8, 8))


def test_folded_states_load_into_the_plain_host() -> None:
    for seed, options in enumerate([{}, {"kernel": 5}, {"preset": "released"}]):
        space = tiny(**options)
        assert isinstance(space, RepNASSpace)
        net = random_architecture(space, seed).build()
        x = torch.randn(4, 3, 8, 8)
        net.train()(x)
        folded, plain = fuse(net, x), space.plain()
        plain.load_state_dict(folded.state_dict(), strict=True)
        torch.testing.assert_close(plain.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_subsets_have_one_order() -> None:
    space = tiny()
    first = {choice.name: choice.options for choice in space.choices()}
    turned = {choice.name: choice.options[::-1] for choice in space.choices()}
    nets = [Architecture("repnas", chosen, space.options()) for chosen in (first, turned)]
    assert nets[0].fingerprint == nets[1].fingerprint
    with pytest.raises(ValueError, match="names an option twice"):
        Architecture("repnas", {**first, "stem": ("kxk", "kxk")}, space.options())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": "repvg_a0"}, "Did you mean 'repvgg_a0'"),
        ({"host": "no.such.module:net"}, "cannot be imported"),
        ({"host": "torchvision.models:resnet81"}, "cannot be imported"),
        ({"host": "math:floor"}, "fails: TypeError"),
        ({"host": "os:getcwd"}, "answers with str"),
        ({"host": "math:pi"}, "is no function, but float"),
        ({"host": "torch.nn:Identity"}, "no convolution of 3x3"),
        ({"host": "vgg16", "input_size": 8}, "does not fit images of 8 pixels"),
        ({"host": "repvgg_tiny", "kernel": 4}, "kernel of space 'repnas' must be 3, 5 or 7"),
        ({"host": "repvgg_tiny", "preset": "relaesed"}, "Did you mean 'released'"),
        ({"host": "repvgg_tiny", "sharing": 1}, "must be true or false"),
        ({"host": "repvgg_tiny", "width": 0}, "width of space 'repnas'"),
        ({"host": 3}, "use pynas.rep.convert"),
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_space("repnas", options).slots()
