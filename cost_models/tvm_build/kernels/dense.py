"""Convolutions with windows over all channels of a group: a matrix product for each place in the window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layers import Conv
from .arguments import Arguments
from .grouped import each_group, pack_groups, runs
from .loops import each_line, each_strip
from .product import begin, finish, multiply
from .tiling import Block, Strip, Tile, blocks, by_lane, product_tiles, strips
from .tir import Code, Expr, Kernel, Register, least

if TYPE_CHECKING:
    from ..targets import Target

_BAND_BYTES = 256 * 1024


def tiles(layer: Conv, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    depth = layer.in_channels // layer.groups * layer.kernel * layer.kernel
    pairs = product_tiles(target, layer.out_width, layer.out_channels // layer.groups, depth)
    return [Tile(pixels, vectors, target.lanes, order) for pixels, vectors in pairs for order in ("channels", "pixels")]


def kernel(layer: Conv, target: Target, tile: Tile) -> Kernel:
    """The code of a convolution of any kernel, stride, padding, dilation and groups, with residual and shuffle."""
    written = _Dense(layer, target, tile)
    function = written.arguments.function(written.code)
    return Kernel(function, lambda parameters: pack_groups(layer, parameters, written.blocks))


class _Dense:
    def __init__(self, layer: Conv, target: Target, tile: Tile) -> None:
        self.layer, self.tile = layer, tile
        self.held = by_lane(target)
        self.depth = layer.in_channels // layer.groups * layer.kernel * layer.kernel
        self.blocks = blocks(layer.out_channels // layer.groups, tile.lanes, tile.vectors)
        self.strips = strips(layer, tile.pixels)
        self.arguments = Arguments(layer)
        self.code = Code()
        with self.code.loop("image", layer.batch) as image:
            self._image(image)

    def _image(self, image: Expr) -> None:
        """Bands of rows; in each of them all channels."""
        code, layer = self.code, self.layer
        line_bytes = 4 * layer.in_channels * layer.width * layer.stride
        band = 1 if self.tile.order == "pixels" else max(1, min(layer.out_height, _BAND_BYTES // line_bytes))
        bands = -(-layer.out_height // band)
        band = -(-layer.out_height // bands)
        with code.loop("band", bands, step=band) as first:
            count = band if layer.out_height % band == 0 else least(band, layer.out_height - first)
            for group, block, channel in each_group(code, layer, self.blocks):
                with code.loop("line", count) as index:
                    for strip, column in each_strip(code, self.strips):
                        self._tile(image, first + index, block, group, channel, strip, column)

    def _tile(
        self, image: Expr, line: Expr, block: Block, group: Expr, channel: Expr, strip: Strip, column: Expr
    ) -> None:
        code, layer, arguments = self.code, self.layer, self.arguments
        sums = begin(code, strip.size, block.widths, arguments.bias, channel)
        row_weights = layer.in_channels // layer.groups * layer.kernel * block.channels
        for tap, source_line in each_line(code, layer, line):
            source = (image * layer.height + source_line) * layer.width + column * layer.stride - layer.padding
            self._row(sums, strip, source, group, channel * self.depth + tap * row_weights)
        pixel = (image * layer.out_height + line) * layer.out_width + column
        stored = [(row, (pixel + at) * layer.out_channels + channel) for at, row in enumerate(sums)]
        finish(code, stored, arguments.output, arguments.residual, layer.activation)

    def _row(self, sums: list[list[Register]], strip: Strip, source: Expr, group: Expr, weight: Expr) -> None:
        """One row of the kernel: for each of its columns, the products of those outputs that are off the border."""
        layer, arguments = self.layer, self.arguments
        width = sum(register.width for register in sums[0])
        for tap in range(layer.kernel):
            used = [at for at in range(strip.size) if strip.taps[at][tap]]
            for start, length in runs(layer, group):
                if used:
                    first = source + (used[0] * layer.stride + tap * layer.dilation)
                    pixels = self.code.view("pixels", arguments.input, first * layer.in_channels + start)
                    rows = [(sums[at], (at - used[0]) * layer.stride * layer.in_channels) for at in used]
                    multiply(self.code, rows, pixels, arguments.weights, weight, length, self.held)
                weight = weight + length * width
