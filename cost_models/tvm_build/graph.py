"""A network as steps on channels-last tensors: everything that a kernel can do on the way is absorbed into it.

Into a convolution or linear layer go the batch norm (any scale and shift per channel), the bias and the activation
that follow, and the sum with another tensor; a channel shuffle becomes the order in which the next convolution reads.
A value is absorbed only where nothing else reads it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from .imported import import_module
from .layers import Activation, Concat, Conv, GlobalPool, Layer, Linear, Pool, Shuffle, Sum
from .nodes import KNOWN, Array, Node


@dataclass(frozen=True, eq=False)
class Step:
    """One kernel call.

    Args:
        layer: What it computes.
        inputs: Ids of tensors, in the order of the layer's (a convolution's residual second).
        params: Weight as torch has it, (O, I / groups, K, K) or (O, I), and bias (O,); empty for other layers.
        output: Id of the tensor it makes; the network's input is 0.
    """

    layer: Layer
    inputs: tuple[int, ...]
    params: tuple[Array, ...]
    output: int


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a list of steps.

    Args:
        steps: In the order of execution.
        input_shape: As torch has it: (N, C, H, W) or (N, features).
        output_shape: Likewise.
        output: Id of the tensor that is the answer.
    """

    steps: tuple[Step, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output: int


def read_graph(module: Any, input_shape: Sequence[int]) -> Graph:
    """Reads a torch module through torch.export and TVM's Relax.

    Args:
        module: In eval mode, batch norm folded or not, one tensor in and one out.
        input_shape: (N, C, H, W) for images, (N, features) for a linear layer.

    Raises:
        ValueError: an operator that has no kernel (named), or nothing to compute at all.
        ImportError: TVM is not installed.
    """
    output = import_module(module, input_shape)
    order = _in_order(output)
    readers = Counter(id(part) for node in order for part in node.inputs)
    readers[id(output)] += 1
    walk = _Walk(readers)
    for place, node in enumerate(order):
        walk.visit(node, place)
    last = walk.plain(walk.values[id(output)])
    steps = tuple(_steps(last))
    if not steps:
        raise ValueError("This network gives back its input: that costs nothing and needs no code.")
    return Graph(steps, tuple(input_shape), output.shape, steps[-1].output)


def _in_order(output: Node) -> list[Node]:
    """All nodes that the output needs, inputs first."""
    order: list[Node] = []
    done: set[int] = set()
    stack = [(output, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            stack.append((node, True))
            stack.extend((part, False) for part in reversed(node.inputs) if part.value is None)
    return order


@dataclass(eq=False)
class Work:
    """A kernel call that still absorbs what follows. `place` is the last node in it."""

    kind: str
    inputs: list[Work]
    shape: tuple[int, ...]  # torch's
    place: int
    attrs: dict[str, Any] = field(default_factory=dict)
    weight: Array | None = None
    bias: Array | None = None
    activation: Activation = "none"
    shuffle: int = 1  # of a convolution's input


@dataclass(frozen=True, eq=False)
class Value:
    """A node's value: that of `work`, after a channel shuffle (1: none) that no kernel has done yet.

    `shared` says that another node than this one stands for the same work, and is read too.
    """

    work: Work
    shuffle: int = 1
    shared: bool = False


class _Walk:
    """Turns nodes into work, one after the other."""

    def __init__(self, readers: Counter[int]) -> None:
        self.readers = readers
        self.values: dict[int, Value] = {}
        self.place = 0

    def visit(self, node: Node, place: int) -> None:
        self.place = place
        if node.op not in VISIT:
            raise ValueError(f"The operator {node.op!r} has no kernel. Supported: {KNOWN}.")
        self.values[id(node)] = VISIT[node.op](self, node)

    def free(self, node: Node) -> Work | None:
        """The work behind a node, if only its one reader would notice a change, and it has no activation yet."""
        value = self.values[id(node)]
        alone = self.readers[id(node)] == 1 and not value.shared
        return value.work if alone and value.work.activation == "none" else None

    def plain(self, value: Value) -> Work:
        """The value in memory as torch has it: a shuffle that is still due becomes a copy, a flatten must be a view."""
        work = value.work
        if value.shuffle > 1:
            return Work("shuffle", [work], work.shape, self.place, {"groups": value.shuffle})
        if work.kind == "flatten":
            raise ValueError("The operator 'flatten' of an image of more than one pixel must be followed by a linear.")
        return work

    def view(self, node: Node, work: Work, shuffle: int = 1) -> Value:
        """Another way to look at the value of `node`, which is that of `work`."""
        return Value(work, shuffle, self.values[id(node)].shared or self.readers[id(node)] > 1)

    def new(self, kind: str, node: Node) -> Work:
        inputs = [self.plain(self.values[id(part)]) for part in node.inputs]
        return Work(kind, inputs, node.shape, self.place, node.attrs)


def _input(walk: _Walk, node: Node) -> Value:
    return Value(Work("input", [], node.shape, walk.place))


def _conv(walk: _Walk, node: Node) -> Value:
    value = walk.values[id(node.inputs[0])]
    attrs = {name: number for name, number in node.attrs.items() if name != "weight"}
    weight = node.attrs["weight"]
    work = Work("conv", [value.work], node.shape, walk.place, attrs, weight, np.zeros(node.shape[1]))
    if value.shuffle == 1:
        return Value(work)
    channels = node.inputs[0].shape[1]
    if attrs["groups"] == channels == node.shape[1] > 1:  # each channel by itself: shuffled later as well as now
        unshuffled = np.empty_like(weight)
        unshuffled[_shuffled(channels, value.shuffle)] = weight
        work.weight = unshuffled
        return Value(work, value.shuffle)
    work.shuffle = value.shuffle
    return Value(work)


def _linear(walk: _Walk, node: Node) -> Value:
    value = walk.values[id(node.inputs[0])]
    weight = node.attrs["weight"]
    work = value.work
    if work.kind == "flatten":
        image = work.inputs[0]
        weight = weight.reshape(-1, *image.shape[1:]).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        work = image
    return Value(Work("linear", [work], node.shape, walk.place, {}, weight, np.zeros(node.shape[1])))


def _shuffled(channels: int, groups: int) -> Array:
    """Which channel torch.nn.ChannelShuffle(groups) puts at each place."""
    return np.arange(channels).reshape(groups, -1).T.reshape(-1)


def _affine(walk: _Walk, node: Node) -> Value:
    (source,) = node.inputs
    value, work = walk.values[id(source)], walk.free(source)
    scale, shift = node.attrs["scale"], node.attrs["shift"]
    if work is None or work.weight is None or work.bias is None or len(work.inputs) > 1:
        channels = node.shape[1]
        if len(node.shape) != 4:
            raise ValueError("The operator 'batch norm' must follow a convolution, a linear layer or an image.")
        weight = scale.reshape(-1, 1, 1, 1)
        shape = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": channels}
        return Value(Work("conv", [walk.plain(value)], node.shape, walk.place, shape, weight, shift))
    if value.shuffle > 1:
        order = np.argsort(_shuffled(node.shape[1], value.shuffle))
        scale, shift = scale[order], shift[order]
    work.weight = work.weight * scale.reshape(-1, *[1] * (work.weight.ndim - 1))
    work.bias = work.bias * scale + shift
    work.place = walk.place
    return value


def _activation(walk: _Walk, node: Node) -> Value:
    (source,) = node.inputs
    work = walk.free(source)
    if work is not None and work.kind in ("conv", "linear", "sum"):
        work.activation = cast(Activation, node.op)
        work.place = walk.place
        return walk.values[id(source)]
    if walk.values[id(source)].work.kind == "flatten":
        raise ValueError(f"The operator {node.op!r} must not stand between flatten and linear; put it before flatten.")
    added = walk.new("sum", node)
    added.activation = cast(Activation, node.op)
    return Value(added)


def _sum(walk: _Walk, node: Node) -> Value:
    terms = list(node.inputs)
    for kind in ("conv", "sum"):
        for term in sorted(terms, key=lambda part: -walk.values[id(part)].work.place):
            work = walk.free(term)
            value = walk.values[id(term)]
            if work is None or work.kind != kind or value.shuffle > 1 or (kind == "conv" and len(work.inputs) > 1):
                continue
            others = [part for part in terms if part is not term]
            work.inputs.extend(walk.plain(walk.values[id(part)]) for part in others)
            work.place = walk.place
            return value
    return Value(walk.new("sum", node))


def _shuffle(walk: _Walk, node: Node) -> Value:
    (source,) = node.inputs
    return walk.view(source, walk.plain(walk.values[id(source)]), node.attrs["groups"])


def _flatten(walk: _Walk, node: Node) -> Value:
    (source,) = node.inputs
    work = walk.plain(walk.values[id(source)])
    if math.prod(source.shape[2:]) == 1:
        return walk.view(source, work)
    return Value(Work("flatten", [work], node.shape, walk.place))


def _unflatten(walk: _Walk, node: Node) -> Value:
    (source,) = node.inputs
    return walk.view(source, walk.plain(walk.values[id(source)]))


def _other(kind: str) -> Callable[[_Walk, Node], Value]:
    return lambda walk, node: Value(walk.new(kind, node))


VISIT: dict[str, Callable[[_Walk, Node], Value]] = {
    "input": _input,
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "relu": _activation,
    "relu6": _activation,
    "hardswish": _activation,
    "sum": _sum,
    "shuffle": _shuffle,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "concat": _other("concat"),
    "pool": _other("pool"),
    "global_pool": _other("global_pool"),
}


def _steps(output: Work) -> Iterator[Step]:
    """All work that the output needs, in the order of the network."""
    found: dict[int, Work] = {}
    stack = [output]
    while stack:
        work = stack.pop()
        if id(work) not in found:
            found[id(work)] = work
            stack.extend(work.inputs)
    # An unshuffling copy has the place of its reader, and must come before it.
    ordered = sorted(found.values(), key=lambda work: (work.place, work.kind != "shuffle"))
    ids = {id(work): 0 for work in ordered if work.kind == "input"}
    for work in ordered:
        if work.kind != "input":
            ids[id(work)] = len(ids)
            params = () if work.weight is None else (work.weight, work.bias)
            arrays = tuple(np.ascontiguousarray(array, np.float32) for array in params)
            yield Step(_layer(work), tuple(ids[id(part)] for part in work.inputs), arrays, ids[id(work)])


def _layer(work: Work) -> Layer:
    attrs = work.attrs
    source = work.inputs[0].shape
    batch, channels = source[:2]
    if work.kind == "linear":
        return Linear(batch, math.prod(source[1:]), work.shape[1], work.activation)
    if work.kind == "sum":
        channels_last = (work.shape[0], *work.shape[2:], work.shape[1])
        return Sum(channels_last, len(work.inputs), work.activation)
    height, width = source[2:] if len(source) == 4 else (1, 1)
    if work.kind == "conv":
        return Conv(
            batch,
            height,
            width,
            channels,
            work.shape[1],
            **attrs,
            activation=work.activation,
            residual=len(work.inputs) > 1,
            shuffle=work.shuffle,
        )
    if work.kind == "pool":
        shape = (attrs["kind"], attrs["kernel"], attrs["stride"], attrs["padding"])
        return Pool(batch, height, width, channels, *shape, count_padding=attrs["count"])
    if work.kind == "global_pool":
        return GlobalPool(batch, height, width, channels)
    if work.kind == "concat":
        return Concat(batch, height, width, tuple(part.shape[1] for part in work.inputs))
    return Shuffle(batch, height, width, channels, attrs["groups"])
