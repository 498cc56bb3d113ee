"""Modules that specs of fixed kinds stand for: convolution with batch norm, pooling, classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.registry import Registry

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "swish": nn.SiLU,
}


class ConvBN(nn.Sequential):
    """Bias-free convolution, batch norm and, unless "none", an activation; padding keeps the size at stride 1.

    (B, in_channels, S, S) -> (B, out_channels, ceil(S / stride), ceil(S / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str = "relu",
        dilation: int = 1,
    ) -> None:
        padding = kernel // 2 * dilation
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
        layers["bn"] = nn.BatchNorm2d(out_channels)
        if activation != "none":
            layers["activation"] = ACTIVATIONS[activation](inplace=True)
        super().__init__(layers)


class GlobalPool(nn.Module):
    """Mean over height and width: (B, C, H, W) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


# Maker of the module of every op kind; the keys are the kinds of `cost_models.spec`.
MODULES: Registry[Callable[[OpSpec], nn.Module]] = Registry("op kind")


def build(spec: OpSpec) -> nn.Module:
    """The module that a spec stands for, with fresh weights. Raises ValueError for a kind that has no module."""
    return MODULES.get(spec.kind)(spec)


@MODULES.register("conv")
def _conv(spec: OpSpec) -> nn.Module:
    return ConvBN(
        spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.groups, spec.activation, spec.dilation
    )


@MODULES.register("linear")
def _linear(spec: OpSpec) -> nn.Module:
    return nn.Linear(spec.in_channels, spec.out_channels)


@MODULES.register("pool")
def _pool(spec: OpSpec) -> nn.Module:
    return GlobalPool()


@MODULES.register("skip")
def _skip(spec: OpSpec) -> nn.Module:
    return nn.Identity()
