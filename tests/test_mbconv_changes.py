"""Modules that change after their kernel has been told what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import EVERY, OwnConv, block, choice
from torch import nn

from pynas import Gates
from pynas.kernels import setting


@pytest.fixture(autouse=True)
def _always_fused() -> Iterator[None]:
    with setting.using("fused"):
        yield


def new_options(layer: Any) -> None:
    layer.options = copy.deepcopy(layer.options)
    with torch.no_grad():
        layer.options["k3_e1"].expand.conv.weight += 1


def option_with_own_forward(layer: Any) -> None:
    option = layer.options["k3_e1"]
    option.forward = lambda x: 2 * type(option).forward(option, x)


def norm_with_own_forward(layer: Any) -> None:
    norm = layer.options["k3_e1"].depthwise.bn
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def identity_with_own_forward(layer: Any) -> None:
    layer.options["skip"].forward = lambda x: 3 * x


def without_residual(layer: Any) -> None:
    layer.options["k3_e1"].residual = False


def circular(layer: Any) -> None:
    layer.options["k3_e1"].depthwise.conv.padding_mode = "circular"


def dilated(layer: Any) -> None:
    conv = layer.options["k3_e1"].depthwise.conv
    conv.dilation, conv.padding = (2, 2), (2, 2)


def of_another_class(layer: Any) -> None:
    conv = layer.options["k3_e1"].expand.conv
    conv.__class__ = OwnConv


def with_bias(layer: Any) -> None:
    layer.options["k3_e1"].expand.conv.bias = nn.Parameter(torch.ones(8))


def cut_out(layer: Any) -> None:
    option = layer.options["k3_e1"]
    for part in (option.expand, option.depthwise):
        part.conv.weight = nn.Parameter(part.conv.weight[:5].detach())
        part.bn = nn.BatchNorm2d(5)
    option.depthwise.conv.groups = 5
    option.project.conv.weight = nn.Parameter(option.project.conv.weight[:, :5].detach())


@pytest.mark.parametrize(
    "change",
    [
        new_options,
        option_with_own_forward,
        norm_with_own_forward,
        identity_with_own_forward,
        without_residual,
        circular,
        dilated,
        of_another_class,
        with_bias,
        cut_out,
    ],
)
def test_what_changes_after_a_step_is_noticed(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    ours, x = choice((8, 8, 6, 1)), torch.randn(3, 8, 6, 6)
    twin, gates = copy.deepcopy(ours), Gates(torch.rand(9), EVERY, EVERY)
    for net, kernels in ((ours, "fused"), (twin, "reference")):
        with setting.using(kernels):  # type: ignore[arg-type]
            net(x, gates)
            change(net)
            net(x, gates)
    for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with setting.using("reference"):
        expected = twin(x, gates)
    torch.testing.assert_close(ours(x, gates), expected, rtol=1e-4, atol=1e-4)


def test_a_shallow_copy_runs_its_own_modules() -> None:
    torch.manual_seed(0)
    net, x = block((8, 8, 6, 1)), torch.randn(3, 8, 6, 6)
    net(x)
    twin = copy.copy(net)
    twin._modules = dict(net._modules) | {"project": copy.deepcopy(net.project)}
    with torch.no_grad():
        twin.project.bn.weight += 1
    torch.testing.assert_close(twin(x), twin.plain(x), rtol=1e-4, atol=1e-4)


def test_a_batch_of_gradients_is_refused_in_words() -> None:
    net, x = block((8, 8, 6, 1)), torch.randn(3, 8, 6, 6, requires_grad=True)
    y = net(x)
    with pytest.raises(RuntimeError, match="one gradient at a time.*kernels='reference'"):
        torch.autograd.grad(y, x, torch.stack([y, y]).detach(), is_grads_batched=True)
