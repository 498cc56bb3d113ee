"""A network as one static executable without TVM's runtime: for emulators, and for counting instructions."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import write_atomic

if TYPE_CHECKING:
    from .build import Built

ALIGNMENT = 64  # bytes; the kernels may count on it
FLOAT_BYTES = 4

_DEBUG = re.compile(r"\s*\.(loc|file\s+\d|cfi_\w+|fnstart|fnend|cantunwind|save|vsave|setfp|pad)\b")
_SECTION = re.compile(r"\s*\.(section\s+\"?(?P<name>[\w.\-]+)|text|data|bss)")
_LABEL = re.compile(r"(\.L(tmp|func_begin)\d+):")


def without_debug(assembly: str) -> str:
    """Assembly without debug and unwind information, which changes no instruction and is half of the text."""
    kept: list[str] = []
    inside = False
    for line in assembly.splitlines():
        section = _SECTION.match(line)
        if section:
            inside = (section["name"] or "").startswith(".debug")
        if not inside and not _DEBUG.match(line):
            kept.append(line)
    used = {name for line in kept if not _LABEL.match(line) for name in re.findall(r"\.L(?:tmp|func_begin)\d+", line)}
    return "\n".join(line for line in kept if not (found := _LABEL.match(line)) or found[1] in used) + "\n"


def write_program(built: Built, folder: Path, assembly: str | None = None) -> Path:
    """Links a network to a static executable for its target; `program.c` says how it is called.

    Args:
        built: The network.
        folder: For the executable and its sources; must exist.
        assembly: Code in place of `built.assembly()`, for instance with counters; it may define the symbols
            `kernel_counters` and `kernel_counters_end` around bytes that the program then writes to a file.

    Returns:
        The path of the executable, "program" in the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the compiler for the target is not installed, or does not accept the assembly.
    """
    from .build import find_compiler

    compiler = find_compiler(built.target)
    plan = _Plan(built)
    write_atomic(folder / "kernels.s", built.assembly() if assembly is None else assembly)
    write_atomic(folder / "weights.bin", plan.weights())
    write_atomic(folder / "weights.s", _WEIGHTS.format(alignment=ALIGNMENT))
    write_atomic(folder / "network.h", plan.header())
    source = Path(__file__).with_name("program.c")
    sources = [str(source), "kernels.s", "weights.s"]
    command = [compiler, "-O2", "-static", "-I.", "-o", "program", *sources]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "rror" in line] or result.stderr.splitlines() or [""]
        raise ValueError(f"{built.target.compiler} cannot link the kernels in {folder}: {lines[0]}")
    return folder / "program"


_WEIGHTS = """\t.section .rodata
\t.balign {alignment}
\t.globl weights
weights:
\t.incbin "weights.bin"
\t.byte 0
\t.section .note.GNU-stack,"",%progbits
"""


def _aligned(bytes_: int) -> int:
    return -(-bytes_ // ALIGNMENT) * ALIGNMENT


@dataclass
class _Arena:
    """Memory for tensors, handed out again once nobody reads them."""

    size: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # start, bytes

    def take(self, bytes_: int) -> int:
        """The offset of a block: the smallest free one that is large enough, else a new one at the end."""
        bytes_ = _aligned(bytes_)
        fitting = sorted((size, start) for start, size in self.free if size >= bytes_)
        if fitting:
            size, start = fitting[0]
            self.free.remove((start, size))
            if size > bytes_:
                self.free.append((start + bytes_, size - bytes_))
            return start
        start = self.size
        self.size += bytes_
        return start

    def give(self, start: int, bytes_: int) -> None:
        """Takes a block back and joins it with its free neighbours."""
        joined: list[tuple[int, int]] = []
        for place, size in sorted([*self.free, (start, _aligned(bytes_))]):
            if joined and sum(joined[-1]) == place:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((place, size))
        self.free = joined


def _bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * FLOAT_BYTES


class _Plan:
    """Where every tensor lies."""

    def __init__(self, built: Built) -> None:
        from .build import shapes

        self.built = built
        self.shapes = [shapes(call.step.layer) for call in built.calls]
        self.offsets, self.arena_bytes = self._place()
        self.weight_offsets, self.weight_bytes = self._weights()

    def _place(self) -> tuple[dict[int, int], int]:
        """Offsets of all tensors in the arena. Input and output lie alone, so that runs can be repeated."""
        built, arena = self.built, _Arena()
        last = {source: place for place, step in enumerate(built.steps) for source in step.inputs}
        offsets = {0: arena.take(_bytes(built.input_shape))}
        sizes: dict[int, int] = {}
        for place, (step, (_, made)) in enumerate(zip(built.steps, self.shapes, strict=True)):
            sizes[step.output] = _bytes(made)
            offsets[step.output] = arena.take(sizes[step.output])
            for source in {source for source in step.inputs if source and last[source] == place}:
                arena.give(offsets[source], sizes[source])
        return offsets, arena.size

    def _weights(self) -> tuple[list[list[int]], int]:
        offsets: list[list[int]] = []
        end = 0
        for call in self.built.calls:
            offsets.append([])
            for array in call.params:
                offsets[-1].append(end)
                end += _aligned(array.nbytes)
        return offsets, end

    def weights(self) -> bytes:
        """All packed parameters, each aligned."""
        data = bytearray(self.weight_bytes)
        for call, offsets in zip(self.built.calls, self.weight_offsets, strict=True):
            for array, start in zip(call.params, offsets, strict=True):
                data[start : start + array.nbytes] = np.ascontiguousarray(array, np.float32).tobytes()
        return bytes(data)

    def header(self) -> str:
        """The tables of `network.h`."""
        built = self.built
        rows: list[tuple[str, Sequence[int]]] = []
        calls = []
        for place, call in enumerate(built.calls):
            found = list(self._arguments(place))
            calls.append(f'  {{"{call.kernel}", __tvm_ffi_{call.kernel}, {len(rows)}, {len(found)}}},')
            rows += found
        lines = [
            f"static char arena[{self.arena_bytes}] __attribute__((aligned({ALIGNMENT})));",
            "extern char weights[];",
            *(f"Kernel __tvm_ffi_{name};" for name in built.kernels),
            f"#define INPUT_OFFSET {self.offsets[0]}",
            f"#define INPUT_BYTES {_bytes(built.input_shape)}",
            f"#define OUTPUT_OFFSET {self.offsets[built.graph.output]}",
            f"#define OUTPUT_BYTES {_bytes(built.output_shape)}",
            f"static int64_t shapes[][{max(len(shape) for _, shape in rows)}] = {{",
            *(f"  {{{', '.join(map(str, shape))}}}," for _, shape in rows),
            "};",
            "static Tensor tensors[] = {",
            *(
                f"  {{{data}, CPU, {len(shape)}, FLOAT32, shapes[{place}], 0, 0}},"
                for place, (data, shape) in enumerate(rows)
            ),
            "};",
            "static const Call calls[] = {",
            *calls,
            "};",
        ]
        return "\n".join(lines) + "\n"

    def _arguments(self, place: int) -> Iterator[tuple[str, Sequence[int]]]:
        """Address and shape of each argument of a call."""
        call = self.built.calls[place]
        wanted, made = self.shapes[place]
        for source, shape in zip(call.step.inputs, wanted, strict=True):
            yield f"arena + {self.offsets[source]}", shape
        for array, start in zip(call.params, self.weight_offsets[place], strict=True):
            yield f"weights + {start}", array.shape
        yield f"arena + {self.offsets[call.step.output]}", made
