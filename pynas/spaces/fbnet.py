"""The layer-wise space of FBNet (arXiv 1812.03443, Table 1), parametrised; three named spaces come from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from cost_models.spec import OpSpec
from pynas.ops import mbconv
from pynas.registry import SPACES
from pynas.spaces.layerwise import Layerwise, initialise_conv

OPTIONS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
assert all(name in mbconv.OPTIONS for name in OPTIONS)

# Channels, layers and stride of the first layer, stage by stage.
PAPER_STAGES = ((16, 1, 1), (24, 4, 2), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
SMALL_STAGES = ((16, 1, 1), (24, 4, 1), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
TINY_STAGES = ((8, 1, 1), (16, 2, 2), (24, 2, 2), (48, 1, 1))


@dataclass(frozen=True)
class FBNetSpace(Layerwise):
    """FBNet's macro-architecture with nine options at every layer.

    Args:
        name: Under which it is registered.
        input_size: Height and width of the image, in pixels.
        classes: Of the classifier.
        width: Multiplies the channels of stem and stages, each rounded up to a multiple of 8 (as in the published
            96-0.35-1 net: 8, 16, 16, 24, 40, 72, 128).
        stem_channels: Before `width`.
        stem_stride: Of the 3x3 stem.
        stages: Channels (before `width`), number of layers and stride of the first layer, for every stage.
        head_channels: Of the last 1x1 convolution; 1504 for FBNet-A, 1984 for B and C. Not scaled by `width`.
        dropout: Before the classifier; the paper names none.

    Raises:
        ValueError: If a value is not positive, or the image shrinks to nothing.
    """

    name: str = "fbnet"
    input_size: int = 224
    classes: int = 1000
    width: float = 1.0
    stem_channels: int = 16
    stem_stride: int = 2
    stages: Sequence[Sequence[int]] = PAPER_STAGES
    head_channels: int = 1504
    dropout: float = 0.0

    OPTIONS: ClassVar[tuple[str, ...]] = OPTIONS

    def _stem(self) -> dict[str, OpSpec]:
        channels, size, stride = self._channels(self.stem_channels), self.input_size, self.stem_stride
        return {"conv": OpSpec("conv", 3, channels, size, kernel=3, stride=stride)}

    def _initialise(self, module: nn.Module) -> None:
        """He initialisation by fan-out, as usual for these blocks; the paper does not name one."""
        initialise_conv(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


SPACES.add("fbnet", FBNetSpace)
SPACES.add(
    "fbnet32",
    partial(FBNetSpace, name="fbnet32", input_size=32, classes=10, stem_stride=1, stages=SMALL_STAGES),
)
SPACES.add(
    "fbnet_tiny",
    partial(
        FBNetSpace,
        name="fbnet_tiny",
        input_size=16,
        classes=10,
        stem_channels=8,
        stem_stride=1,
        stages=TINY_STAGES,
        head_channels=128,
    ),
)
