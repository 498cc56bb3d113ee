"""The inner loop of every matrix product: sums in registers, one row of weights after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..layers import Activation
from .tiling import Block
from .tir import Array, Buffer, Code, Expr, Register, activate, lane, load, spread, store

_UNROLLED = 4


def begin(code: Code, rows: int, widths: Sequence[int], bias: Buffer, channel: Expr) -> list[list[Register]]:
    """Rows of sums that start with the bias of their channels."""
    sums = code.registers("sum", rows, widths)
    for column, width in enumerate(widths):
        value = code.let("bias", load(bias, channel, width), width)
        for row in sums:
            code.add(row[column].set(value))
        channel = channel + width
    return sums


def multiply(
    code: Code,
    sums: Sequence[tuple[Sequence[Register], Expr]],
    source: Buffer,
    weights: Buffer,
    at: Expr,
    depth: int,
    held: int,
) -> None:
    """Adds to each row of sums a vector times a matrix.

    Args:
        code: To write to.
        sums: Rows of registers, and where the vector of each of them, `depth` values, starts in `source`.
        source: Of the vectors.
        weights: From `at` on: `depth` rows of as many values as a row of sums.
        at: Offset into the weights.
        depth: Products in each sum.
        held: How many values of a vector are loaded at once.
    """
    whole = depth - depth % held
    if depth <= _UNROLLED:
        for first in range(depth):
            _products(code, sums, source, weights, at, first, 1)
        return
    with code.loop("k", whole // held, step=held) as first:
        _products(code, sums, source, weights, at, first, held)
    for last in range(whole, depth):
        _products(code, sums, source, weights, at, last, 1)


def _products(
    code: Code,
    sums: Sequence[tuple[Sequence[Register], Expr]],
    source: Buffer,
    weights: Buffer,
    at: Expr,
    first: Expr,
    held: int,
) -> None:
    """`held` products for every sum."""
    widths = [register.width for register in sums[0][0]]
    vectors = [code.let("x", load(source, start + first, held), held) for _, start in sums] if held > 1 else []
    for index in range(held):
        offset = at + (first + index) * sum(widths)
        factors = []
        for width in widths:
            factors.append(code.let("w", load(weights, offset, width), width))
            offset = offset + width
        for row, (registers, start) in enumerate(sums):
            scalar = None if vectors else load(source, start + first, 1)
            for register, factor in zip(registers, factors, strict=True):
                width = register.width
                value = lane(vectors[row], index, width) if scalar is None else spread(scalar, width)
                code.add(register.add(value * factor))


def finish(
    code: Code,
    sums: Sequence[tuple[Sequence[Register], Expr]],
    output: Buffer,
    residual: Buffer | None,
    activation: Activation,
) -> None:
    """Stores each row of sums at its offset, after the residual (from the same offset) and the activation."""
    for row, start in sums:
        at = start
        for register in row:
            width = register.width
            value = register.value if residual is None else register.value + load(residual, at, width)
            code.add(store(output, at, width, activate(value, width, activation)))
            at = at + width


def pack(matrix: Array, found: Sequence[Block]) -> list[Array]:
    """A (depth, channels) matrix as pieces that `multiply` reads from first to last, one for each group of vectors."""
    pieces = []
    for block in found:
        for index in range(block.count):
            first = block.start + index * block.channels
            pieces.append(np.ascontiguousarray(matrix[:, first : first + block.channels]).reshape(-1))
    return pieces
