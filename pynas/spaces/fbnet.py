"""The layer-wise space of FBNet (arXiv 1812.03443, Table 1), parametrised; three named spaces come from it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.choices import Choice, Slot
from pynas.ops import mbconv
from pynas.ops.layers import build as build_op
from pynas.registry import SPACES

OPTIONS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
assert all(name in mbconv.OPTIONS for name in OPTIONS)

# Channels, layers and stride of the first layer, stage by stage.
PAPER_STAGES = ((16, 1, 1), (24, 4, 2), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
SMALL_STAGES = ((16, 1, 1), (24, 4, 1), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
TINY_STAGES = ((8, 1, 1), (16, 2, 2), (24, 2, 2), (48, 1, 1))


class LayerwiseNet(nn.Module):
    """Stem, a chain of layers, head: (B, 3, S, S) -> (B, classes)."""

    def __init__(self, stem: nn.Module, layers: OrderedDict[str, nn.Module], head: OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.layers = nn.Sequential(layers)
        self.head = nn.Sequential(head)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.stem(x)))
        return logits


@dataclass(frozen=True)
class FBNetSpace:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        for field in ("input_size", "classes", "stem_channels", "stem_stride", "head_channels"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} of space {self.name!r} must be a positive whole number, not {value!r}.")
        if not (isinstance(self.width, int | float) and 0 < self.width <= 16):
            raise ValueError(f"width of space {self.name!r} must lie in (0, 16], not {self.width!r}.")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout of space {self.name!r} must lie in [0, 1), not {self.dropout!r}.")
        whole = all(len(stage) == 3 and all(isinstance(n, int) and n > 0 for n in stage) for stage in self.stages)
        if not self.stages or not whole:
            raise ValueError(
                f"stages of space {self.name!r} must be (channels, layers, stride) triples, not {self.stages!r}."
            )
        shrink = self.stem_stride * math.prod(stage[2] for stage in self.stages)
        if self.input_size < shrink:
            raise ValueError(
                f"Space {self.name!r} shrinks its input {shrink} times; input_size {self.input_size} is too small."
            )

    def options(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["name"]
        return fields | {"stages": [list(stage) for stage in self.stages]}

    def _channels(self, channels: int) -> int:
        return math.ceil(channels * self.width / 8) * 8

    def slots(self) -> tuple[Slot, ...]:
        found: list[Slot] = []
        channels = self._channels(self.stem_channels)
        size = -(-self.input_size // self.stem_stride)
        for stage_channels, layers, stage_stride in self.stages:
            for layer in range(layers):
                choice = Choice(f"layer{len(found) + 1}", OPTIONS)
                stride = stage_stride if layer == 0 else 1
                slot = Slot(choice.name, choice, "mbconv", channels, self._channels(stage_channels), size, stride)
                found.append(slot)
                channels, size = slot.out_channels, slot.out_size
        return tuple(found)

    def choices(self) -> tuple[Choice, ...]:
        return tuple(slot.choice for slot in self.slots())

    def _stem(self) -> OpSpec:
        return OpSpec("conv", 3, self._channels(self.stem_channels), self.input_size, kernel=3, stride=self.stem_stride)

    def _head(self) -> dict[str, OpSpec]:
        last = self.slots()[-1]
        return {
            "conv": OpSpec("conv", last.out_channels, self.head_channels, last.out_size),
            "pool": OpSpec("pool", self.head_channels, self.head_channels, last.out_size),
            "classifier": OpSpec("linear", self.head_channels, self.classes, 1),
        }

    def fixed_specs(self) -> tuple[OpSpec, ...]:
        return (self._stem(), *self._head().values())

    def build(self, pick: Callable[[Slot], nn.Module]) -> nn.Module:
        layers = OrderedDict((slot.name, pick(slot)) for slot in self.slots())
        head = OrderedDict((name, build_op(spec)) for name, spec in self._head().items())
        if self.dropout:
            head["dropout"] = nn.Dropout(self.dropout)
            head.move_to_end("classifier")
        net = LayerwiseNet(build_op(self._stem()), layers, head)
        net.apply(_initialise)
        return net


def _initialise(module: nn.Module) -> None:
    """He initialisation by fan-out, as usual for these blocks; the paper does not name one."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
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
