"""The network of the cell space: stem, cells of edges and nodes, head; supernet and found net alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pynas.ops.cell import DropPath
from pynas.ops.layers import GlobalPool


class Cell(nn.Module):
    """Nodes that add up what their edges bring; the output is the concatenation of the nodes.

    Args:
        before: What each of the two inputs passes through; None where no edge starts from it.
        edges: Module of every edge, by source and node; 0 and 1 are the inputs.
        nodes: Those that are there, in order. Without any, the cell gives one channel of zeros.
        channels: Of a node.
        shrink: Side of the stem's output over that of the cell's.
    """

    def __init__(
        self,
        before: Sequence[nn.Module | None],
        edges: Mapping[tuple[int, int], nn.Module],
        nodes: Sequence[int],
        channels: int,
        shrink: int,
    ) -> None:
        super().__init__()
        self.before0, self.before1 = before
        self.edges = nn.ModuleDict({f"{source}_{node}": edge for (source, node), edge in edges.items()})
        self.drop = DropPath()
        self.nodes, self.channels, self.shrink = tuple(nodes), channels, shrink
        self._into = {node: [source for source, target in edges if target == node] for node in self.nodes}

    def forward(self, first: Tensor | None, second: Tensor | None, stem: Tensor) -> Tensor:
        """Outputs of the cell before the last, of the last cell, and of the stem -> (B, C, S, S).

        An input may be missing where no edge starts from it. An edge may bring nothing (None): then a node without any
        other brings nothing either, and stands in the output as zeros.
        """
        states: dict[int, Tensor | None] = {}
        for place, (before, x) in enumerate(((self.before0, first), (self.before1, second))):
            states[place] = None if before is None else before(x)
        for node in self.nodes:
            total: Tensor | None = None
            for source in self._into[node]:
                brought = self._along(states[source], source, node)
                if brought is not None:
                    total = brought if total is None else total + brought
            states[node] = total
        found = [states[node] for node in self.nodes]
        given = [self._zeros(stem, self.channels) if state is None else state for state in found]
        if not given:
            return self._zeros(stem, 1)
        return torch.cat(given, 1) if len(given) > 1 else given[0]

    def _along(self, x: Tensor | None, source: int, node: int) -> Tensor | None:
        if x is None:
            return None
        edge = self.edges[f"{source}_{node}"]
        y: Tensor | None = edge(x)
        return y if y is None or isinstance(edge, nn.Identity) else self.drop(y)

    def _zeros(self, stem: Tensor, channels: int) -> Tensor:
        height, width = (-(-side // self.shrink) for side in stem.shape[2:])
        return stem.new_zeros(stem.shape[0], channels, height, width)


class AuxiliaryHead(nn.Module):
    """A second classifier that helps to train deep networks of cells (DARTS): (B, C, S, S) -> (B, classes).

    ReLU, 5x5 mean with the stride that leaves 2x2 of 8x8 or 7x7 pixels, 1x1 conv to 128, BN, ReLU, 2x2 conv to 768, BN,
    ReLU, mean over what is left, classifier.

    Args:
        channels: C.
        classes: Of the classifier.
        size: S, at least 6.
    """

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, min(3, size - 5), 0, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            GlobalPool(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class CellNet(nn.Module):
    """(B, 3, S, S) -> (B, classes).

    Args:
        stem: Gives the first cell its input; a second module gives the input that counts as that of the cell before.
        cells: By place; those whose output nobody reads are left out.
        head: Mean and classifier.
        auxiliary: The place of the cell that a second classifier sits on, and that classifier; or none.
        slices: Weights that read only some of the supernet's channels, with the indices of these.
    """

    def __init__(
        self,
        stem: Sequence[nn.Module],
        cells: Mapping[int, Cell],
        head: nn.Module,
        auxiliary: tuple[int, nn.Module] | None,
        slices: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.stem = stem[0]
        self.stem1 = stem[1] if len(stem) > 1 else None
        self.cells = nn.ModuleDict({f"cell{place}": cell for place, cell in cells.items()})
        self.head = head
        self.auxiliary = None if auxiliary is None else auxiliary[1]
        self._side = -1 if auxiliary is None else auxiliary[0]
        self._places, self._slices = max(cells) + 1, dict(slices)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and those of the auxiliary head where there is one."""
        logits, side = self._run(x)
        return logits, None if self.auxiliary is None else self.auxiliary(side)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        first: Tensor | None = self.stem(x)
        second: Tensor | None = first if self.stem1 is None else self.stem1(first)
        assert second is not None
        stem, side = second, None
        for place in range(self._places):
            name = f"cell{place}"
            given = self.cells[name](first, second, stem) if name in self.cells else None
            first, second = second, given
            side = given if place == self._side else side
        return self.head(second), side

    def inherited(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This network's part of the state of the supernet: what vanished is left out, what fed on it is sliced."""
        return {
            name: state[name][:, self._slices[name]] if name in self._slices else state[name]
            for name in self.state_dict()
        }
