"""torch module to Relax, and Relax to nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .nodes import KNOWN, Node, make
from .targets import import_tvm

# Imported as they are, in milliseconds; others, first decomposed by torch, take a fifth of a second. Batch norm is not
# among them: TVM 0.27 reads its momentum as epsilon unless torch has decomposed it.
DIRECT = {
    "adaptive_avg_pool2d.default",
    "add.Tensor",
    "add_.Tensor",
    "avg_pool2d.default",
    "cat.default",
    "contiguous.default",
    "conv2d.default",
    "flatten.using_ints",
    "hardswish.default",
    "hardswish_.default",
    "hardtanh.default",
    "hardtanh_.default",
    "linear.default",
    "max_pool2d.default",
    "mean.dim",
    "permute.default",
    "relu.default",
    "relu6.default",
    "relu_.default",
    "reshape.default",
    "transpose.int",
    "unflatten.int",
    "view.default",
}

NEW = {"add.Tensor", "conv2d.default", "linear.default"}  # of these, the result is never a view of another tensor


def import_module(module: Any, input_shape: Sequence[int]) -> Node:
    """The graph of a torch module in eval mode, from its output backwards.

    Args:
        module: `torch.nn.Module` in eval mode with one tensor in and one out; batch norm folded or not.
        input_shape: Of its input, (N, C, H, W) or (N, features).

    Raises:
        ValueError: the module is in training mode, fails on such an input, or holds what TVM cannot import.
        ImportError: TVM is not installed.
    """
    tvm = import_tvm()
    program = _export(module, tuple(input_shape))
    function = _to_relax(program)["main"]
    relax = tvm.relax
    if len(function.params) != 1 or not isinstance(function.ret_ty, relax.TensorType):
        raise ValueError("The module must take one tensor and give one tensor.")
    return _Reader(relax, function).output


def _export(module: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if any(part.training for part in module.modules()):
        raise ValueError("The module to be built is in training mode, or a part of it; call .eval() first.")
    try:
        with torch.no_grad():
            return torch.export.export(module, (torch.zeros(shape),))
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"torch.export fails on an input of shape {shape}: {_first_line(error)}") from error


def _to_relax(program: Any) -> Any:
    import torch
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    if not all(_direct(node) for node in program.graph.nodes if node.op == "call_function"):
        program = program.run_decompositions(torch.export.default_decompositions())
    try:
        imported = from_exported_program(program, unwrap_unit_return_tuple=True, run_ep_decomposition=False)
    except Exception as error:  # TVM raises AssertionError, ValueError and its own
        raise ValueError(f"TVM cannot import the network: {_first_line(error)} Supported: {KNOWN}.") from error
    return relax.transform.DecomposeOpsForInference()(imported)


def _operator(node: Any) -> str:
    return str(node.target).removeprefix("aten.")


def _direct(node: Any) -> bool:
    """Whether TVM reads a call of an exported program as it is: in place, only on what nothing else sees."""
    name = _operator(node)
    if name not in DIRECT:
        return False
    if not name.split(".")[0].endswith("_"):
        return True
    source = node.args[0]
    return len(source.users) == 1 and source.op == "call_function" and _operator(source) in NEW


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0].rstrip(".") if text else type(error).__name__) + "."


class _Reader:
    """Reads a Relax function whose body is a chain of bindings."""

    def __init__(self, relax: Any, function: Any) -> None:
        self.relax = relax
        self.constant = type(relax.const(0.0))  # has no public name
        (parameter,) = function.params
        self.values: dict[Any, Node | tuple[Node, ...]] = {parameter: Node("input", (), _shape(parameter))}
        for block in function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._read(binding.value)
        output = self._read(function.body.body)
        if not isinstance(output, Node):
            raise ValueError("The module must give one tensor.")
        self.output = output

    def _read(self, expression: Any) -> Node | tuple[Node, ...]:
        relax = self.relax
        if isinstance(expression, relax.Var):
            return self.values[expression]
        if isinstance(expression, self.constant):
            value = expression.value.numpy()
            return Node("constant", (), value.shape, value=value)
        if isinstance(expression, relax.Tuple):
            return tuple(self._node(part) for part in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            parts = self._read(expression.tuple_value)
            assert isinstance(parts, tuple)
            return parts[int(expression.index)]
        return self._call(expression)

    def _node(self, expression: Any) -> Node:
        node = self._read(expression)
        assert isinstance(node, Node)
        return node

    def _call(self, call: Any) -> Node | tuple[Node, ...]:
        from tvm import tirx

        name = str(call.op.name).removeprefix("relax.").removeprefix("nn.")
        inputs: list[Node] = []
        numbers: list[float] = []
        for argument in call.args:
            if isinstance(argument, (tirx.IntImm, tirx.FloatImm)):
                numbers.append(float(argument.value))
            elif not isinstance(argument, self.relax.ShapeExpr):
                read = self._read(argument)
                inputs.extend(read if isinstance(read, tuple) else (read,))
        if name == "dropout":
            return (inputs[0], inputs[0])
        return make(name, inputs, _shape(call), call.attrs, numbers)


def _shape(expression: Any) -> tuple[int, ...]:
    shape = getattr(expression.ty, "shape", None)
    if shape is None:
        return ()
    return tuple(int(size) for size in shape)
