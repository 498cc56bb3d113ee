"""The small graph between Relax and kernels: constants folded, compound operators recognised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

KNOWN = (
    "convolution and pooling (square, same padding on all sides), linear, batch norm, relu, relu6, hardswish, add, "
    "concat of channels, channel shuffle, mean over height and width, flatten"
)


@dataclass(eq=False)
class Node:
    """One value of the graph: an operator on nodes, an input ("input"), or a constant (`value`).

    Operators: "conv", "linear", "affine" (scale and shift of each channel), "relu", "relu6", "hardswish", "sum",
    "concat", "shuffle", "pool", "global_pool", "flatten", "unflatten" ((N, C) to (N, C, 1, 1)); any other name is
    Relax's and has no kernel. Shapes are torch's: (N, C, H, W) or (N, features).
    """

    op: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    value: Array | None = None


def make(name: str, inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node:
    """A node for one Relax operator: folded if all inputs are constant, else recognised."""
    constants = [node.value for node in inputs if node.value is not None]
    if name in FOLD and len(constants) == len(inputs):
        folded = np.asarray(FOLD[name](constants, shape, attrs))
        return Node("constant", (), folded.shape, value=folded)
    if name in RECOGNISE:
        node = RECOGNISE[name](inputs, shape, attrs, numbers)
        if node is not None:
            return node
    if name == "add":
        name = "add of different shapes"
    return Node(name, tuple(inputs), shape, {"axes": attrs.axes} if name == "permute_dims" else {})


def _permuted(a: list[Array], shape: tuple[int, ...], attrs: Any) -> Array:
    return np.transpose(a[0], None if attrs.axes is None else _ints(attrs.axes))


FOLD: dict[str, Callable[[list[Array], tuple[int, ...], Any], Array]] = {
    "add": lambda a, shape, attrs: a[0] + a[1],
    "subtract": lambda a, shape, attrs: a[0] - a[1],
    "multiply": lambda a, shape, attrs: a[0] * a[1],
    "divide": lambda a, shape, attrs: a[0] / a[1],
    "sqrt": lambda a, shape, attrs: np.sqrt(a[0]),
    "rsqrt": lambda a, shape, attrs: 1 / np.sqrt(a[0]),
    "negative": lambda a, shape, attrs: -a[0],
    "reshape": lambda a, shape, attrs: a[0].reshape(shape),
    "expand_dims": lambda a, shape, attrs: a[0].reshape(shape),
    "broadcast_to": lambda a, shape, attrs: np.broadcast_to(a[0], shape),
    "permute_dims": _permuted,
}

Recognise = Callable[[list[Node], tuple[int, ...], Any, list[float]], Node | None]


def _channel_values(node: Node, shape: tuple[int, ...]) -> Array | None:
    """A constant as one number per channel of a tensor of `shape`, or None if it varies otherwise."""
    value = node.value
    if value is None or len(shape) not in (2, 4):
        return None
    full = (1,) * (len(shape) - value.ndim) + value.shape
    if len(full) != len(shape) or any(size != 1 for axis, size in enumerate(full) if axis != 1):
        return None
    return np.broadcast_to(value.reshape(-1).astype(np.float64), (shape[1],))


def affine(data: Node, scale: Array | float, shift: Array | float) -> Node:
    """Scale and shift of each channel; `data` itself where they change nothing."""
    channels = data.shape[1]
    scales = np.broadcast_to(np.asarray(scale, np.float64), (channels,))
    shifts = np.broadcast_to(np.asarray(shift, np.float64), (channels,))
    if data.op == "hardswish times 6" and np.allclose(scales, 1 / 6, rtol=1e-6) and not shifts.any():
        return Node("hardswish", data.inputs, data.shape)
    if np.all(scales == 1) and not shifts.any():
        return data
    return Node("affine", (data,), data.shape, {"scale": scales, "shift": shifts})


def _binary(name: str) -> Recognise:
    def recognise(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
        left, right = inputs
        if left.value is None and right.value is None:
            return _tensors(name, left, right, shape)
        data, constant = (left, right) if left.value is None else (right, left)
        number = _channel_values(constant, data.shape)
        if number is None or data.shape != shape:
            return None
        if name == "add":
            return affine(data, 1, number)
        if name == "multiply":
            return affine(data, number, 0)
        if name == "subtract":
            return affine(data, 1, -number) if data is left else affine(data, -1, number)
        return affine(data, 1 / number, 0) if data is left else None

    return recognise


def _tensors(name: str, left: Node, right: Node, shape: tuple[int, ...]) -> Node | None:
    if name == "add" and left.shape == right.shape == shape:
        return Node("sum", (left, right), shape)
    if name == "multiply":
        for data, factor in ((left, right), (right, left)):
            part = _six_part(data, factor)
            if part is not None:
                return Node("hardswish" if part else "hardswish times 6", (data,), shape)
    return None


def _six_part(data: Node, factor: Node) -> bool | None:
    """Whether `factor` is relu6(data + 3), and divided by six already; None if it is something else."""
    divided = factor.op == "affine" and np.allclose(factor.attrs["scale"], 1 / 6, rtol=1e-6)
    if divided and factor.attrs["shift"].any():
        return None
    clipped = factor.inputs[0] if divided else factor
    if clipped.op != "relu6" or clipped.inputs[0].op != "affine" or clipped.inputs[0].inputs[0] is not data:
        return None
    moved = clipped.inputs[0].attrs
    return divided if np.all(moved["scale"] == 1) and np.all(moved["shift"] == 3) else None


def _clip(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    low, high = numbers
    (data,) = inputs
    if data.op == "relu" and math.isinf(low) and high == 6:
        return Node("relu6", data.inputs, shape)
    if low == 0 and high in (6, math.inf):
        return Node("relu6" if high == 6 else "relu", (data,), shape)
    return None


def _conv(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    data, weight = inputs
    if weight.value is None or len(shape) != 4:
        return None
    kernel = weight.shape[2:]
    strides, padding, dilation = (_ints(getattr(attrs, name)) for name in ("strides", "padding", "dilation"))
    if any(len(set(sizes)) != 1 for sizes in (kernel, strides, padding, dilation)):
        raise ValueError(
            f"The operator 'conv2d' has kernel {kernel}, stride {strides}, padding {padding}, dilation {dilation}; "
            "each must be equal in both directions."
        )
    shared = {"kernel": kernel[0], "stride": strides[0], "padding": padding[0], "dilation": dilation[0]}
    return Node("conv", (data,), shape, {**shared, "groups": int(attrs.groups), "weight": weight.value})


def _pool(kind: str) -> Recognise:
    def recognise(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node:
        (data,) = inputs
        window, strides, padding = (_ints(getattr(attrs, name)) for name in ("pool_size", "strides", "padding"))
        equal = all(len(set(sizes)) == 1 for sizes in (window, strides, padding))
        regular = (data.shape[2] + 2 * padding[0] - window[0]) // strides[0] + 1 == shape[2] and (
            data.shape[3] + 2 * padding[0] - window[0]
        ) // strides[0] + 1 == shape[3]
        if not equal or not regular or set(_ints(attrs.dilation)) != {1}:
            raise ValueError(
                f"The operator '{kind}_pool2d' has kernel {window}, stride {strides}, padding {padding}; each must be "
                "equal in both directions, without dilation, and ceil_mode must be False."
            )
        found = {"kind": kind, "kernel": window[0], "stride": strides[0], "padding": padding[0]}
        return Node("pool", (data,), shape, {**found, "count": bool(attrs.count_include_pad) and padding[0] > 0})

    return recognise


def _adaptive(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node:
    (data,) = inputs
    if shape == data.shape:
        return data
    if shape[2:] == (1, 1):
        return Node("global_pool", (data,), shape)
    window = data.shape[2] // shape[2]
    if data.shape[2:] != (shape[2] * window, shape[3] * window):
        raise ValueError(
            f"The operator 'adaptive_avg_pool2d' turns {data.shape[2:]} into {shape[2:]}; one must divide the other."
        )
    found = {"kind": "avg", "kernel": window, "stride": window, "padding": 0, "count": False}
    return Node("pool", (data,), shape, found)


def _mean(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    (data,) = inputs
    if len(data.shape) != 4 or sorted(axis % 4 for axis in _ints(attrs.axis)) != [2, 3]:
        return None
    pooled = Node("global_pool", (data,), (*data.shape[:2], 1, 1))
    return pooled if len(shape) == 4 else Node("flatten", (pooled,), shape)


def _reshape(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    (data,) = inputs
    if shape == data.shape:
        return data
    if data.op == "permute_dims" and len(shape) == 4 and _ints(data.attrs["axes"]) == (0, 2, 1, 3, 4):
        (parted,) = data.inputs
        if parted.op == "reshape" and parted.inputs[0].shape == shape and parted.shape[3:] == shape[2:]:
            return Node("shuffle", parted.inputs, shape, {"groups": parted.shape[1]})
    if len(data.shape) == 4 and shape == (data.shape[0], math.prod(data.shape[1:])):
        return Node("flatten", (data,), shape)
    if len(data.shape) == 2 and shape == (*data.shape, 1, 1):
        return Node("unflatten", (data,), shape)
    return None


def _matmul(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    data, weight = inputs
    if weight.value is None or len(shape) != 2 or weight.value.ndim != 2:
        return None
    return Node("linear", (data,), shape, {"weight": weight.value.T})


def _concat(inputs: list[Node], shape: tuple[int, ...], attrs: Any, numbers: list[float]) -> Node | None:
    if len(shape) != 4 or int(attrs.axis) % 4 != 1:
        return None
    return inputs[0] if len(inputs) == 1 else Node("concat", tuple(inputs), shape)


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


RECOGNISE: dict[str, Recognise] = {
    **{name: _binary(name) for name in ("add", "subtract", "multiply", "divide")},
    "conv2d": _conv,
    "max_pool2d": _pool("max"),
    "avg_pool2d": _pool("avg"),
    "adaptive_avg_pool2d": _adaptive,
    "clip": _clip,
    "relu": lambda inputs, shape, attrs, numbers: Node("relu", (inputs[0],), shape),
    "relu6": lambda inputs, shape, attrs, numbers: Node("relu6", (inputs[0],), shape),
    "mean": _mean,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "matmul": _matmul,
    "concat": _concat,
}
