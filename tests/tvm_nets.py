"""Modules that the tests of TVM's code are made of."""

from __future__ import annotations

import random

from torch import nn

from cost_models.spec import OpSpec
from pynas.architecture import Architecture
from pynas.fuse import fuse
from pynas.ops import build as make_op
from pynas.registry import SPACES

SPECS = [
    OpSpec("conv", 3, 16, 17, kernel=3, stride=2),
    OpSpec("conv", 16, 24, 7, activation="relu6"),
    OpSpec("conv", 16, 12, 8, stride=2, activation="none"),
    OpSpec("conv", 16, 32, 9, kernel=3, groups=2, activation="hardswish"),
    OpSpec("conv", 24, 24, 9, kernel=5, groups=24, dilation=2),
    OpSpec("conv", 8, 8, 8, kernel=3, dilation=2, activation="none"),
    OpSpec("mbconv", 8, 8, 7, kernel=3, expansion=2, activation="hardswish"),
    OpSpec("mbconv", 8, 12, 8, kernel=5, stride=2, groups=2, expansion=3, activation="relu6"),
    OpSpec("mbconv", 8, 8, 8, kernel=7, groups=4, expansion=6),
    OpSpec("pool", 20, 20, 7),
    OpSpec("linear", 20, 13, 1),
]


def deployed(spec: OpSpec) -> tuple[nn.Module, tuple[int, ...]]:
    """The module as it is measured, and the shape of its input."""
    pixels = () if spec.kind == "linear" else (spec.size, spec.size)
    return fuse(make_op(spec)), (1, spec.in_channels, *pixels)


def randomised(module: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.normal_(part.bias)
    return module.eval()


def random_network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Any architecture of the smallest space, and the shape of its input."""
    space = SPACES.get("fbnet_tiny")()
    rng = random.Random(seed)
    choices = {choice.name: (rng.choice(choice.options),) for choice in space.choices()}
    module = Architecture("fbnet_tiny", choices, space.options()).build()
    return randomised(module), (1, 3, space.input_size, space.input_size)
