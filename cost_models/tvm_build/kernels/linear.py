"""Fully connected layers: a matrix product with few rows, bound by reading the weights once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..layers import Linear
from .loops import each_block
from .product import begin, finish, multiply, pack
from .tiling import Tile, blocks, by_lane, product_tiles, shares
from .tir import Array, Code, Kernel, buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..targets import Target


def tiles(layer: Linear, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    if layer.batch > 3:
        pairs = product_tiles(target, layer.batch, layer.out_features, layer.in_features)
    else:
        most = target.registers // (2 * layer.batch)
        pairs = [(layer.batch, min(vectors, most)) for vectors in (8, 4, 6, 2, 1)]
    return [Tile(pixels, vectors, target.lanes, "channels") for pixels, vectors in dict.fromkeys(pairs)]


def kernel(layer: Linear, target: Target, tile: Tile) -> Kernel:
    """The code of a fully connected layer."""
    found = blocks(layer.out_features, tile.lanes, tile.vectors)
    depth, channels, held = layer.in_features, layer.out_features, by_lane(target)
    source, output = buffer("x", layer.batch, depth), buffer("y", layer.batch, channels)
    weights, bias = buffer("weight", depth * channels), buffer("bias", channels)
    code = Code()
    for block, channel in each_block(code, found):
        for share in shares(layer.batch, tile.pixels):
            with code.loop("image", share.count, share.start, share.size) as image:
                sums = begin(code, share.size, block.widths, bias, channel)
                rows = [(row, (image + at) * depth) for at, row in enumerate(sums)]
                multiply(code, rows, source, weights, channel * depth, depth, held)
                stored = [(row, (image + at) * channels + channel) for at, row in enumerate(sums)]
                finish(code, stored, output, None, layer.activation)

    def packed(parameters: Sequence[Array]) -> list[Array]:
        weight, offset = parameters
        return [np.concatenate(pack(weight.reshape(channels, depth).T, found)), offset.reshape(-1)]

    return Kernel(code.function([source, weights, bias, output]), packed)
