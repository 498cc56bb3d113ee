"""The arguments of a convolution's function."""

from __future__ import annotations

from typing import Any

from ..layers import Conv
from .tir import Code, buffer


class Arguments:
    """Buffers of a convolution: the input, the residual if there is one, the weights, the bias and the output."""

    def __init__(self, layer: Conv) -> None:
        shape = (layer.batch, layer.out_height, layer.out_width, layer.out_channels)
        self.input = buffer("x", layer.batch, layer.height, layer.width, layer.in_channels)
        self.residual = buffer("residual", *shape) if layer.residual else None
        self.weights = buffer("weight", layer.out_channels * layer.in_channels // layer.groups * layer.kernel**2)
        self.bias = buffer("bias", layer.out_channels)
        self.output = buffer("y", *shape)

    def function(self, code: Code) -> Any:
        """What was written, as a function of these."""
        inputs = [self.input] if self.residual is None else [self.input, self.residual]
        return code.function([*inputs, self.weights, self.bias, self.output])
