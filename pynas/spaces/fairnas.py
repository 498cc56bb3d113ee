"""The layer-wise space of FairNAS (arXiv 1907.01845), in its two lengths, and that of NAS-Bench-Macro."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from cost_models.names import unknown
from cost_models.spec import ACTIVATIONS, OpSpec
from pynas.ops import mbconv
from pynas.registry import SPACES
from pynas.spaces.layerwise import Layerwise, initialise_conv

OPTIONS = ("k3_e3", "k5_e3", "k7_e3", "k3_e6", "k5_e6", "k7_e6")
MACRO_OPTIONS = ("identity", "k3_e3", "k5_e6")
assert all(name in mbconv.OPTIONS for name in (*OPTIONS, *MACRO_OPTIONS))

# Channels, layers and stride of the first layer, stage by stage.
PAPER_STAGES = ((32, 2, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
V1_STAGES = ((32, 2, 2), (40, 3, 2), (80, 4, 2), (96, 3, 1), (192, 3, 2), (320, 1, 1))
MACRO_STAGES = ((64, 2, 2), (128, 3, 2), (256, 3, 2))


@dataclass(frozen=True)
class FairNASSpace(Layerwise):
    """FairNAS's macro-architecture: inverted bottlenecks of kernel 3, 5 or 7 and expansion 3 or 6, and no skip.

    19 choice layers, as in the released nets; `fairnas_v1` has 16. Layers and widths are those of the released code.
    `fairnas_v1` goes by the article's 6^16 networks and "MobileNetV2's number of layers": 2, 3, 4, 3, 3 and 1 layers in
    the stages, which is MobileNetV2 without its first bottleneck. Its widths are those of the 19-layer net. Both are
    inferred: which layers the first version of the paper searched is not known.

    Weights begin as in the released code: convolutions N(0, sqrt(2 / (K^2 * out_channels))), classifier
    U(-1/sqrt(classes), 1/sqrt(classes)); its bias begins at zero here.

    Args:
        name: Under which it is registered.
        input_size: Height and width of the image, in pixels.
        classes: Of the classifier.
        width: Multiplies the channels of stem and stages, each rounded up to a multiple of 8.
        stem_channels: Of the 3x3 convolution and the depthwise one after it, before `width`.
        stem_stride: Of the 3x3 convolution.
        neck_channels: Of the 1x1 convolution that ends the stem, before `width`.
        stages: Channels (before `width`), number of layers and stride of the first layer, for every stage.
        head_channels: Of the last 1x1 convolution. Not scaled by `width`.
        dropout: Before the classifier.
        activation: Of stem, options and head: "relu6", or "swish" in the later variants.
        squeeze: Channels in the middle of every option's squeeze-and-excitation, as a share of the option's input
            channels; 0 for none. The released A, B and C with half (5.9M, 5.7M and 5.6M parameters) are reproduced to
            the parameter by 0.5. Unverified: the activation inside (here that of the option), the sigmoid, and what is
            counted in the published 392M, 349M and 325M multiply-adds (389.3M, 346.5M and 322.2M of convolutions and
            classifier here, 393.0M, 349.8M and 325.2M with the means and products of squeeze-and-excitation).

    Raises:
        ValueError: If a value is not positive, the activation is unknown, or the image shrinks to nothing.
    """

    name: str = "fairnas"
    input_size: int = 224
    classes: int = 1000
    width: float = 1.0
    stem_channels: int = 32
    stem_stride: int = 2
    stages: Sequence[Sequence[int]] = PAPER_STAGES
    head_channels: int = 1280
    dropout: float = 0.2
    neck_channels: int = 16
    activation: str = "relu6"
    squeeze: float = 0.0

    OPTIONS: ClassVar[tuple[str, ...]] = OPTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ACTIVATIONS[1:]
        if self.activation not in allowed:
            raise unknown(f"activation of space {self.name!r}", self.activation, allowed)
        if not (isinstance(self.squeeze, int | float) and 0 <= self.squeeze <= 6):
            raise ValueError(f"squeeze of space {self.name!r} must lie in [0, 6], not {self.squeeze!r}.")
        neck = self.neck_channels
        if isinstance(neck, bool) or not isinstance(neck, int) or neck < 1:
            raise ValueError(f"neck_channels of space {self.name!r} must be a positive whole number, not {neck!r}.")

    def _stem(self) -> dict[str, OpSpec]:
        wide, neck = self._channels(self.stem_channels), self._channels(self.neck_channels)
        size, act = self.input_size, self.activation
        conv = OpSpec("conv", 3, wide, size, kernel=3, stride=self.stem_stride, activation=act)
        inner = conv.out_size
        return {
            "conv": conv,
            "depthwise": OpSpec("conv", wide, wide, inner, kernel=3, groups=wide, activation=act),
            "neck": OpSpec("conv", wide, neck, inner, activation="none"),
        }

    def _slot_fields(self) -> Mapping[str, Any]:
        return {"activation": self.activation, "squeeze": self.squeeze}

    def _initialise(self, module: nn.Module) -> None:
        _initialise(module)


@dataclass(frozen=True)
class MacroSpace(Layerwise):
    """The space of NAS-Bench-Macro (Su et al., CVPR 2021): eight layers choose identity or one of two bottlenecks.

    Its table holds the accuracy of all 6,561 networks, trained alone; a key's digits 0, 1 and 2 stand for `identity`,
    `k3_e3` and `k5_e6`. Where an identity has to change the shape it is a 1x1 convolution with BN and no activation.
    Identities behind a stage's first layer do nothing, so keys that differ only in their places are the same network.

    Args:
        name: Under which it is registered.
        input_size: Height and width of the image, in pixels.
        classes: Of the classifier.
        width: Multiplies the channels of stem and stages, each rounded up to a multiple of 8.
        stem_channels: Before `width`.
        stem_stride: Of the 3x3 stem.
        stages: Channels (before `width`), number of layers and stride of the first layer, for every stage.
        head_channels: Of the last 1x1 convolution. Not scaled by `width`.
        dropout: Before the classifier; the benchmark's networks have none.

    Raises:
        ValueError: If a value is not positive, or the image shrinks to nothing.
    """

    name: str = "macro"
    input_size: int = 32
    classes: int = 10
    width: float = 1.0
    stem_channels: int = 32
    stem_stride: int = 1
    stages: Sequence[Sequence[int]] = MACRO_STAGES
    head_channels: int = 1280
    dropout: float = 0.0

    OPTIONS: ClassVar[tuple[str, ...]] = MACRO_OPTIONS

    def _stem(self) -> dict[str, OpSpec]:
        channels, size, stride = self._channels(self.stem_channels), self.input_size, self.stem_stride
        return {"conv": OpSpec("conv", 3, channels, size, kernel=3, stride=stride)}

    def _initialise(self, module: nn.Module) -> None:
        _initialise(module)


def _initialise(module: nn.Module) -> None:
    initialise_conv(module)
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)


SPACES.add("fairnas", FairNASSpace)
SPACES.add("fairnas_v1", partial(FairNASSpace, name="fairnas_v1", stages=V1_STAGES))
SPACES.add("macro", MacroSpace)
