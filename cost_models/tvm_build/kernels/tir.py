"""A thin layer over TVM's statements: loops, vectors held in registers, and loads and stores at flat offsets.

Kernels are written as statements and not scheduled: what is unrolled, what lives in a register and in which order the
sums are formed is then visible in the source, and does not change with a scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layers import Activation

try:
    from tvm import tirx
except ImportError as error:
    raise ImportError("TVM is not installed. Install it with: pip install 'pynas[tvm]'") from error

Expr = Any
Stmt = Any
Buffer = Any
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Kernel:
    """The code of one layer.

    Args:
        func: TVM PrimFunc. Its arguments are the inputs in order, the packed parameters, and the output: float32,
            dense, 64-byte aligned, and none of them may overlap another.
        pack: From the layer's parameters as torch has them (a weight of shape (out, in / groups, height, width) or
            (out, in), then the bias) to the packed ones, in the order of the arguments.
    """

    func: Any
    pack: Callable[[Sequence[Array]], list[Array]]


def nothing(parameters: Sequence[Array]) -> list[Array]:
    """The `pack` of a layer without parameters."""
    return []


def buffer(name: str, *shape: int) -> Buffer:
    return tirx.decl_buffer(shape, "float32", name=name)


def integer(value: int) -> Expr:
    return tirx.IntImm("int32", value)


def expression(value: Expr | int) -> Expr:
    return integer(value) if isinstance(value, int) else value


def _type(width: int) -> str:
    return "float32" if width == 1 else f"float32x{width}"


def constant(value: float, width: int) -> Expr:
    return spread(tirx.FloatImm("float32", value), width)


def spread(scalar: Expr, width: int) -> Expr:
    """A vector with one value in all lanes."""
    return scalar if width == 1 else tirx.Broadcast(scalar, width)


def lane(vector: Expr, index: int, width: int) -> Expr:
    """A vector with one lane of another in all lanes: ARM multiplies by a lane without a copy."""
    return tirx.Shuffle([vector], [integer(index)] * width)


def _indices(source: Buffer, at: Expr, width: int) -> list[Expr]:
    leading = [integer(0)] * (len(source.shape) - 1)
    return [*leading, at if width == 1 else tirx.Ramp(at, integer(1), width)]


def load(source: Buffer, at: Expr | int, width: int) -> Expr:
    """`width` neighbouring values at a flat offset, whatever the buffer's shape."""
    return tirx.BufferLoad(source, _indices(source, expression(at), width))


def store(target: Buffer, at: Expr | int, width: int, value: Expr) -> Stmt:
    """The reverse of `load`."""
    return tirx.BufferStore(target, value, _indices(target, expression(at), width))


class Register:
    """One vector that the compiler can keep in a register: small, and never indexed by a variable."""

    def __init__(self, name: str, width: int) -> None:
        self.width = width
        # TVM puts small buffers of the default scope on the stack, but "local" ones on the heap, where they stay.
        self.buffer = buffer(name, width)

    @property
    def value(self) -> Expr:
        return load(self.buffer, 0, self.width)

    def set(self, value: Expr) -> Stmt:
        return store(self.buffer, 0, self.width, value)

    def add(self, value: Expr) -> Stmt:
        return self.set(self.value + value)


class Code:
    """A function that is being written, statement by statement."""

    def __init__(self) -> None:
        self._open: list[list[Stmt]] = [[]]

    def add(self, statement: Stmt) -> None:
        self._open[-1].append(statement)

    @contextmanager
    def loop(self, name: str, extent: Expr | int, start: Expr | int = 0, step: int = 1) -> Iterator[Expr]:
        """What is written inside is done `extent` times, with start, start + step, ...; no loop for a plain once."""
        if isinstance(extent, int) and extent == 1:
            yield start
            return
        variable = tirx.Var(name, "int32")
        value = variable if step == 1 else variable * step
        self._open.append([])
        yield value if isinstance(start, int) and start == 0 else value + start
        body = self._open.pop()
        if body:
            self.add(tirx.For(variable, integer(0), expression(extent), tirx.ForKind.SERIAL, _sequence(body)))

    def let(self, name: str, value: Expr, width: int = 1) -> Expr:
        """A name for a vector of floats, so that it is computed once."""
        variable = tirx.Var(name, _type(width))
        self.add(tirx.Bind(variable, value))
        return variable

    def index(self, name: str, value: Expr | int) -> Expr:
        """A name for an integer, so that it is computed once."""
        variable = tirx.Var(name, "int32")
        self.add(tirx.Bind(variable, expression(value)))
        return variable

    def view(self, name: str, source: Buffer, at: Expr | int) -> Buffer:
        """A buffer from an offset of another one on, so that what is added to the offset costs no instruction."""
        found = tirx.decl_buffer((1,), "float32", name=name)
        # Bound by itself: TVM does not see common parts of expressions inside a declaration, and places them after it.
        start = self.index(f"{name}_start", at)
        self.add(tirx.DeclBuffer(found, data=tirx.address_of(load(source, start, 1))))
        return found

    def registers(self, name: str, rows: int, widths: Sequence[int]) -> list[list[Register]]:
        """New registers: for each row one vector of each width."""
        found = [[Register(f"{name}{row}_{at}", width) for at, width in enumerate(widths)] for row in range(rows)]
        for register in (register for row in found for register in row):
            self.add(tirx.AllocBuffer(register.buffer))
        return found

    def function(self, arguments: Sequence[Buffer]) -> Any:
        """What was written, as a PrimFunc whose arguments do not overlap."""
        return tirx.PrimFunc(list(arguments), _sequence(self._open[0])).with_attr({"tirx.noalias": True})


def _sequence(statements: Sequence[Stmt]) -> Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def least(first: Expr | int, second: Expr | int) -> Expr:
    return tirx.min(expression(first), expression(second))


def greatest(first: Expr | int, second: Expr | int) -> Expr:
    return tirx.max(expression(first), expression(second))


def ceil_divide(value: Expr, by: int) -> Expr:
    return value if by == 1 else tirx.floordiv(value + (by - 1), integer(by))


def reciprocal(count: Expr | int) -> Expr:
    """One by an integer, as a float."""
    if isinstance(count, int):
        return constant(1.0 / count, 1)
    return constant(1.0, 1) / tirx.Cast("float32", count)


def larger(first: Expr, second: Expr) -> Expr:
    """The larger of two vectors; the second where one of them is not a number."""
    return tirx.max(first, second)


def smaller(first: Expr, second: Expr) -> Expr:
    """The smaller of two vectors; the second where one of them is not a number."""
    return tirx.min(first, second)


def activate(value: Expr, width: int, activation: Activation) -> Expr:
    """The activation of a vector; what is not a number stays so."""
    if activation == "relu":
        return larger(constant(0.0, width), value)
    if activation == "relu6":
        return smaller(constant(6.0, width), larger(constant(0.0, width), value))
    if activation == "hardswish":
        gate = smaller(constant(6.0, width), larger(constant(0.0, width), value + constant(3.0, width)))
        return value * gate * constant(1.0 / 6.0, width)
    return value
