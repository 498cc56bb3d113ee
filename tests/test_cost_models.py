"""Contracts of op specs and of every cost model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_device import CONV, LINEAR, MBCONV, OPS, SKIP, Reference, toy_table

from cost_models import COUNTS, CostModel, MemoryTraffic, OpSpec, Roofline
from cost_models.names import unknown
from cost_models.spec import ACTIVATIONS, FIELDS, KINDS


@st.composite
def specs(draw: st.DrawFn, largest: int = 4096) -> OpSpec:
    """Any valid spec."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    uses = KINDS[kind].uses
    groups = draw(st.sampled_from([1, 2, 4])) if "groups" in uses else 1
    channels = st.integers(1, largest // groups).map(lambda n: n * groups)
    in_channels = draw(channels)
    if kind == "reduce":
        channels = channels.map(lambda n: 2 * n)
    return OpSpec(
        kind,
        in_channels,
        in_channels if KINDS[kind].keeps_channels else draw(channels),
        1 if kind == "linear" else draw(st.integers(1, 40)),
        kernel=draw(st.sampled_from([1, 3, 5, 7])) if "kernel" in uses else 1,
        stride=draw(st.integers(1, 3)) if "stride" in uses else 1,
        groups=groups,
        expansion=draw(st.integers(1, 6)) if "expansion" in uses else 1,
        dilation=draw(st.integers(1, 2)) if "dilation" in uses else 1,
        squeeze=draw(st.integers(0, 5)) if "squeeze" in uses else 0,
        affine=draw(st.integers(0, 1)) if "affine" in uses else 1,
        activation=draw(st.sampled_from(ACTIVATIONS)) if "activation" in uses else "none",
    )


@given(specs())
def test_spec_survives_json_and_csv(spec: OpSpec) -> None:
    assert OpSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert OpSpec.from_row(spec.to_row()) == spec.deployed


@given(specs(largest=12), specs(largest=12))
def test_keys_differ_where_specs_differ(one: OpSpec, other: OpSpec) -> None:
    assert (one.key == other.key) == (one == other)


def test_key_is_readable() -> None:
    assert MBCONV.key == "mbconv-i16-o24-s8-k3-t2-g1-e6-relu"


def test_kinds_without_activation_ignore_it() -> None:
    assert OpSpec("pool", 8, 8, 4, activation="relu6") == OpSpec("pool", 8, 8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mbcnv"}, "Unknown op kind 'mbcnv'. Did you mean 'mbconv'"),
        ({"activation": "rely"}, "Unknown activation 'rely'. Did you mean 'relu'"),
        ({"in_channels": 0}, "in_channels of a 'mbconv' op is 0"),
        ({"size": 2.0}, "size of a 'mbconv' op is 2.0"),
        ({"expansion": True}, "expansion of a 'mbconv' op is True"),
        ({"kernel": 4}, "kernel is 4; only odd"),
        ({"groups": 3}, "groups is 3; it must divide the input channels (16)"),
        ({"squeeze": -1}, "squeeze of a 'mbconv' op is -1; it must be a whole number of at least 0"),
        (
            {"kind": "conv", "expansion": 1, "squeeze": 4},
            "A 'conv' op has no squeeze; it came as 4 and must be left at 0",
        ),
        ({"kind": "conv"}, "A 'conv' op has no expansion; it came as 6"),
        ({"kind": "skip", "expansion": 1, "kernel": 1, "stride": 1}, "A 'skip' op cannot change the channels"),
        ({"kind": "linear", "expansion": 1, "kernel": 1, "stride": 1}, "size of a 'linear' op is 8; it must be 1"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(MBCONV, **change)


def test_bad_dicts_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown OpSpec field 'kernal'. Did you mean 'kernel'"):
        OpSpec.from_dict({**MBCONV.to_dict(), "kernal": 3})
    with pytest.raises(ValueError, match="out_channels, size is missing"):
        OpSpec.from_dict({"kind": "conv", "in_channels": 3})


def test_specs_sort_and_list_all_fields() -> None:
    assert sorted([MBCONV, CONV])[0] == CONV
    assert tuple(MBCONV.to_dict()) == FIELDS


@settings(max_examples=60, deadline=None)
@given(specs(largest=48))
def test_counts_equal_those_of_a_torch_module(spec: OpSpec) -> None:
    with torch.device("meta"):
        module = Reference(spec).eval()
        image = torch.empty(1, spec.in_channels, *(() if spec.kind == "linear" else (spec.size, spec.size)))
    macs = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        macs += output.numel() * layer.weight[0].numel()

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    output = module(image)

    assert COUNTS["macs"]().cost(spec) == macs
    assert COUNTS["params"]().cost(spec) == sum(weight.numel() for weight in module.parameters())
    assert spec.out_size == (1 if spec.kind == "linear" else output.shape[-1])


def test_traffic_and_roofline_of_one_layer_by_hand() -> None:
    values = 16 + (160 + 10) + 10
    assert MemoryTraffic().cost(LINEAR) == 4 * values
    assert MemoryTraffic(bytes_per_value=1).cost(LINEAR) == values
    assert Roofline(1, 1e6, overhead_us=5).cost(LINEAR) == pytest.approx(160e-6 + 5e-3)
    assert Roofline(1e6, 1).cost(LINEAR) == pytest.approx(4 * values * 1e-6)


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0), (1, float("inf"), 0)])
def test_roofline_refuses_nonsense(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be a"):
        Roofline(*numbers)


MODELS: dict[str, Callable[[], CostModel]] = {**COUNTS, "roofline": lambda: Roofline(10, 5, 2), "table": toy_table}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_model_contract(make: Callable[[], CostModel]) -> None:
    model = make()
    assert isinstance(model, CostModel)
    assert model.cost(SKIP) == 0
    for spec in OPS:
        assert model.cost(spec) > 0 or (spec.kind == "pool" and not spec.macs and not spec.params)
        assert model.source(spec) in ("measured", "modelled", "fitted", "analytic")
    assert "\n" not in model.describe()
    assert len(model.describe()) > 20


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "change",
    [{"in_channels": 32}, {"out_channels": 48}, {"kernel": 5}, {"expansion": 8}, {"size": 12}, {"squeeze": 8}],
    ids=lambda change: next(iter(change)),
)
def test_larger_ops_cost_no_less(make: Callable[[], CostModel], change: dict[str, Any]) -> None:
    model = make()
    assert model.cost(replace(MBCONV, **change)) >= model.cost(MBCONV)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, cost_models; print([m for m in ('torch', 'scipy', 'pynas') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_unknown_names_suggest_and_list() -> None:
    error = unknown("device", "cortex-a27", ["rpi4", "cortex-a72"], "Try pynas list devices.")
    assert str(error) == (
        "Unknown device 'cortex-a27'. Did you mean 'cortex-a72'? Allowed: cortex-a72, rpi4. Try pynas list devices."
    )
    assert str(unknown("device", "zzz", [])) == "Unknown device 'zzz'. Allowed: none so far."
