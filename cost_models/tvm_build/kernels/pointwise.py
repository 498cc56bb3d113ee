"""1x1 convolutions: matrix products of pixels and channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layers import Conv
from .arguments import Arguments
from .grouped import each_group, pack_groups, runs
from .product import begin, finish, multiply
from .tiling import Block, Order, Share, Tile, blocks, by_lane, product_tiles, shares
from .tir import Code, Expr, Kernel, least

if TYPE_CHECKING:
    from ..targets import Target

_NEAR_BYTES = 16 * 1024
_BAND_BYTES = 256 * 1024


def tiles(layer: Conv, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    channels, depth = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    pairs = product_tiles(target, _pixels(layer)[1], channels, depth)
    near = 4 * layer.out_channels * depth <= _NEAR_BYTES
    orders: tuple[Order, Order] = ("pixels", "channels") if near else ("channels", "pixels")
    return [Tile(pixels, vectors, target.lanes, order) for pixels, vectors in pairs for order in orders]


def kernel(layer: Conv, target: Target, tile: Tile) -> Kernel:
    """The code of a 1x1 convolution with groups, stride, residual, and a channel shuffle before it."""
    written = _Pointwise(layer, target, tile)
    function = written.arguments.function(written.code)
    return Kernel(function, lambda parameters: pack_groups(layer, parameters, written.blocks))


def _pixels(layer: Conv) -> tuple[int, int]:
    """Output pixels as rows and columns such that the input pixels of a row are evenly spaced."""
    if layer.stride == 1:
        return 1, layer.batch * layer.height * layer.width
    return layer.batch * layer.out_height, layer.out_width


class _Pointwise:
    def __init__(self, layer: Conv, target: Target, tile: Tile) -> None:
        self.layer, self.tile = layer, tile
        self.held = by_lane(target)
        self.depth = layer.in_channels // layer.groups
        self.blocks = blocks(layer.out_channels // layer.groups, tile.lanes, tile.vectors)
        self.arguments = Arguments(layer)
        self.code = Code()
        rows, columns = _pixels(layer)
        with self.code.loop("row", rows) as row:
            source = self._source(row)
            for share in shares(columns, tile.pixels):
                self._share(share, source, row * (columns * layer.out_channels))

    def _source(self, row: Expr) -> Expr:
        layer = self.layer
        if layer.stride == 1:
            return 0
        image, line = row // layer.out_height, row % layer.out_height
        return (image * layer.height + line * layer.stride) * (layer.width * layer.in_channels)

    def _share(self, share: Share, source: Expr, target: Expr) -> None:
        """Bands of pixels; in each of them all channels."""
        layer = self.layer
        tile_bytes = 4 * layer.in_channels * layer.stride * share.size
        band = 1 if self.tile.order == "pixels" else max(1, min(share.count, _BAND_BYTES // tile_bytes))
        bands = -(-share.count // band)
        band = -(-share.count // bands)
        with self.code.loop("band", bands, step=band) as first:
            count = band if share.count % band == 0 else least(band, share.count - first)
            for group, block, channel in each_group(self.code, layer, self.blocks):
                with self.code.loop("tile", count) as index:
                    pixel = (first + index) * share.size + share.start
                    self._tile(share.size, block, group, channel, source, target, pixel)

    def _tile(
        self, size: int, block: Block, group: Expr, channel: Expr, source: Expr, target: Expr, pixel: Expr
    ) -> None:
        layer, arguments = self.layer, self.arguments
        sums = begin(self.code, size, block.widths, arguments.bias, channel)
        weight, pitch = channel * self.depth, layer.in_channels * layer.stride
        for start, length in runs(layer, group):
            rows = [(row, source + (pixel + at) * pitch + start) for at, row in enumerate(sums)]
            multiply(self.code, rows, arguments.input, arguments.weights, weight, length, self.held)
            weight = weight + length * block.channels
        stored = [(row, target + (pixel + at) * layer.out_channels + channel) for at, row in enumerate(sums)]
        finish(self.code, stored, arguments.output, arguments.residual, layer.activation)
