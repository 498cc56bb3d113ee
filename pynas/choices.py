"""The nouns that every layer above shares: what can be chosen, where, and what was decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A decision of the search: one option of several (or any subset of them).

    Args:
        name: Unique in its space, for instance "layer7".
        options: Names of the options, scoped by the family of the slots that use the choice.
        pick: "one" option, or "any" subset of them.
    """

    name: str
    options: tuple[str, ...]
    pick: Literal["one", "any"] = "one"


@dataclass(frozen=True)
class Slot:
    """One place in a network where a choice takes effect. Several slots may hang on one choice.

    Args:
        name: Unique in its space; a valid attribute name.
        choice: What is decided here.
        family: Name of the option family that builds the modules (`pynas.ops.FAMILIES`).
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        size: Height and width that come in, in pixels.
        stride: Of the whole option.
        activation: Of the options: "relu", "relu6", "hardswish" or "swish".
        squeeze: Channels in the middle of the options' squeeze-and-excitation, as a share of `in_channels`; 0 for none.
        affine: Whether the options' batch norms have scale and shift; of the family "cell" alone.
        pool_norm: Whether a batch norm follows its pools; likewise.
    """

    name: str
    choice: Choice
    family: str
    in_channels: int
    out_channels: int
    size: int
    stride: int = 1
    activation: str = "relu"
    squeeze: float = 0.0
    affine: bool = True
    pool_norm: bool = False

    @property
    def out_size(self) -> int:
        """Height and width that go out, in pixels."""
        return -(-self.size // self.stride)


@dataclass(frozen=True)
class Node:
    """A place in a cell where edges meet: it adds up what they bring.

    Args:
        cell: Type of the cell, for instance "normal".
        index: Of the node. 0 and 1 are the cell's inputs, which are no `Node` themselves.
        sources: Where its edges come from: inputs, or nodes of smaller index.
        choices: Name of the choice of each edge, in the same order.
    """

    cell: str
    index: int
    sources: tuple[int, ...]
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Gates:
    """What a sampler decided for one slot.

    Args:
        values: Weight of each option, shape (O,) for the whole batch or (B, O) for a draw per image. May carry
            gradient.
        run: Which options are computed. Known on the host, never read off the tensor.
        train: Which of those are differentiated, so that their weights get gradients. The others of `run` are computed
            without a graph: they give a gradient to their gate and to nothing else.
        single: One option runs, with weight one and no gradient for its gate: what it gives out is the slot's output as
            it is, and `values` need not be read.
    """

    values: Tensor
    run: tuple[int, ...]
    train: tuple[int, ...]
    single: bool = False

    @staticmethod
    def one_hot(options: int, index: int, device: torch.device | None = None) -> Gates:
        """One option alone."""
        values = torch.zeros(options, device=device)
        values[index] = 1.0
        return Gates(values, (index,), (index,), single=True)
