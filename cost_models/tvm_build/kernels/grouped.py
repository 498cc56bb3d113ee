"""Groups of channels, and a channel shuffle that is an order of reading and not a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..layers import Conv
from .loops import each_block
from .product import pack
from .tiling import Block
from .tir import Array, Code, Expr


def each_group(code: Code, layer: Conv, blocks: Sequence[Block]) -> Iterator[tuple[Expr, Block, Expr]]:
    """Loops over groups, and over the vectors of each: the group, the vectors' kind, and their first channel."""
    channels, depth = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    if layer.groups == 1 or depth % layer.shuffle == 0:
        with code.loop("group", layer.groups) as group:
            for block, channel in each_block(code, blocks):
                yield group, block, group * channels + channel
        return
    for number in range(layer.groups):
        for block, channel in each_block(code, blocks):
            yield number, block, number * channels + channel


def runs(layer: Conv, group: Expr) -> list[tuple[Expr, int]]:
    """Start and length of a group's inputs as they lie before the shuffle, which interleaves equal parts.

    `group` must be a Python integer where the parts do not divide a group's inputs.
    """
    depth, parts = layer.in_channels // layer.groups, layer.shuffle
    if layer.groups == 1:
        return [(0, depth)]
    apart = layer.in_channels // parts
    if depth % parts == 0:
        return [(part * apart + group * (depth // parts), depth // parts) for part in range(parts)]
    found = []
    for part in range(parts):
        first, last = (-(-(depth * (group + more) - part) // parts) for more in (0, 1))
        found.append((part * apart + first, last - first))
    return [run for run in found if run[1]]


def pack_groups(layer: Conv, parameters: Sequence[Array], blocks: Sequence[Block]) -> list[Array]:
    """Weights for each group, each block of channels, each row and column of the kernel, and each input in turn."""
    weight, bias = parameters
    channels, depth = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    parts, apart = layer.shuffle, layer.in_channels // layer.shuffle
    taps = layer.kernel * layer.kernel
    matrix = weight.reshape(layer.groups, channels, depth, taps)
    pieces: list[Array] = []
    for group in range(layer.groups):
        inputs = np.concatenate([np.arange(start, start + length) for start, length in runs(layer, group)])
        order = inputs % apart * parts + inputs // apart - group * depth
        ordered = matrix[group][:, order].transpose(2, 1, 0)
        pieces += pack(ordered.reshape(taps * depth, channels), blocks)
    return [np.concatenate(pieces), bias.reshape(-1)]
