"""Inverted-bottleneck layers for tests: made, counted, and compared after a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas import FAMILIES, Choice, Slot
from pynas.kernels import mbconv
from pynas.ops.layers import build
from pynas.spaces import fbnet

OPTIONS = fbnet.OPTIONS
EVERY = tuple(range(len(OPTIONS)))


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def choice(shape: tuple[int, int, int, int], activation: str = "relu", options: tuple[str, ...] = OPTIONS) -> Any:
    here = Slot("here", Choice("here", options), "mbconv", *shape, activation=activation)
    return randomised(FAMILIES.get("mbconv").mixed(here))


def block(shape: tuple[int, int, int, int] = (8, 8, 6, 1), **spec: Any) -> Any:
    channels, out, size, stride = shape
    return randomised(
        build(OpSpec("mbconv", channels, out, size, stride=stride, **{"kernel": 3, "expansion": 3} | spec))
    )


def randomised(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net


def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts calls of the kernel from now on."""
    count = {"forward": 0, "backward": 0, "wanted": 0}
    forward, backward = mbconv._forward, mbconv._backward

    def counted_forward(*args: Any) -> Any:
        found = forward(*args)
        count["forward"] += found is not None
        return found

    def counted_backward(*args: Any) -> Any:
        count["backward"] += 1
        count["wanted"] = args[-1]
        return backward(*args)

    monkeypatch.setattr(mbconv, "_forward", counted_forward)
    monkeypatch.setattr(mbconv, "_backward", counted_backward)
    return count


def everything(net: nn.Module, call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state after one forward and backward pass."""
    for leaf in [*leaves, *net.parameters()]:
        leaf.grad = None
    y = call()
    y.backward(grad)
    found = {"y": y.detach()} | {f"leaf {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    found |= {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name)
        )
