"""Sums, activations and copies: bound by memory, not by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from ..layers import Concat, Shuffle, Sum
from .loops import each_block
from .tiling import Tile, blocks
from .tir import Code, Expr, Kernel, activate, buffer, load, nothing, store

if TYPE_CHECKING:
    from ..targets import Target


def tiles(layer: Sum | Concat | Shuffle, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    return [Tile(1, vectors, target.lanes) for vectors in (4, 1, 2, 8)]


def kernel(layer: Sum | Concat | Shuffle, target: Target, tile: Tile) -> Kernel:
    """The code of a sum, a concatenation or a shuffle."""
    if isinstance(layer, Sum):
        return Kernel(_sum(layer, tile), nothing)
    if isinstance(layer, Concat):
        return Kernel(_concat(layer, tile), nothing)
    return Kernel(_shuffle(layer), nothing)


def _vectors(code: Code, total: int, tile: Tile) -> Iterator[tuple[Expr, int]]:
    """Offset and width of all vectors of a run of values."""
    for block, first in each_block(code, blocks(total, tile.lanes, tile.vectors)):
        at = first
        for width in block.widths:
            yield at, width
            at = at + width


def _sum(layer: Sum, tile: Tile) -> Any:
    terms = [buffer(f"x{index}", *layer.shape) for index in range(layer.terms)]
    output = buffer("y", *layer.shape)
    code = Code()
    for at, width in _vectors(code, prod(layer.shape), tile):
        value = load(terms[0], at, width)
        for term in terms[1:]:
            value = value + load(term, at, width)
        total = code.let("total", value, width)
        code.add(store(output, at, width, activate(total, width, layer.activation)))
    return code.function([*terms, output])


def _concat(layer: Concat, tile: Tile) -> Any:
    shape = (layer.batch, layer.height, layer.width)
    parts = [buffer(f"x{index}", *shape, channels) for index, channels in enumerate(layer.channels)]
    total = sum(layer.channels)
    output = buffer("y", *shape, total)
    code = Code()
    with code.loop("pixel", prod(shape)) as pixel:
        start = 0
        for part, channels in zip(parts, layer.channels, strict=True):
            for at, width in _vectors(code, channels, tile):
                code.add(store(output, pixel * total + start + at, width, load(part, pixel * channels + at, width)))
            start += channels
    return code.function([*parts, output])


def _shuffle(layer: Shuffle) -> Any:
    shape = (layer.batch, layer.height, layer.width, layer.channels)
    source, output = buffer("x", *shape), buffer("y", *shape)
    apart = layer.channels // layer.groups
    code = Code()
    with code.loop("pixel", prod(shape[:3])) as pixel, code.loop("channel", apart) as channel:
        start = pixel * layer.channels
        for part in range(layer.groups):
            value = load(source, start + part * apart + channel, 1)
            code.add(store(output, start + channel * layer.groups + part, 1, value))
    return code.function([source, output])
