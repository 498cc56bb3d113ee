"""Latency of ops on an ARM core without a board: real code, counted under emulation, costed by llvm-mca.

For each kernel of an op: cycles = sum over pieces of code of (how often it ran) x (cycles that llvm-mca gives it), and
latency = max(cycles / frequency, bytes moved / bandwidth), or their sum for a core without `overlap`. The op's latency
is the sum over its kernels. What a Raspberry Pi 4 says to this: `bench/raspi4_rank.py`.

What to trust and what not:
- It leaves out cache and translation misses beyond the memory rule (`memory.py`), mispredicted branches, instruction
  fetch, the runtime between kernels and clock throttling: expect a board to be slower.
- It is the latency of this package's own code. Another runtime on the same core may rank ops otherwise.
- llvm-mca knows throughput and latency of instructions, so inner loops that turn many times are costed well. Code that
  runs a few times in a row is costed as if it went on for ever; where an inner loop is short its turns are laid out one
  after another (`pieces.py`), so that waiting for its last result is seen.
- LLVM's models differ in care. Those of A53 and A57/A72 are old and used much; that of the A55 lets two 128-bit FMLA
  start per cycle, though its two pipes are 64 bits wide, so `wide_per_cycle` of its core bounds it from below.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cost_models.spec import OpSpec
from cost_models.tvm_build import SCHEDULE
from cost_models.tvm_build.program import without_debug

from .blocks import instrument, split
from .cores import Core, core
from .counts import count, emulator
from .mca import Mca
from .memory import bytes_moved
from .pieces import Piece, pieces

if TYPE_CHECKING:
    from cost_models.tvm_build.build import Built

VERSION = "model-1"  # of the way code becomes milliseconds: change it when old and new rows must not mix
WIDE = re.compile(r"f\w+ v\d+\.(?:8h|4s|2d)\b")
UNCOUNTED = re.compile(r"|_*TVM\w*|__tvm_\w*")  # the runtime's functions, and calls through a register, are free


@dataclass(frozen=True)
class KernelCost:
    """One kernel of an op: all its calls in one run."""

    name: str
    cycles: float
    bytes_moved: int
    compute_ms: float
    memory_ms: float
    latency_ms: float


@dataclass
class TvmModel:
    """Models the latency of ops on one ARM core: fp32, batch 1, one thread, kernels of `cost_models.tvm_build`.

    Args:
        threads: 1; shared caches and memory are not modelled.
        core: a name of `cost_models.tvm_model.cores.names()`, or the path of a TOML file with the same fields.

    Raises:
        ValueError: an unknown core, a broken file, or more than one thread.
        RuntimeError: llvm-mca or qemu-aarch64 is missing or too old; says what to install.
        ImportError: TVM is not installed.
    """

    threads: int = 1
    core: str = field(default="cortex-a72", metadata={"help": "the modelled core, or a TOML file that describes one"})
    name: str = field(init=False, default="tvm-model")
    source: str = field(init=False, default="modelled")
    precision: str = field(init=False, default="fp32")
    batch: int = field(init=False, default=1)
    schedule: str = field(init=False, default=f"{SCHEDULE}, {VERSION}")
    deterministic: bool = field(init=False, default=True)  # one answer per op: asking twice tells nothing new
    figures: Core = field(init=False)
    _mca: Mca = field(init=False, repr=False)
    _known: dict[OpSpec, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        from cost_models.tvm_build.build import find_compiler
        from cost_models.tvm_build.targets import import_tvm, target

        if self.threads != 1:
            raise ValueError(f"threads is {self.threads!r}; the runner 'tvm-model' models one thread only.")
        self.figures = core(self.core)
        chosen = target(self.figures.target)
        if chosen.family != "aarch64":
            raise ValueError(f"The target {chosen.name!r} is {chosen.family}; only 64-bit ARM code is modelled.")
        import_tvm()
        find_compiler(chosen)
        emulator()
        self._mca = Mca(self.figures.mca_cpu, self.figures.mca_model)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        again = f"pynas measure --runner tvm-model --core {self.core} --space SPACE"
        return {
            "machine": {"cpu": self.figures.description, "rebuild": again},
            "software": {"apache-tvm": importlib.metadata.version("apache-tvm"), "llvm-mca": self._mca.version},
        }

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        """Latency in ms of one run of the op, the same `repeats` times. The module is in eval mode, BN folded.

        Raises:
            ValueError: the op has no kernel, or its code gives another result than torch.
            RuntimeError: its code does not run, or llvm-mca refuses it.
        """
        if spec not in self._known:
            pixels = () if spec.kind == "linear" else (spec.size, spec.size)
            self._known[spec] = self.net(module, (self.batch, spec.in_channels, *pixels))()
        return [self._known[spec]] * repeats

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """A whole network, modelled in the same way as the rows of a table; each call gives its latency in ms."""
        latency_ms = sum(kernel.latency_ms for kernel in self.kernels(module, input_shape))
        return lambda: latency_ms

    def kernels(self, module: Any, input_shape: tuple[int, ...]) -> list[KernelCost]:
        """What each kernel of a module costs.

        Args:
            module: a torch module in eval mode.
            input_shape: as torch has it, with the batch dimension.

        Raises:
            ValueError: see `time_ms`.
            RuntimeError: see `time_ms`.
        """
        import torch

        from cost_models.tvm_build.build import build
        from cost_models.tvm_build.check import compare, to_channels_first, to_channels_last
        from cost_models.tvm_build.targets import target

        built = build(module, input_shape, target(self.figures.target))
        image = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = module(image).numpy()
        run, answer = executed(built, to_channels_last(image.numpy()))
        compare(to_channels_first(answer), expected, f"{', '.join(built.kernels)} for {built.target.name}")
        return self.costs(built, run)

    def costs(self, built: Built, run: list[Piece]) -> list[KernelCost]:
        """What each kernel of compiled code costs, given what `executed` says."""
        found = self._mca.cycles([piece.code for piece in run])
        cycles = {piece: max(value, self._least_cycles(piece)) for piece, value in zip(run, found, strict=True)}
        return [
            self._cost(name, sum(cycles[piece] * piece.times for piece in run if owner(piece.function) == name), built)
            for name in built.kernels
        ]

    def _least_cycles(self, piece: Piece) -> float:
        limit = self.figures.wide_per_cycle
        return sum(WIDE.match(line) is not None for line in piece.code) / limit if limit else 0.0

    def _cost(self, name: str, cycles: float, built: Built) -> KernelCost:
        moved = sum(_bytes_moved(call, self.figures.l2_kb) for call in built.calls if call.kernel == name)
        compute_ms = cycles / self.figures.frequency_ghz * 1e-6
        memory_ms = moved / self.figures.bandwidth_gb_s * 1e-6
        latency_ms = max(compute_ms, memory_ms) if self.figures.overlap else compute_ms + memory_ms
        return KernelCost(name, cycles, moved, compute_ms, memory_ms, latency_ms)


def executed(built: Built, x: NDArray[np.float32]) -> tuple[list[Piece], NDArray[np.float32]]:
    """Run compiled code once, with counters in it.

    Args:
        built: for a 64-bit ARM core.
        x: input of `built.input_shape`.

    Returns:
        Pieces of code that ran, with how often; and the output, of `built.output_shape`.

    Raises:
        RuntimeError: the program failed, or a kernel calls a function whose code is not known here.
    """
    assembly = without_debug(built.assembly())
    blocks = split(assembly)
    with tempfile.TemporaryDirectory(prefix="pynas-model-") as name:
        folder = Path(name)
        program = built.program(folder, instrument(assembly, blocks))
        (folder / "input.bin").write_bytes(np.ascontiguousarray(x, np.float32).tobytes())
        counts = count(program, len(blocks), ("input.bin", "output.bin", "1"))
        answer = np.frombuffer((folder / "output.bin").read_bytes(), np.float32).reshape(built.output_shape)
    defined = {block.function for block in blocks}
    for block, times in zip(blocks, counts, strict=True):
        for called in block.calls if times else ():
            if called not in defined and not UNCOUNTED.fullmatch(called):
                raise RuntimeError(f"The code of {block.function} calls {called!r}, whose time is not known.")
    run = pieces(blocks, counts)
    strange = {piece.function for piece in run if owner(piece.function) not in built.kernels}
    if strange:
        raise RuntimeError(
            f"Code ran that belongs to no kernel, so its time has no place: {', '.join(sorted(strange))}."
        )
    return run, answer


def owner(function: str) -> str:
    """The kernel that a function of the code belongs to: `__tvm_ffi_conv_0` and `conv_0_compute_` are of conv_0."""
    return re.sub(r"^__tvm_ffi_|_compute_\d*$", "", function)


def _bytes_moved(call: Any, l2_kb: float) -> int:
    from cost_models.tvm_build.build import shapes

    inputs, output = shapes(call.step.layer)
    activations = sum(math.prod(shape) for shape in [*inputs, output])
    return bytes_moved(activations, sum(array.nbytes for array in call.params), l2_kb)
