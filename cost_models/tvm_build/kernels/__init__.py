"""Code for every kind of layer, written by hand for the vectors and registers of a target; deterministic, not tuned.

To add a kind of layer: a record in `layers.py`, a file here with `tiles` and `kernel`, and its line in `_KINDS`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ..layers import Concat, Conv, GlobalPool, Layer, Linear, Pool, Shuffle, Sum
from . import dense, depthwise, elementwise, linear, pointwise, pool
from .tiling import Tile
from .tir import Kernel

if TYPE_CHECKING:
    from ..targets import Target

__all__ = ["Kernel", "Tile", "kernel", "tiles"]

_KINDS: dict[type, ModuleType] = {
    Pool: pool,
    GlobalPool: pool,
    Linear: linear,
    Sum: elementwise,
    Concat: elementwise,
    Shuffle: elementwise,
}


def tiles(layer: Layer, target: Target) -> list[Tile]:
    """The sensible ways to cut a layer for a target, the best guess first; never empty."""
    found: list[Tile] = _kind(layer).tiles(layer, target)
    return found


def kernel(layer: Layer, target: Target, tile: Tile | None = None) -> Kernel:
    """The code of a layer for a target.

    Args:
        layer: What to compute.
        target: For which vectors and registers.
        tile: One of `tiles(layer, target)`; None for the best guess.

    Raises:
        ValueError: The layer is a depthwise convolution after a shuffle.
    """
    module = _kind(layer)
    written: Kernel = module.kernel(layer, target, tiles(layer, target)[0] if tile is None else tile)
    return written


def _kind(layer: Layer) -> ModuleType:
    if not isinstance(layer, Conv):
        return _KINDS[type(layer)]
    if layer.depthwise:
        if layer.shuffle > 1:
            raise ValueError(
                "A depthwise convolution does not read shuffled channels. "
                "Permute its weights, and shuffle the input of the next layer."
            )
        return depthwise
    return pointwise if layer.pointwise else dense
