"""The contract of search spaces, for every registered one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_models.base import CostModel
from cost_models.spec import OpSpec
from pynas import SPACES, Architecture, Gates, Supernet, count, published
from pynas.architecture import FAMILIES
from pynas.plan import make_space, space_specs
from pynas.registry import SearchSpace, Vanishing
from pynas.supernet import cost_table

# Small enough to run every space in seconds; what is tested does not depend on them.
SMALL: dict[str, dict[str, Any]] = {
    "fbnet": {"input_size": 32, "classes": 5, "width": 0.25, "head_channels": 32},
    "fbnet32": {"width": 0.25},
    "fairnas": {"input_size": 32, "classes": 5, "width": 0.25, "head_channels": 32},
    "fairnas_v1": {"input_size": 32, "classes": 5, "width": 0.25, "head_channels": 32},
    "macro": {"input_size": 16, "width": 0.25, "head_channels": 32},
    "cell": {"input_size": 8, "cells": 4, "channels": 4, "nodes": 3},
    "repnas": {"host": "repvgg_tiny", "dropout": 0.0},
}


@pytest.fixture(params=SPACES.names())
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return make_space(request.param, SMALL.get(request.param, {}))


def random_architecture(space: SearchSpace, seed: int) -> Architecture:
    random = torch.Generator().manual_seed(seed)
    chosen = {}
    for choice in space.choices():
        index = int(torch.randint(len(choice.options), (1,), generator=random))
        chosen[choice.name] = (choice.options[index],)
        if choice.pick == "any":  # any subset, the empty one among them
            on = torch.rand(len(choice.options), generator=random) < 0.4
            chosen[choice.name] = tuple(name for name, taken in zip(choice.options, on, strict=True) if taken)
    return Architecture(space.name, chosen, space.options())


def option_specs(space: SearchSpace) -> list[OpSpec]:
    """Everything that a supernet is made of; what is deployed may be something else."""
    options = [FAMILIES.get(slot.family).spec(slot, name) for slot in space.slots() for name in slot.choice.options]
    sliced = space.sliced_specs() if isinstance(space, Vanishing) else ()
    return [*space.fixed_specs(), *sliced, *options]


def soft_gates(net: Supernet) -> dict[str, Gates]:
    gates = {}
    for slot in net.slots:
        every = tuple(range(len(slot.choice.options)))
        gates[slot.name] = Gates(torch.rand(len(every)).softmax(0), every, every)
    return gates


def test_supernet_runs(space: SearchSpace) -> None:
    net = Supernet(space)
    x = torch.randn(2, 3, space.input_size, space.input_size)
    for gates in (soft_gates(net), net.one_hot(random_architecture(space, 0))):
        logits = net(x, gates)
        assert logits.shape == (2, space.classes)
        assert logits.isfinite().all()


def test_inherited_net_equals_supernet(space: SearchSpace) -> None:
    net = Supernet(space)
    x = torch.randn(4, 3, space.input_size, space.input_size)
    net(x, soft_gates(net))  # moves running statistics away from their start
    net.eval()
    for seed in range(3):
        architecture = random_architecture(space, seed)
        torch.testing.assert_close(net.inherit(architecture)(x), net(x, net.one_hot(architecture)))


def test_inherited_weights_are_copies(space: SearchSpace) -> None:
    net = Supernet(space)
    child = net.inherit(random_architecture(space, 0))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_costs_add_up_to_the_whole_net(space: SearchSpace) -> None:
    """The sum over stem, chosen options and head counts every parameter and multiply-add of the built net."""
    from cost_models import Macs, Params

    for seed in range(3):
        architecture = random_architecture(space, seed)
        counts = count(architecture.build(), (3, space.input_size, space.input_size))
        assert cost_table(space, Macs()).cost(architecture) == counts.macs
        assert cost_table(space, Params()).cost(architecture) == counts.params


def test_every_spec_has_a_cost(space: SearchSpace, model: CostModel) -> None:
    table = cost_table(space, model)
    assert (table.values[table.mask] >= 0).all()
    assert table.fixed > 0
    specs = space_specs(space)
    assert len(specs) == len(set(specs))
    assert sum(table.sources.values()) == len(set(option_specs(space)))
    assert all(model.cost(spec) >= 0 for spec in specs)


def test_slots_and_choices_agree(space: SearchSpace) -> None:
    names = [slot.name for slot in space.slots()]
    assert len(names) == len(set(names))
    assert {slot.choice for slot in space.slots()} == set(space.choices())
    assert all(slot.family in FAMILIES for slot in space.slots())
    assert make_space(space.name, space.options()) == space


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_json_round_trip(space: SearchSpace, seed: int) -> None:
    architecture = random_architecture(space, seed)
    again = Architecture.from_json(architecture.to_json())
    assert again == architecture
    assert again.fingerprint == architecture.fingerprint


def test_fbnet_macro_architecture() -> None:
    """Table 1 of the paper: output channels, sizes and strides of the 22 layers."""
    slots = SPACES.get("fbnet")().slots()
    assert [s.out_channels for s in slots] == [16] + [24] * 4 + [32] * 4 + [64] * 4 + [112] * 4 + [184] * 4 + [352]
    assert [i + 1 for i, s in enumerate(slots) if s.stride == 2] == [2, 6, 10, 18]
    assert [s.size for s in slots] == [112] * 2 + [56] * 4 + [28] * 4 + [14] * 8 + [7] * 4
    assert len(slots[0].choice.options) ** len(slots) == 984770902183611232881


def test_fbnet32_resolution() -> None:
    sizes = [slot.size for slot in SPACES.get("fbnet32")().slots()]
    assert sizes == [32] * 6 + [16] * 4 + [8] * 8 + [4] * 4


def test_width_of_the_96_pixel_net() -> None:
    space = published("fbnet_96_035_1").search_space()
    slots = space.slots()
    assert slots[0].in_channels == 8
    assert [slots[i].out_channels for i in (0, 1, 5, 9, 13, 17, 21)] == [8, 16, 16, 24, 40, 72, 128]


def test_fairnas_macro_architecture() -> None:
    """PAPERS D1: output channels, sizes and strides of the 19 layers, stem and tail."""
    space = SPACES.get("fairnas")()
    slots = space.slots()
    assert [s.out_channels for s in slots] == [32] * 2 + [40] * 4 + [80] * 4 + [96] * 4 + [192] * 4 + [320]
    assert [i + 1 for i, s in enumerate(slots) if s.stride == 2] == [1, 3, 7, 15]
    assert [s.size for s in slots] == [112] + [56] * 2 + [28] * 4 + [14] * 8 + [7] * 4
    assert len(slots[0].choice.options) ** len(slots) == 609_359_740_010_496
    assert {(spec.kind, spec.activation) for spec in space_specs(space) if spec.kind == "mbconv"} == {
        ("mbconv", "relu6")
    }
    net = published("fairnas_a").build()
    kinds = [type(module).__name__ for module in (*net.stem.modules(), *net.head.modules())]
    assert [kinds.count(kind) for kind in ("ReLU6", "ReLU", "Dropout", "Conv2d")] == [3, 0, 1, 4]
    assert net.head.dropout.p == 0.2


def test_fairnas_v1_has_the_articles_number_of_networks() -> None:
    """PAPERS D1: 6^16, MobileNetV2's layers without its first bottleneck."""
    slots = SPACES.get("fairnas_v1")().slots()
    assert 6 ** len(slots) == 2_821_109_907_456
    assert [len([s for s in slots if s.out_channels == c]) for c in (32, 40, 80, 96, 192, 320)] == [2, 3, 4, 3, 3, 1]


def test_fairnas_weights_begin_as_in_the_released_code() -> None:
    """PAPERS D6: convolutions N(0, sqrt(2 / (K^2 out))), batch norm 1 and 0, classifier U(+-1/sqrt(classes))."""
    net = SPACES.get("fairnas")(classes=100, input_size=32).build(lambda slot: torch.nn.Identity())
    conv, classifier = net.head.conv.conv.weight, net.head.classifier.weight
    assert float(conv.detach().std()) == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert float(classifier.detach().abs().max()) == pytest.approx(0.1, rel=0.01)
    assert float(classifier.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation": "swsh"}, "Did you mean 'swish'"),
        ({"activation": "none"}, "activation of space 'fairnas'"),
        ({"squeeze": -1.0}, "squeeze of space 'fairnas' must lie in"),
        ({"neck_channels": 0}, "neck_channels of space 'fairnas'"),
    ],
    ids=str,
)
def test_impossible_options_of_fairnas(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_space("fairnas", options)
