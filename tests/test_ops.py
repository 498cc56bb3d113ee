"""The contract of option families and of the ops behind their specs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from cost_models import Macs, MemoryTraffic, OpSpec, Params, Roofline, TorchHost
from pynas import FAMILIES, Choice, Gates, Slot, count, fuse
from pynas.ops import MODULES, build
from pynas.ops.branches import BRANCHES, BranchShape
from pynas.ops.cell import NONE
from pynas.ops.cell import OPTIONS as CELL_OPTIONS
from pynas.ops.layers import ACTIVATIONS
from pynas.ops.mbconv import OPTIONS
from pynas.ops.prepared import prepare
from pynas.ops.rep import RepSlot
from pynas.spaces import fbnet

SHAPES = [(16, 16, 8, 1), (16, 24, 9, 2), (8, 16, 7, 1)]
MBCONV, CELL = OPTIONS.names(), CELL_OPTIONS.names()
EDGES = [(16, 16, 8, 1), (16, 16, 8, 2), (8, 8, 7, 2)]


def slot(
    shape: tuple[int, int, int, int],
    options: tuple[str, ...] = fbnet.OPTIONS,
    activation: str = "relu",
    squeeze: float = 0.0,
    family: str = "mbconv",
    **fields: bool,
) -> Slot:
    return Slot("here", Choice("here", options), family, *shape, activation=activation, squeeze=squeeze, **fields)


CASES: list[tuple[str, tuple[int, int, int, int], str, dict[str, Any]]] = []
CASES += [("mbconv", shape, name, {}) for shape in SHAPES for name in MBCONV]
CASES += [("cell", shape, name, {}) for shape in EDGES for name in CELL if name != NONE]
CASES += [
    ("cell", shape, name, fields)
    for shape in EDGES[:2]
    for name in ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
    for fields in ({"affine": False, "pool_norm": True}, {"pool_norm": True})
]
CASES += [
    ("rep", shape, name, {})
    for shape in SHAPES
    for name in BRANCHES.names()
    if BRANCHES.get(name).fits(BranchShape(*shape[:3], kernel=3, stride=shape[3]))
]
CASES += [
    ("mbconv", shape, "k3_e3", {"squeeze": 0.5, "activation": activation})
    for shape in SHAPES
    for activation in ("relu6", "swish")
]


def randomise(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


@pytest.mark.parametrize(("family", "shape", "name", "variant"), CASES)
def test_option(family: str, shape: tuple[int, int, int, int], name: str, variant: dict[str, Any]) -> None:
    here = slot(shape, family=family, **variant)
    if family == "rep":
        here = RepSlot("here", Choice("here", BRANCHES.names(), "any"), "rep", *shape)
    spec = FAMILIES.get(family).spec(here, name)
    op = randomise(FAMILIES.get(family).single(here, (name,)))
    x = torch.randn(2, here.in_channels, here.size, here.size, requires_grad=True)
    y = op(x)
    assert y.shape == (2, here.out_channels, here.out_size, here.out_size)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for parameter_name, parameter in op.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    assert OpSpec.from_dict(spec.to_dict()) == spec
    assert MemoryTraffic().cost(spec) >= 0
    counts = count(op, (here.in_channels, here.size, here.size))
    assert (counts.params, counts.macs) == (spec.params, spec.macs)
    op.eval()
    torch.testing.assert_close(fuse(op)(x), op(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_builds_its_spec(kind: str) -> None:
    size = 1 if kind == "linear" else 8
    op = build(OpSpec(kind, 8, 8, size)).eval()
    x = torch.randn(2, 8) if kind == "linear" else torch.randn(2, 8, size, size)
    assert op(x).shape[:2] == (2, 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_reaches_every_conv_but_the_last(activation: str) -> None:
    op = FAMILIES.get("mbconv").single(slot(SHAPES[0], activation=activation), ("k3_e3",))
    assert [type(module) for module in op.modules()].count(ACTIVATIONS[activation]) == 2


def test_squeeze_and_excitation() -> None:
    """Each channel, after the depthwise convolution, times sigmoid(W2 act(W1 mean + b1) + b2)."""
    op = randomise(FAMILIES.get("mbconv").single(slot((8, 8, 6, 1), squeeze=0.5, activation="swish"), ("k3_e3",)))
    x, state = torch.randn(2, 8, 6, 6), op.eval().state_dict()
    assert state["squeeze.reduce.weight"].shape == (4, 24, 1, 1)
    y = op.depthwise(op.expand(x))
    linear = torch.nn.functional.linear
    weights = [state[f"squeeze.{part}.weight"][..., 0, 0] for part in ("reduce", "expand")]
    middle = torch.nn.functional.silu(linear(y.mean((2, 3)), weights[0], state["squeeze.reduce.bias"]))
    scale = torch.sigmoid(linear(middle, weights[1], state["squeeze.expand.bias"]))
    torch.testing.assert_close(op(x), x + op.project(y * scale[..., None, None]))
    with pytest.raises(ValueError, match="squeeze-and-excitation"):
        prepare(FAMILIES.get("mbconv").single(slot((8, 8, 6, 1), squeeze=0.5), ("k3_e3",)))


def test_squeeze_and_excitation_has_a_price_everywhere() -> None:
    """It costs more than the block without, in counts and on a roofline, and this machine can time it."""
    here = slot((8, 8, 6, 1), squeeze=0.5, activation="swish")
    with_it = FAMILIES.get("mbconv").spec(here, "k3_e3")
    without = dataclasses.replace(with_it, squeeze=0)
    for model in (Macs(), Params(), MemoryTraffic(), Roofline(2.0, 4.0)):
        assert model.cost(with_it) > model.cost(without) > 0
    assert TorchHost().time_ms(fuse(build(with_it)), with_it, 1)[0] > 0


def test_identity_that_changes_the_shape_has_no_activation() -> None:
    """PAPERS D7; FBNet's skip has one."""
    for name, last in (("identity", nn.BatchNorm2d), ("skip", nn.ReLU)):
        op = FAMILIES.get("mbconv").single(slot((8, 16, 7, 2)), (name,))
        assert type(list(op.children())[-1]) is last
        assert type(FAMILIES.get("mbconv").single(slot((8, 8, 7, 1)), (name,))) is nn.Identity


def test_block_is_the_papers() -> None:
    """PAPERS A3: 1x1 (groups), BN, ReLU, shuffle, depthwise K, BN, ReLU, 1x1 (groups), BN; residual where shapes
    agree."""
    op = randomise(FAMILIES.get("mbconv").single(slot((8, 8, 6, 1)), ("k5_e1_g2",))).eval()
    x = torch.randn(2, 8, 6, 6)
    state = op.state_dict()

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        get = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(y, *get)

    y = norm(torch.nn.functional.conv2d(x, state["expand.conv.weight"], groups=2), "expand").relu()
    y = y.reshape(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6)
    y = norm(torch.nn.functional.conv2d(y, state["depthwise.conv.weight"], padding=2, groups=8), "depthwise").relu()
    y = norm(torch.nn.functional.conv2d(y, state["project.conv.weight"], groups=2), "project")
    torch.testing.assert_close(op(x), x + y)


def gates(values: torch.Tensor, run: tuple[int, ...], train: tuple[int, ...]) -> Gates:
    return Gates(values, run, train)


def test_mixed_is_the_weighted_sum() -> None:
    mixed = FAMILIES.get("mbconv").mixed(slot(SHAPES[0])).eval()
    x, values = torch.randn(3, 16, 8, 8), torch.rand(9)
    every = tuple(range(9))
    expected = sum(value * option(x) for value, option in zip(values, mixed.options.values(), strict=True))
    torch.testing.assert_close(mixed(x, gates(values, every, every)), expected)
    per_image = torch.rand(3, 9)
    rows = [mixed(x[i : i + 1], gates(per_image[i], every, every)) for i in range(3)]
    torch.testing.assert_close(mixed(x, gates(per_image, every, every)), torch.cat(rows))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", [0, 3, 8])
def test_one_option_alone_needs_no_gate(shape: tuple[int, int, int, int], index: int) -> None:
    """The same output, gradients and statistics as under a gate of one, and nothing else is touched."""
    alone = FAMILIES.get("mbconv").mixed(slot(shape))
    gated = copy.deepcopy(alone)
    x = torch.randn(4, shape[0], shape[2], shape[2])
    single = Gates.one_hot(9, index)
    assert single.values.tolist() == [float(i == index) for i in range(9)]
    for mixed, here in ((alone, single), (gated, gates(single.values, (index,), (index,)))):
        y = mixed(x, here)
        if y.requires_grad:  # the identity has nothing to train
            y.square().sum().backward()
    assert [p.grad is None for p in alone.parameters()] == [p.grad is None for p in gated.parameters()]
    for ours, theirs in zip(alone.parameters(), gated.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(dict(alone.named_buffers()), dict(gated.named_buffers()))
    torch.testing.assert_close(alone(x, single), gated(x, gates(single.values, (index,), (index,))))


def test_mixed_runs_and_trains_what_the_gates_say() -> None:
    mixed = FAMILIES.get("mbconv").mixed(slot(SHAPES[0]))
    values = torch.zeros(9, requires_grad=True)
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    mixed(x, gates(values, (0, 3, 8), (0,))).square().sum().backward()
    mixed(x, gates(values + torch.nn.functional.one_hot(torch.tensor(0), 9), (0, 3, 8), (0,))).square().sum().backward()
    trained = {name for name, option in mixed.options.items() if any(p.grad is not None for p in option.parameters())}
    assert trained == {"k3_e1"}
    # An option that runs without being trained still gives its gate a gradient, though the gate is zero.
    assert values.grad is not None
    assert (values.grad[[0, 3, 8]] != 0).all()
    assert (values.grad[[1, 2, 4, 5, 6, 7]] == 0).all()
