"""Pooling over windows and over the whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layers import GlobalPool, Pool
from .loops import each_block, inside
from .tiling import Block, Tile, blocks
from .tir import (
    Buffer,
    Code,
    Expr,
    Kernel,
    Register,
    buffer,
    constant,
    larger,
    load,
    nothing,
    reciprocal,
    spread,
    store,
)

if TYPE_CHECKING:
    from ..targets import Target


def tiles(layer: Pool | GlobalPool, target: Target) -> list[Tile]:
    """The sensible tiles for a layer, the best guess first."""
    return [Tile(1, vectors, target.lanes) for vectors in (4, 2, 1, 8) if 2 * vectors <= target.registers]


def kernel(layer: Pool | GlobalPool, target: Target, tile: Tile) -> Kernel:
    """The code of a pooling layer."""
    function = _over_image(layer, tile) if isinstance(layer, GlobalPool) else _Windows(layer, tile).function
    return Kernel(function, nothing)


def _start(code: Code, name: str, widths: tuple[int, ...], value: float) -> list[Register]:
    (found,) = code.registers(name, 1, widths)
    for register in found:
        code.add(register.set(constant(value, register.width)))
    return found


def _add(code: Code, sums: list[Register], source: Buffer, at: Expr) -> None:
    for register in sums:
        code.add(register.add(load(source, at, register.width)))
        at = at + register.width


def _over_image(layer: GlobalPool, tile: Tile) -> Any:
    """Sums along each row first, so that the error does not grow with the whole image."""
    source = buffer("x", layer.batch, layer.height, layer.width, layer.channels)
    output = buffer("y", layer.batch, 1, 1, layer.channels)
    code = Code()
    with code.loop("image", layer.batch) as image:
        for block, channel in each_block(code, blocks(layer.channels, tile.lanes, tile.vectors)):
            totals = _start(code, "total", block.widths, 0.0)
            with code.loop("line", layer.height) as line:
                parts = _start(code, "part", block.widths, 0.0)
                with code.loop("column", layer.width) as column:
                    pixel = (image * layer.height + line) * layer.width + column
                    _add(code, parts, source, pixel * layer.channels + channel)
                for total, part in zip(totals, parts, strict=True):
                    code.add(total.add(part.value))
            at = image * layer.channels + channel
            for total in totals:
                mean = total.value * constant(1.0 / (layer.height * layer.width), total.width)
                code.add(store(output, at, total.width, mean))
                at = at + total.width
    return code.function([source, output])


class _Windows:
    def __init__(self, layer: Pool, tile: Tile) -> None:
        self.layer, self.code = layer, Code()
        self.input = buffer("x", layer.batch, layer.height, layer.width, layer.channels)
        self.output = buffer("y", layer.batch, layer.out_height, layer.out_width, layer.channels)
        found = blocks(layer.channels, tile.lanes, tile.vectors)
        with (
            self.code.loop("image", layer.batch) as image,
            self.code.loop("line", layer.out_height) as line,
            self.code.loop("column", layer.out_width) as column,
        ):
            self._window(image, line, column, found)
        self.function = self.code.function([self.input, self.output])

    def _window(self, image: Expr, line: Expr, column: Expr, found: list[Block]) -> None:
        code, layer = self.code, self.layer
        top, left = line * layer.stride - layer.padding, column * layer.stride - layer.padding
        low, high = inside(code, top, layer.height, layer.kernel, 1)
        first, last = inside(code, left, layer.width, layer.kernel, 1)
        scale: Expr = None
        if layer.kind == "avg":
            whole = layer.count_padding or layer.padding == 0
            area = layer.kernel**2 if whole else (high - low) * (last - first)
            scale = code.let("scale", reciprocal(area))
        for block, channel in each_block(code, found):
            values = _start(code, "value", block.widths, float("-inf") if layer.kind == "max" else 0.0)
            with code.loop("tap", high - low, low) as tap, code.loop("side", last - first, first) as side:
                pixel = (image * layer.height + top + tap) * layer.width + left + side
                self._take(values, pixel * layer.channels + channel)
            pixel = (image * layer.out_height + line) * layer.out_width + column
            self._store(values, pixel * layer.channels + channel, scale)

    def _take(self, values: list[Register], at: Expr) -> None:
        if self.layer.kind == "avg":
            _add(self.code, values, self.input, at)
            return
        for register in values:
            self.code.add(register.set(larger(register.value, load(self.input, at, register.width))))
            at = at + register.width

    def _store(self, values: list[Register], at: Expr, scale: Expr) -> None:
        for register in values:
            value = register.value if scale is None else register.value * spread(scale, register.width)
            self.code.add(store(self.output, at, register.width, value))
            at = at + register.width
