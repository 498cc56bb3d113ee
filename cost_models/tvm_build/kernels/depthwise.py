"""Depthwise convolutions: a vector of channels at a time, without a padded copy of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..layers import Conv
from .arguments import Arguments
from .loops import each_block, each_line, each_strip
from .product import begin, finish, pack
from .tiling import Block, Order, Strip, Tile, blocks, strips
from .tir import Array, Code, Expr, Kernel, Register, load

if TYPE_CHECKING:
    from ..targets import Target

_NEAR_BYTES = 16 * 1024
_CACHE_BYTES = 256 * 1024
_LINE_BYTES = 64


def tiles(layer: Conv, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    orders: list[Order] = ["channels", "pixels"] if _channels_first(layer, target) else ["pixels", "channels"]
    shapes = [(8, 1), (4, 1), (4, 2), (14, 1), (10, 1), (5, 1), (6, 1), (4, 3), (8, 2), (2, 2)]
    near = [(4, 3), (4, 2)] if target.family == "x86" else [(8, 2)] if layer.kernel <= 3 else []
    found = []
    for order in orders:
        # Where the image comes from far away, longer runs of neighbouring channels arrive faster.
        best = near + shapes if order == "pixels" else shapes
        fitting = [pair for pair in best if pair[1] * (pair[0] + layer.kernel) < target.registers] or [(4, 1)]
        found += [Tile(pixels, vectors, target.lanes, order) for pixels, vectors in dict.fromkeys(fitting)]
    return found


def _channels_first(layer: Conv, target: Target) -> bool:
    """Whether the image of one vector of channels stays in a cache although it is read a line at a time."""
    image = _LINE_BYTES * layer.height * layer.width
    if image <= _NEAR_BYTES or (image <= _CACHE_BYTES and 4 * target.lanes >= _LINE_BYTES):
        return True
    return image <= _CACHE_BYTES and 4 * layer.kernel**2 * layer.in_channels > _NEAR_BYTES


def kernel(layer: Conv, target: Target, tile: Tile) -> Kernel:
    """The code of a depthwise convolution with stride, dilation and residual."""
    written = _Depthwise(layer, tile)
    return Kernel(written.arguments.function(written.code), written.pack)


class _Depthwise:
    def __init__(self, layer: Conv, tile: Tile) -> None:
        self.layer = layer
        self.blocks = blocks(layer.out_channels, tile.lanes, tile.vectors)
        self.strips = strips(layer, tile.pixels)
        self.arguments = Arguments(layer)
        self.code = Code()
        with self.code.loop("image", layer.batch) as image:
            if tile.order == "channels":
                self._channels_first(image)
            else:
                self._pixels_first(image)

    def _channels_first(self, image: Expr) -> None:
        for block, channel in each_block(self.code, self.blocks):
            with self.code.loop("line", self.layer.out_height) as line:
                for strip, column in each_strip(self.code, self.strips):
                    self._tile(image, line, block, channel, strip, column)

    def _pixels_first(self, image: Expr) -> None:
        with self.code.loop("line", self.layer.out_height) as line:
            for strip, column in each_strip(self.code, self.strips):
                for block, channel in each_block(self.code, self.blocks):
                    self._tile(image, line, block, channel, strip, column)

    def _tile(self, image: Expr, line: Expr, block: Block, channel: Expr, strip: Strip, column: Expr) -> None:
        layer, arguments = self.layer, self.arguments
        sums = begin(self.code, strip.size, block.widths, arguments.bias, channel)
        for tap, source_line in each_line(self.code, layer, line):
            source = (image * layer.height + source_line) * layer.width + column * layer.stride - layer.padding
            weight = channel * layer.kernel**2 + tap * (layer.kernel * block.channels)
            self._row(sums, strip, source, channel, weight)
        pixel = (image * layer.out_height + line) * layer.out_width + column
        stored = [(row, (pixel + at) * layer.out_channels + channel) for at, row in enumerate(sums)]
        finish(self.code, stored, arguments.output, arguments.residual, layer.activation)

    def _row(self, sums: list[list[Register]], strip: Strip, source: Expr, channel: Expr, weight: Expr) -> None:
        """One row of the kernel: every input vector is loaded once, and used for all outputs that it takes part in."""
        layer, code = self.layer, self.code
        uses: dict[int, list[tuple[int, int]]] = {}
        for at in range(strip.size):
            for tap in range(layer.kernel):
                if strip.taps[at][tap]:
                    uses.setdefault(at * layer.stride + tap * layer.dilation, []).append((at, tap))
        if not uses:
            return
        near = min(uses)
        pixels = code.view("pixels", self.arguments.input, (source + near) * layer.in_channels + channel)
        weights = code.view("weights", self.arguments.weights, weight)
        widths = [register.width for register in sums[0]]
        factors: dict[tuple[int, int], Expr] = {}
        for position in sorted(uses):
            for index, width in enumerate(widths):
                offset = sum(widths[:index])
                value = code.let("x", load(pixels, (position - near) * layer.in_channels + offset, width), width)
                for at, tap in uses[position]:
                    if (tap, index) not in factors:
                        factor = load(weights, tap * sum(widths) + offset, width)
                        factors[tap, index] = code.let("w", factor, width)
                    code.add(sums[at][index].add(value * factors[tap, index]))

    def pack(self, parameters: Sequence[Array]) -> list[Array]:
        weight, bias = parameters
        matrix = weight.reshape(self.layer.out_channels, -1).T
        return [np.concatenate(pack(matrix, self.blocks)), bias.reshape(-1)]
