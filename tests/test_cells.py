"""The space of cells and its networks: layout, what vanishes, children with inherited weights, drop-path, side head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cost_models import Macs, Params
from pynas import Architecture, Recipe, Supernet, count, export, published
from pynas.ops.cell import DropPath, Zero, set_drop_path
from pynas.plan import make_space, space_specs
from pynas.spaces.cell import CellSpace
from pynas.spaces.cell_net import AuxiliaryHead
from pynas.strategies.relaxed import gates_of
from pynas.supernet import cost_table
from pynas.training.train import Training, cut_out

SMALL: dict[str, Any] = {"input_size": 8, "cells": 5, "channels": 4, "nodes": 3}


def some(space: CellSpace, seed: int, none: float) -> Architecture:
    """A random network whose edges are `none` with this probability."""
    random = torch.Generator().manual_seed(seed)
    chosen = {}
    for choice in space.choices():
        away = float(torch.rand(1, generator=random)) < none
        index = 0 if away else int(torch.randint(1, len(choice.options), (1,), generator=random))
        chosen[choice.name] = (choice.options[index],)
    return Architecture(space.name, chosen, space.options())


def trained(space: CellSpace) -> Supernet:
    """A supernet with statistics that no one-hot path has."""
    net = Supernet(space)
    for _ in range(2):
        rows = torch.rand(len(net.slots), 8).softmax(1)
        net(torch.randn(6, 3, space.input_size, space.input_size), gates_of(net.slots, rows))
    return net.eval()


def test_layout() -> None:
    """PAPERS B2: 14 edges of 8 operations in two types of cells, reductions at a third and two thirds of the depth."""
    space = CellSpace()
    assert len(space.choices()) == 28
    assert {choice.options for choice in space.choices()} == {
        ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
        + ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
    }
    assert [node.sources for node in space.wiring()[:4]] == [(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)]
    assert [part.channels for part in space.parts()] == [16, 16, 32, 32, 32, 64, 64, 64]
    assert [part.place for part in space.parts() if part.reduction] == [2, 5]
    strided = [slot.name for slot in space.slots() if slot.stride == 2]
    assert strided == [f"cell{k}_{i}_{j}" for k in (2, 5) for j in range(2, 6) for i in (0, 1)]
    assert [part.place for part in CellSpace(cells=20).parts() if part.reduction] == [6, 13]
    assert len(space.choices()[0].options) ** 14 == 4_398_046_511_104


def test_search_network() -> None:
    """PAPERS B2: 1,930,618 parameters at 8 cells and 16 channels; stem without ReLU, no scale and shift in cells."""
    net = Supernet(CellSpace())
    assert sum(parameter.numel() for parameter in net.parameters()) == 1_930_618
    assert [type(module) for module in net.net.stem.children()] == [nn.Conv2d, nn.BatchNorm2d]
    norms = [module for name, module in net.net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.affine for norm in norms].count(True) == 1


def test_networks_without_what_vanished_equal_the_supernet() -> None:
    for options in ({}, {"affine": True, "pool_norm": False}, {"stem": "imagenet", "input_size": 32}):
        space = CellSpace(**{**SMALL, **options})
        net, x = trained(space), torch.randn(3, 3, space.input_size, space.input_size)
        shapes = set()
        for seed, none in enumerate((0.3, 0.6, 0.8)):
            architecture = some(space, seed, none)
            child = net.inherit(architecture)
            torch.testing.assert_close(child(x), net(x, net.one_hot(architecture)), atol=1e-5, rtol=1e-4)
            assert not any(isinstance(module, Zero) for module in child.modules())
            shapes.add(child.head.classifier.in_features)
        assert len(shapes) > 1  # nodes of the last cell vanished in some, and the classifier is sliced


def test_in_training_too() -> None:
    """Batch statistics are those of the supernet's path: children can go on training where the search stopped."""
    space = CellSpace(**SMALL)
    net, x, architecture = trained(space), torch.randn(6, 3, 8, 8), some(CellSpace(**SMALL), 2, 0.5)
    net.train()
    torch.testing.assert_close(net.inherit(architecture)(x), net(x, net.one_hot(architecture)), atol=1e-5, rtol=1e-4)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), none=st.floats(0, 1))
def test_what_vanishes_costs_nothing(seed: int, none: float) -> None:
    space = CellSpace(**SMALL)
    architecture = some(space, seed, none)
    net, known = architecture.build(), set(space_specs(space))
    assert set(space.net_specs(architecture.choices)) <= known  # so that a table of the space has its price
    counts = count(net, (3, 8, 8))
    for model, whole in ((Params(), counts.params), (Macs(), counts.macs)):
        table = cost_table(space, model)
        assert table.cost(architecture) == whole
        chosen = [choice.options.index(architecture.choices[choice.name][0]) for choice in table.choices]
        assert whole <= table.fixed + sum(float(row[i]) for row, i in zip(table.by_choice(), chosen, strict=True))
    logits = net.train()(torch.randn(4, 3, 8, 8))
    assert (logits == logits[:1]).all() == (not space.reads_image(architecture.choices))


def test_a_network_that_does_not_read_its_image_is_told() -> None:
    space = CellSpace(**SMALL)
    nothing = {choice.name: ("none",) for choice in space.choices()}
    assert not space.reads_image(nothing)
    net = Architecture("cell", nothing, space.options()).build().eval()
    logits = net(torch.randn(4, 3, 8, 8))
    assert (logits == logits[:1]).all()
    # Without reductions, images come through the inputs from the cell before the last.
    around = nothing | {"normal_0_2": ("skip_connect",), "normal_1_2": ("skip_connect",)}
    assert space.reads_image(around)
    logits = Architecture("cell", around, space.options()).build().eval()(torch.randn(4, 3, 8, 8))
    assert not (logits == logits[:1]).all()
    # Cells of one input each, whose outputs nobody reads in the end.
    assert not CellSpace(**{**SMALL, "cells": 8}).reads_image(nothing | {"normal_0_2": ("skip_connect",)})


def test_parts_that_nobody_reads_are_not_built() -> None:
    """The reduction of the aggressive cell reads its first input alone: half of its nodes and an input are gone."""
    net = published("snas_aggressive").with_options(cells=8, channels=4).build()
    reduction = net.cells["cell2"]
    assert reduction.nodes == (2, 3)
    assert reduction.before1 is None
    assert net.cells["cell3"].before1.conv.in_channels == 2 * 8
    every_second = CellSpace(**SMALL).parts(lambda place, edge: edge == (0, 2))
    assert [part.place for part in every_second] == [0, 2, 4]


def test_a_child_exports(tmp_path: Path) -> None:
    space = CellSpace(**{**SMALL, "cells": 3})
    child = trained(space).inherit(some(space, 1, 0.6))
    assert export(child, str(tmp_path / "net.onnx"), input_size=8, quiet=True).max_abs_diff < 1e-4


def test_drop_path() -> None:
    """Leaves out an edge for whole images, keeps the mean, leaves identities alone, and rests in evaluation."""
    drop, x = DropPath(), torch.ones(4000, 2, 1, 1)
    assert drop.train()(x) is x
    drop.p = 0.25
    y = drop(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert (y[:, 0] == y[:, 1]).all()
    assert float(y.mean()) == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x
    space = CellSpace(**SMALL)
    for option, moves in (("skip_connect", False), ("sep_conv_3x3", True)):
        chosen = {c.name: (option if c.name.startswith("normal") else "sep_conv_3x3",) for c in space.choices()}
        net = Architecture("cell", chosen, space.options()).build()
        set_drop_path(net, 0.5)
        cell, parts = net.cells["cell0"], torch.randn(8, 12, 8, 8)
        same = torch.equal(cell(parts, parts, parts), cell(parts, parts, parts))
        assert same is not moves


def test_auxiliary_head() -> None:
    """PAPERS B9: behind the second reduction; trained by the recipe, silent in evaluation and sliced like the rest."""
    space = CellSpace(**{**SMALL, "input_size": 32, "auxiliary": True, "affine": True})
    assert AuxiliaryHead(128, 10, 8).features(torch.randn(2, 128, 8, 8)).shape == (2, 768)
    assert AuxiliaryHead(128, 10, 7).features(torch.randn(2, 128, 7, 7)).shape == (2, 768)
    architecture = some(space, 4, 0.5)
    net = Supernet(space).eval()
    child = net.inherit(architecture)
    x = torch.randn(2, 3, 32, 32)
    logits, side = child.with_auxiliary(x)
    assert side is not None
    assert side.shape == (2, 10)
    torch.testing.assert_close(logits, child(x))
    torch.testing.assert_close(child(x), net(x, net.one_hot(architecture)), atol=1e-5, rtol=1e-4)
    head = published("darts_v2").with_options(auxiliary=True).build().auxiliary
    assert sum(parameter.numel() for parameter in head.parameters()) == 476_426


class OneBatch:
    steps_weights = 1

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)


def test_recipe_of_darts() -> None:
    """PAPERS B9: 600 epochs, batches of 96, cosine from 0.025, decay 3e-4, cutout 16, drop-path 0.2, side loss 0.4."""
    from pynas.training.loop import Progress

    recipe = Recipe.preset("darts")
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum) == (600, 96, 0.025, 0.9)
    assert (recipe.weight_decay, recipe.clip, recipe.decay) == (3e-4, 5.0, "all")
    assert (recipe.cutout, recipe.drop_path, recipe.auxiliary) == (16, 0.2, 0.4)
    options = {"cells": 5, "channels": 4, "auxiliary": True}
    training = Training(published("darts_v1").with_options(**options).build(), Recipe.preset("darts", epochs=10))
    metrics = training.step(OneBatch(), Progress(5, 0))  # type: ignore[arg-type]
    assert metrics["loss"] > 2  # two losses of ten classes
    drops = [module.p for module in training.net.modules() if isinstance(module, DropPath)]
    assert drops == pytest.approx([0.1] * 5)
    head = training.net.auxiliary
    assert all(parameter.grad is not None for parameter in head.parameters())  # type: ignore[union-attr]


def test_cutout() -> None:
    x = torch.ones(200, 3, 32, 32)
    blank = (cut_out(x, 16) == 0).sum((2, 3))
    assert (blank[:, 0] == blank[:, 1]).all()
    assert int(blank.max()) == 256  # the whole square
    assert int(blank.min()) >= 64  # a quarter of it, in a corner
    assert cut_out(x, 0) is x


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cells": 2}, "cells of space 'cell' must be a positive whole number, 3 or more"),
        ({"channels": 5}, "channels of space 'cell' must be even"),
        ({"stem": "imagnet"}, "Did you mean 'imagenet'"),
        ({"affine": 1}, "affine of space 'cell' must be true or false"),
        ({"input_size": 3}, "too small"),
        ({"auxiliary": True, "input_size": 16}, "input_size >= 24"),
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_space("cell", options)
