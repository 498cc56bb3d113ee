"""The vocabulary between a network's graph and its code: layers on channels-last tensors.

Activations lie as (batch, height, width, channels) float32. Channels last, because every width then vectorises equally
well, a 1x1 convolution is a matrix product, and a torch tensor in `channels_last` has the very same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["none", "relu", "relu6", "hardswish"]


@dataclass(frozen=True)
class Conv:
    """A convolution with bias, then the residual, then the activation: act(conv(x) + bias + residual).

    Args:
        batch: Images.
        height: Of the input.
        width: Of the input.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Height and width of the kernel.
        stride: In both directions.
        padding: Zeros on each side.
        dilation: In both directions.
        groups: As in torch.
        activation: The last thing that is done.
        residual: Whether a second tensor of the output's shape is added.
        shuffle: The input's channels are read in the order that `torch.nn.ChannelShuffle(shuffle)` would give them: a
            shuffle between two convolutions is an address, not a copy. 1 for none.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation: Activation = "none"
    residual: bool = False
    shuffle: int = 1

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def depthwise(self) -> bool:
        """One channel per group, as many out as in."""
        return 1 < self.groups == self.in_channels == self.out_channels

    @property
    def pointwise(self) -> bool:
        """1x1, whatever the stride and the groups."""
        return self.kernel == 1 and self.padding == 0


@dataclass(frozen=True)
class Pool:
    """Maximum or average over windows; padding counts as minus infinity, or not at all.

    Args:
        batch: Images.
        height: Of the input.
        width: Of the input.
        channels: Of input and output.
        kind: "max" or "avg".
        kernel: Height and width of the window.
        stride: In both directions.
        padding: On each side.
        count_padding: Whether an average divides by the whole window at the border too.
    """

    batch: int
    height: int
    width: int
    channels: int
    kind: Literal["max", "avg"]
    kernel: int
    stride: int
    padding: int = 0
    count_padding: bool = False

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class GlobalPool:
    """The average of each channel: (batch, height, width, channels) to (batch, 1, 1, channels)."""

    batch: int
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Linear:
    """A matrix product with bias: (batch, in_features) to (batch, out_features)."""

    batch: int
    in_features: int
    out_features: int
    activation: Activation = "none"


@dataclass(frozen=True)
class Sum:
    """The sum of tensors of one shape, then an activation. One term is the activation alone."""

    shape: tuple[int, ...]
    terms: int
    activation: Activation = "none"


@dataclass(frozen=True)
class Concat:
    """Tensors side by side along the channels."""

    batch: int
    height: int
    width: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Shuffle:
    """torch.nn.ChannelShuffle as a copy, for where no convolution can absorb it."""

    batch: int
    height: int
    width: int
    channels: int
    groups: int


Layer = Conv | Pool | GlobalPool | Linear | Sum | Concat | Shuffle
