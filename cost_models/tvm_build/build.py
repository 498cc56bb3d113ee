"""Steps to machine code: a kernel for each distinct layer, and a virtual machine's program that calls them in order."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .graph import Graph, Step, read_graph
from .layers import Concat, Conv, GlobalPool, Layer, Linear, Pool, Shuffle, Sum
from .nodes import Array
from .targets import Target, import_tvm


def shapes(layer: Layer) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Shapes of a layer's inputs and of its output, channels last."""
    if isinstance(layer, Linear):
        return [(layer.batch, layer.in_features)], (layer.batch, layer.out_features)
    if isinstance(layer, Sum):
        return [layer.shape] * layer.terms, layer.shape
    image: tuple[int, ...] = (layer.batch, layer.height, layer.width)
    if isinstance(layer, Concat):
        return [(*image, channels) for channels in layer.channels], (*image, sum(layer.channels))
    if isinstance(layer, Conv):
        made: tuple[int, ...] = (layer.batch, layer.out_height, layer.out_width, layer.out_channels)
        return [(*image, layer.in_channels)] + [made] * layer.residual, made
    source = (*image, layer.channels)
    if isinstance(layer, Pool):
        return [source], (layer.batch, layer.out_height, layer.out_width, layer.channels)
    if isinstance(layer, GlobalPool):
        return [source], (layer.batch, 1, 1, layer.channels)
    assert isinstance(layer, Shuffle)
    return [source], source


def channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    """torch's (N, C, H, W) as (N, H, W, C); other shapes as they are."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a kernel in the order of execution.

    Args:
        kernel: Its name, which is that of its function in the code.
        step: Which layer it computes from which tensors.
        params: Packed as the kernel wants them.
    """

    kernel: str
    step: Step
    params: tuple[Array, ...]


@dataclass(eq=False)
class Built:
    """A network compiled for one target.

    Args:
        target: For which CPU.
        graph: What is computed.
        kernels: The distinct layers by the name of their function.
        calls: Kernel calls in order, one for each step of the graph.
        executable: TVM's, whose function "main" takes and gives one channels-last float32 tensor.
    """

    target: Target
    graph: Graph
    kernels: Mapping[str, Layer]
    calls: tuple[Call, ...]
    executable: Any = field(repr=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.graph.steps

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the tensor that "main" takes: (N, H, W, C) or (N, features)."""
        return channels_last(self.graph.input_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the tensor that "main" gives: (N, H, W, C) or (N, features)."""
        return channels_last(self.graph.output_shape)

    @cached_property
    def machine(self) -> Any:
        """TVM's virtual machine with the program loaded. Raises ValueError unless this machine is the target."""
        if not self.target.native:
            raise ValueError(f"Code for {self.target.name} does not run on this machine; use check or a board.")
        tvm = import_tvm()
        return tvm.relax.VirtualMachine(self.executable, tvm.cpu())

    def run(self, x: Array) -> Array:
        """Runs the network on this machine.

        Args:
            x: Float32 of `input_shape`.

        Returns:
            Float32 of `output_shape`.

        Raises:
            ValueError: the target is not this machine, or the shape differs.
        """
        if tuple(x.shape) != self.input_shape:
            raise ValueError(f"The input has shape {tuple(x.shape)}; it must be {self.input_shape} (channels last).")
        tensor = import_tvm().runtime.tensor(np.ascontiguousarray(x, np.float32))
        result: Array = self.machine["main"](tensor).numpy()
        return result.reshape(self.output_shape)

    def library(self, path: str | Path) -> Path:
        """Links everything, weights included, to a shared library that TVM's runtime loads on the target.

        Args:
            path: Ends in ".so"; afterwards it is all old or all new.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: the compiler for the target is not installed, or cannot link.
        """
        from tvm.support import cc

        target = Path(path)
        compiler = find_compiler(self.target)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"Cannot write {target}: there is no folder {target.parent}. Create it first.")
        with tempfile.TemporaryDirectory(prefix=".link-", dir=target.parent) as folder:
            linked = Path(folder) / "linked.so"
            try:
                self.executable.export_library(str(linked), fcompile=cc.cross_compiler(compiler))
            except RuntimeError as error:
                lines = str(error).splitlines()[1:]  # the first only says that there was an error
                reason = next((line for line in lines if "rror" in line), lines[0] if lines else "no reason given")
                raise ValueError(f"{self.target.compiler} cannot link for {self.target.name}: {reason}") from error
            linked.replace(target)
        return target

    @cached_property
    def code(self) -> Any:
        """TVM's module of machine code for all kernels."""
        return next(part for part in self.executable.mod.imports if part.kind == "llvm")

    def assembly(self) -> str:
        """The machine code of all kernels as text for the GNU assembler. The same input gives the same text.

        The function of each kernel is `__tvm_ffi_<name>`; its inner part may be `<name>_compute_`.
        """
        from .program import without_debug

        return without_debug(str(self.code.inspect_source("asm")))

    def program(self, folder: str | Path, assembly: str | None = None) -> Path:
        """A stand-alone executable for the target; see `program.write_program`."""
        from .program import write_program

        return write_program(self, Path(folder), assembly)


PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf",
    "gcc": "gcc",
}


def find_compiler(target: Target) -> str:
    """Path of the C compiler that links for a target. Raises ValueError naming the package to install."""
    found = shutil.which(target.compiler)
    if found is None:
        package = PACKAGES.get(target.compiler, target.compiler)
        raise ValueError(
            f"Linking for {target.name} needs {target.compiler}, which is not installed. "
            f"Install it with: sudo apt-get install {package}"
        )
    return found


def build(module: Any, input_shape: Sequence[int], target: Target, tiles: Mapping[Layer, Any] | None = None) -> Built:
    """Compiles a torch module for a target.

    Args:
        module: In eval mode, batch norm folded or not, one tensor in and one out.
        input_shape: As torch has it: (N, C, H, W) or (N, features).
        target: From `targets.target`.
        tiles: Layers that are not to use their first tile of `kernels.tiles`.

    Raises:
        ValueError: an operator has no kernel, the module is in training mode, or nothing is to be computed.
        ImportError: TVM is not installed.
    """
    return compile_graph(read_graph(module, input_shape), target, tiles)


def compile_graph(graph: Graph, target: Target, tiles: Mapping[Layer, Any] | None = None) -> Built:
    """Compiles a graph for a target; as `build`, from `graph.read_graph` on."""
    tvm = import_tvm()
    from .kernels import kernel

    names: dict[Layer, str] = {}
    made: dict[str, Any] = {}
    calls = []
    for step in graph.steps:
        if step.layer not in names:
            name = f"{type(step.layer).__name__.lower()}_{len(names)}"
            names[step.layer] = name
            made[name] = kernel(step.layer, target, (tiles or {}).get(step.layer))
        name = names[step.layer]
        calls.append(Call(name, step, tuple(made[name].pack(list(step.params)))))
    module = _program(graph, {name: kernel.func for name, kernel in made.items()}, calls)
    with tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(module, target=target.tvm(), relax_pipeline=_lowering())
    return Built(target, graph, {name: layer for layer, name in names.items()}, tuple(calls), executable)


def _program(graph: Graph, functions: Mapping[str, Any], calls: Sequence[Call]) -> Any:
    """The module with all kernels and a Relax function that calls them in order."""
    from tvm import relax

    builder = relax.BlockBuilder()
    kernels = {name: builder.add_func(func.with_attr("global_symbol", name), name) for name, func in functions.items()}
    x = relax.Var("x", relax.TensorType(channels_last(graph.input_shape), "float32"))
    values: dict[int, Any] = {0: x}
    with builder.function("main", [x]):
        with builder.dataflow():
            for call in calls:
                wanted, shape = shapes(call.step.layer)
                inputs = [
                    _viewed(builder, values[source], needed)
                    for source, needed in zip(call.step.inputs, wanted, strict=True)
                ]
                arguments = [*inputs, *(relax.const(array) for array in call.params)]
                made = relax.call_tir(kernels[call.kernel], arguments, relax.TensorType(shape, "float32"))
                values[call.step.output] = builder.emit(made)
            output = builder.emit_output(values[graph.output])
        builder.emit_func_output(output)
    return builder.get()


def _viewed(builder: Any, value: Any, shape: tuple[int, ...]) -> Any:
    from tvm import relax

    found = tuple(int(size) for size in value.ty.shape)
    assert math.prod(found) == math.prod(shape), f"{found} cannot be read as {shape}"
    return value if found == shape else builder.emit(relax.op.reshape(value, shape))


def _lowering() -> Any:
    """TVM's passes from Relax to calls with planned memory, without those that fuse or rewrite kernels."""
    import tvm
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
