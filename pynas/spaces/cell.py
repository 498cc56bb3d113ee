"""The space of DARTS (arXiv 1806.09055) and SNAS (arXiv 1812.09926): two cells, of which a network is stacked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cost_models.names import unknown
from cost_models.spec import OpSpec
from pynas.choices import Choice, Node, Slot
from pynas.ops.cell import NONE, OPTIONS, Zero
from pynas.ops.layers import build as build_op
from pynas.registry import FAMILIES, SPACES
from pynas.spaces.cell_net import AuxiliaryHead, Cell, CellNet

NAMES = tuple(OPTIONS.names())
TYPES = ("normal", "reduce")
Stem = Literal["cifar", "imagenet"]
FEWEST_CELLS = 3  # one of each type, and reductions in two places
Edge = tuple[int, int]


@dataclass(frozen=True)
class Maps:
    """What the stem or a cell gives out.

    Args:
        channels: Of a node.
        nodes: That the supernet has there.
        kept: Those that are there, from 0.
        size: Height and width.
    """

    channels: int
    nodes: int
    kept: tuple[int, ...]
    size: int

    @property
    def width(self) -> int:
        """Channels in all; a cell without nodes gives one, of zeros."""
        return len(self.kept) * self.channels or 1

    def smaller(self) -> list[int]:
        """Widths that it may come down to."""
        return [1, *(count * self.channels for count in range(1, self.nodes))]

    def indices(self) -> Tensor:
        """Which of the supernet's channels these are."""
        kept = [node * self.channels + channel for node in self.kept for channel in range(self.channels)]
        return torch.tensor(kept or [0])


@dataclass(frozen=True)
class Part:
    """A cell as it is laid out.

    Args:
        place: In the network.
        channels: Of its nodes.
        size: Height and width that come in.
        reduction: Whether it halves them.
        edges: Those that are there and bring something.
        sources: What its two inputs read; None where no edge starts from the input.
    """

    place: int
    channels: int
    size: int
    reduction: bool
    edges: tuple[Edge, ...]
    sources: tuple[Maps | None, Maps | None]

    def nodes(self) -> tuple[int, ...]:
        """Nodes that something reaches, in order."""
        return tuple(sorted({node for _, node in self.edges}))

    def before(self, affine: bool) -> tuple[OpSpec | None, OpSpec | None]:
        """What its inputs pass through: a 1x1 convolution, strided in two halves where the input is twice as large."""
        first, second = (
            None
            if source is None
            else OpSpec("relu_conv", source.width, self.channels, source.size, affine=int(affine))
            if source.size == self.size
            else OpSpec("reduce", source.width, self.channels, source.size, stride=2, affine=int(affine))
            for source in self.sources
        )
        return first, second


def reached(edges: set[Edge], nodes: int) -> tuple[Edge, ...]:
    """Those edges of a cell that start from an input or from a node that something reaches."""
    there = {0, 1}
    for node in range(2, nodes + 2):
        if any((source, node) in edges for source in there):
            there.add(node)
    return tuple(sorted((edge for edge in edges if edge[0] in there), key=lambda edge: edge[::-1]))


@dataclass(frozen=True)
class CellSpace:
    """Networks stacked of two cells, each a graph whose every edge chooses one of eight operations.

    A cell has two inputs, the outputs of the two cells before it, and `nodes` nodes; every node has an edge from both
    inputs and from all nodes before it and adds up what they bring; the output is the concatenation of the nodes. Cells
    at one and two thirds of the depth reduce: there edges from the inputs have stride 2 and channels double. All cells
    of a type share their choices. Sizes of nets and order of operations are those of DARTS's and SNAS's released code.

    An edge that chooses `none` is not there. A node without edges vanishes, with every edge that starts from it: what
    would read it is sliced, an input from which no edge starts is not prepared, and a cell that nobody reads is left
    out. Then the network costs less than the sum of its choices, which is what budgets and expected costs go by. A cell
    without nodes gives a channel of zeros.

    Args:
        name: Under which it is registered.
        input_size: Height and width of the image, in pixels.
        classes: Of the classifier.
        cells: At least 3. 8 in searches, 20 in the published networks for CIFAR, 14 in those for ImageNet.
        channels: Of the nodes of the first cells. 16 in searches, 36 for CIFAR, 48 for ImageNet.
        nodes: Of a cell.
        stem: "cifar": a 3x3 convolution to three times the channels. "imagenet": three strided ones.
        affine: Whether batch norms of cells have scale and shift; not in searches.
        pool_norm: Whether a batch norm follows pools; not in DARTS's final networks.
        auxiliary: Whether a second classifier for training sits behind the second reduction (`Recipe.auxiliary`).

    Raises:
        ValueError: If a value is not positive, or the image is too small.
    """

    name: str = "cell"
    input_size: int = 32
    classes: int = 10
    cells: int = 8
    channels: int = 16
    nodes: int = 4
    stem: Stem = "cifar"
    affine: bool = False
    pool_norm: bool = True
    auxiliary: bool = False

    def __post_init__(self) -> None:
        least = {"cells": FEWEST_CELLS, "channels": 2}
        for field in ("input_size", "classes", "cells", "channels", "nodes"):
            value, lowest = getattr(self, field), least.get(field, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f"{field} of space {self.name!r} must be a positive whole number, {lowest} or more, not {value!r}."
                )
        if self.channels % 2:
            raise ValueError(f"channels of space {self.name!r} must be even, not {self.channels}.")
        if self.stem not in get_args(Stem):
            raise unknown(f"stem of space {self.name!r}", self.stem, get_args(Stem))
        for field in ("affine", "pool_norm", "auxiliary"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} of space {self.name!r} must be true or false, not {getattr(self, field)!r}.")
        smallest = (4 if self.stem == "cifar" else 32) * (6 if self.auxiliary else 1)
        if self.input_size < smallest:
            raise ValueError(
                f"Space {self.name!r} with these options needs input_size >= {smallest}, not {self.input_size}; "
                "a smaller image is too small."
            )

    def options(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["name"]
        return fields

    def _edges(self) -> list[Edge]:
        return [(source, node) for node in range(2, self.nodes + 2) for source in range(node)]

    def _type(self, place: int) -> str:
        return TYPES[place in (self.cells // 3, 2 * self.cells // 3)]

    def wiring(self) -> tuple[Node, ...]:
        """The nodes of both cells, with their edges."""
        return tuple(
            Node(cell, node, tuple(range(node)), tuple(f"{cell}_{source}_{node}" for source in range(node)))
            for cell in TYPES
            for node in range(2, self.nodes + 2)
        )

    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(name, NAMES) for node in self.wiring() for name in node.choices)

    def slots(self) -> tuple[Slot, ...]:
        choice = {choice.name: choice for choice in self.choices()}
        return tuple(
            Slot(
                _slot_name(part.place, (source, node)),
                choice[f"{self._type(part.place)}_{source}_{node}"],
                "cell",
                part.channels,
                part.channels,
                part.size if source < 2 or not part.reduction else -(-part.size // 2),
                2 if source < 2 and part.reduction else 1,
                affine=self.affine,
                pool_norm=self.pool_norm,
            )
            for part in self.parts()
            for source, node in part.edges
        )

    def parts(self, there: Callable[[int, Edge], bool] = lambda place, edge: True) -> tuple[Part, ...]:
        """The cells of a network whose output is read.

        Args:
            there: Whether an edge of the cell in this place is there.
        """
        edges = [reached({e for e in self._edges() if there(k, e)}, self.nodes) for k in range(self.cells)]
        starts = [{source for source, _ in found} for found in edges]
        read = [False] * (self.cells - 1) + [True, False]
        for k in reversed(range(self.cells - 1)):
            read[k] = (read[k + 1] and 1 in starts[k + 1]) or (read[k + 2] and 0 in starts[k + 2])
        parts = []
        first, second = self._stem_maps()
        channels = self.channels
        for k in range(self.cells):
            reduction = self._type(k) == "reduce"
            channels *= 1 + reduction
            sources = first if 0 in starts[k] else None, second if 1 in starts[k] else None
            part = Part(k, channels, second.size, reduction, edges[k], sources)
            if read[k]:
                parts.append(part)
            kept = tuple(node - 2 for node in part.nodes())
            first, second = second, Maps(channels, self.nodes, kept, -(-second.size // (1 + reduction)))
        return tuple(parts)

    def reads_image(self, choices: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether the output of the network that takes these choices depends on its input."""
        before, last = True, True
        for k in range(self.cells):
            there = {e for e in self._edges() if choices[f"{self._type(k)}_{e[0]}_{e[1]}"] != (NONE,)}
            starts = {source for source, _ in reached(there, self.nodes)}
            before, last = last, (0 in starts and before) or (1 in starts and last)
        return last

    def _stem_maps(self) -> tuple[Maps, Maps]:
        first, second = (Maps(spec.out_channels, 1, (0,), spec.out_size) for spec in self._stem()[-2:])
        return (second, second) if self.stem == "cifar" else (first, second)

    def _stem(self) -> list[OpSpec]:
        c, size = self.channels, self.input_size
        if self.stem == "cifar":
            return [OpSpec("conv", 3, 3 * c, size, kernel=3, activation="none")] * 2
        half, quarter = -(-size // 2), -(-size // 4)
        return [
            OpSpec("conv", 3, c // 2, size, kernel=3, stride=2),
            OpSpec("conv", c // 2, c, half, kernel=3, stride=2, activation="none"),
            OpSpec("relu_conv", c, c, quarter, kernel=3, stride=2),
        ]

    def _head(self, maps: Maps) -> dict[str, OpSpec]:
        return {
            "pool": OpSpec("pool", maps.width, maps.width, maps.size),
            "classifier": OpSpec("linear", maps.width, self.classes, 1),
        }

    def _maps(self, part: Part) -> Maps:
        kept = tuple(node - 2 for node in part.nodes())
        return Maps(part.channels, self.nodes, kept, -(-part.size // (1 + part.reduction)))

    def _specs(self, parts: tuple[Part, ...]) -> list[OpSpec]:
        """Of everything outside the edges."""
        stem = self._stem()[1:] if self.stem == "cifar" else self._stem()
        before = [spec for part in parts for spec in part.before(self.affine) if spec is not None]
        return [*stem, *before, *self._head(self._maps(parts[-1])).values()]

    def fixed_specs(self) -> tuple[OpSpec, ...]:
        return tuple(self._specs(self.parts()))

    def net_specs(self, choices: Mapping[str, tuple[str, ...]]) -> tuple[OpSpec, ...]:
        """Ops of the network that takes these choices, as it is built: without what vanished."""
        parts = self.parts(lambda k, edge: choices[f"{self._type(k)}_{edge[0]}_{edge[1]}"] != (NONE,))
        slots = {slot.name: slot for slot in self.slots()}
        here = [slots[_slot_name(part.place, edge)] for part in parts for edge in part.edges]
        chosen = [FAMILIES.get(slot.family).spec(slot, choices[slot.choice.name][0]) for slot in here]
        return (*chosen, *self._specs(parts))

    def sliced_specs(self) -> tuple[OpSpec, ...]:
        """Ops outside the edges that read fewer nodes than there are."""
        found, parts = set(), self.parts()
        for part in parts:
            from_cells = slice(max(0, 2 - part.place), 2)  # the stem keeps its width
            for source, spec in list(zip(part.sources, part.before(self.affine), strict=True))[from_cells]:
                if source is not None and spec is not None:
                    found |= {replace(spec, in_channels=width) for width in source.smaller()}
        last = self._maps(parts[-1])
        for width in last.smaller():
            found |= set(self._head(replace(last, kept=last.kept[: width // last.channels])).values())
        return tuple(sorted(found))

    def build(self, pick: Callable[[Slot], nn.Module]) -> nn.Module:
        picked = {slot.name: pick(slot) for slot in self.slots()}
        parts = self.parts(lambda k, edge: not isinstance(picked[_slot_name(k, edge)], Zero))
        stem = [build_op(spec) for spec in (self._stem()[1:] if self.stem == "cifar" else self._stem())]
        if self.stem == "imagenet":
            stem = [nn.Sequential(*stem[:2]), stem[2]]
        cells, slices, shrink = {}, {}, 1
        for part in parts:
            before = [None if spec is None else build_op(spec) for spec in part.before(self.affine)]
            edges = {edge: picked[_slot_name(part.place, edge)] for edge in part.edges}
            shrink = 2 ** sum(self._type(k) == "reduce" for k in range(part.place + 1))
            cells[part.place] = Cell(before, edges, part.nodes(), part.channels, shrink)
            for place, (source, module) in enumerate(zip(part.sources, before, strict=True)):
                if source is not None and module is not None and len(source.kept) < source.nodes:
                    convs = [name for name, inner in module.named_modules() if isinstance(inner, nn.Conv2d)]
                    for conv in convs:
                        slices[f"cells.cell{part.place}.before{place}.{conv}.weight"] = source.indices()
        side = [("auxiliary.features.2", part) for part in parts if part.place == 2 * self.cells // 3]
        for name, part in [("head.classifier", parts[-1]), *side]:
            maps = self._maps(part)
            if len(maps.kept) < maps.nodes:
                slices[f"{name}.weight"] = maps.indices()
        specs = self._head(self._maps(parts[-1]))
        head = nn.Sequential(OrderedDict((name, build_op(spec)) for name, spec in specs.items()))
        return CellNet(stem, cells, head, self._auxiliary(parts), slices)

    def _auxiliary(self, parts: tuple[Part, ...]) -> tuple[int, nn.Module] | None:
        """Behind the second reduction, where that is there."""
        behind = [part for part in parts if part.place == 2 * self.cells // 3]
        if not self.auxiliary or not behind:
            return None
        maps = self._maps(behind[0])
        return behind[0].place, AuxiliaryHead(maps.width, self.classes, maps.size)


def _slot_name(place: int, edge: Edge) -> str:
    return f"cell{place}_{edge[0]}_{edge[1]}"


SPACES.add("cell", CellSpace)
