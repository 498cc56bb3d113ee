"""Counts against the formulas that anyone can check by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pynas.counting import Counts, count


class Products(nn.Module):
    """Products of activations: multiply-adds, but of no layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        attended = nn.functional.scaled_dot_product_attention(x, x, x)
        return torch.bmm(x, x.transpose(1, 2)).sum() + attended.sum()


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    bias=st.booleans(),
)
def test_convolutions(
    groups: int, widths: tuple[int, int], kernel: int, stride: int, dilation: int, size: tuple[int, int], bias: bool
) -> None:
    inputs, outputs = groups * widths[0], groups * widths[1]
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 * dilation, dilation, groups, bias)
    pixels = -(-size[0] // stride) * -(-size[1] // stride)
    weights = outputs * widths[0] * kernel**2
    assert count(conv, (inputs, *size)) == Counts(params=weights + outputs * bias, macs=weights * pixels)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [[nn.Flatten()], [nn.Flatten(2)], [nn.Flatten(2), nn.Unflatten(1, (2, 3))]])
def test_linear_layers_of_any_input(before: list[nn.Module], bias: bool) -> None:
    linear = nn.LazyLinear(7, bias=bias)
    net = nn.Sequential(*before, linear)
    rows = 6 * 4 * 4 // net(torch.zeros(1, 6, 4, 4)).new_empty(0, linear.in_features).shape[1]
    weights = 7 * linear.in_features
    assert count(net, (6, 4, 4)) == Counts(params=weights + 7 * bias, macs=weights * rows)


def test_block_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 24, 1, groups=2, bias=False),  # 96 weights on 100 pixels
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 5, 2, 2, groups=24, bias=False),  # 600 weights on 25 pixels
        nn.BatchNorm2d(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),  # 240 weights
    )
    assert count(net, (8, 10, 10)) == Counts(params=96 + 48 + 600 + 48 + 240 + 10, macs=9600 + 15000 + 240)


def test_nothing_but_layers_counts() -> None:
    others = nn.Sequential(nn.BatchNorm2d(8), nn.Hardswish(), nn.AvgPool2d(3), nn.Upsample(scale_factor=2))
    assert count(others, (8, 9, 9)) == Counts(params=16, macs=0)
    assert count(Products(), (8, 4, 4)) == Counts(params=0, macs=0)


def test_shared_layers_store_once_and_compute_twice() -> None:
    conv = nn.Conv2d(4, 4, 1, bias=False)
    assert count(nn.Sequential(conv, conv), (4, 5, 5)) == Counts(params=16, macs=800)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    assert count(nn.Conv2d(3, 4, 1).to(dtype), (3, 2, 2)) == Counts(params=16, macs=48)


@pytest.mark.parametrize("channels", [3, 4], ids=["works", "fails"])
def test_net_comes_back_as_it_was(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)).train()
    net[3].eval()
    before = copy.deepcopy(net.state_dict())
    if channels == 3:
        count(net, (channels, 6, 6))
    else:
        with pytest.raises(ValueError, match="fails"):
            count(net, (channels, 6, 6))
    assert [module.training for module in net] == [True, True, True, False]
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("net", "shape", "words"),
    [
        (nn.Conv2d(3, 4, 1), (4, 6, 6), r"\(4, 6, 6\).*to have 3 channels, but got 4.*Give the input_shape"),
        (nn.Conv2d(3, 4, 5), (3, 2, 2), r"fails on one image of shape \(3, 2, 2\)"),
        (nn.Conv2d(3, 4, 1), (6, 6), r"\(channels, height, width\).*not \(6, 6\)"),
        (nn.Conv2d(3, 4, 1), (3, 0, 6), r"not \(3, 0, 6\)"),
        (nn.Conv2d(3, 4, 1), (3, 6.5, 6), r"not \(3, 6\.5, 6\)"),
        (nn.Conv2d(3, 4, 1), 224, r"not \(224,\)"),
        (nn.Sequential(nn.Flatten(2), nn.LSTM(4, 4)), (3, 2, 2), "layer '1': LSTM"),
        ("net", (3, 2, 2), r"takes a torch\.nn\.Module, not str"),
    ],
)
def test_errors(net: Any, shape: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count(net, shape)
