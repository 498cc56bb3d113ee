"""Loops over channels, columns, and the rows of the input that a window sees. Written as Python loops over code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..layers import Conv
from .tiling import Block, Strip
from .tir import Code, Expr, ceil_divide, greatest, least


def each_block(code: Code, blocks: Sequence[Block]) -> Iterator[tuple[Block, Expr]]:
    """For each kind of vectors, a loop over its first channels."""
    for block in blocks:
        with code.loop("channel", block.count, block.start, block.channels) as channel:
            yield block, channel


def each_strip(code: Code, strips: Sequence[Strip]) -> Iterator[tuple[Strip, Expr]]:
    """For each kind of run of columns, a loop over its first columns."""
    for strip in strips:
        with code.loop("column", strip.count, strip.start, strip.size) as column:
            yield strip, column


def each_line(code: Code, layer: Conv, line: Expr) -> Iterator[tuple[Expr, Expr]]:
    """For one row of a convolution's output, a loop over the rows of its kernel that are inside the image.

    Yields:
        The row of the kernel, and the row of the image that it reads.
    """
    first = line * layer.stride - layer.padding
    if layer.padding == 0:
        with code.loop("tap", layer.kernel) as tap:
            yield tap, first + tap * layer.dilation
        return
    if layer.dilation > 1:
        low, high = inside(code, first, layer.height, layer.kernel, layer.dilation)
        with code.loop("tap", high - low, low) as tap:
            yield tap, first + tap * layer.dilation
        return
    # Said in rows and not in taps, as the compiler would see that there are few taps, and unroll: larger and slower.
    start, stop = code.index("start", greatest(0, first)), code.index("stop", least(layer.height, first + layer.kernel))
    with code.loop("tap", stop - start, start - first) as tap:
        yield tap, first + tap


def inside(code: Code, first: Expr, height: int, kernel: int, dilation: int) -> tuple[Expr, Expr]:
    """From which to before which of its places a window is inside an image.

    Args:
        code: To write to.
        first: The row (or column) that the first place reads; negative outside.
        height: Rows (or columns) of the image.
        kernel: Places.
        dilation: Rows (or columns) from one to the next.
    """
    low = code.index("low", greatest(0, ceil_divide(0 - first, dilation)))
    return low, code.index("high", least(kernel, ceil_divide(height - first, dilation)))
