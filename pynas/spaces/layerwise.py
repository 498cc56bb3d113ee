"""What layer-wise spaces share: a stem, stages of layers with a choice each, and a head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.choices import Choice, Slot
from pynas.ops.layers import build as build_op


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
class Layerwise(ABC):
    """A stem, stages of layers that choose among the same options, a 1x1 convolution, mean and classifier.

    A space of this kind derives from it, gives every field its default, and says what its layers choose among
    (`OPTIONS`), what its stem is made of, and how weights begin.

    Args:
        name: Under which it is registered.
        input_size: Height and width of the image, in pixels.
        classes: Of the classifier.
        width: Multiplies the channels of stem and stages, each rounded up to a multiple of 8.
        stem_channels: Before `width`.
        stem_stride: Of the 3x3 convolution.
        stages: Channels (before `width`), number of layers and stride of the first layer, for every stage.
        head_channels: Of the last 1x1 convolution. Not scaled by `width`.
        dropout: Before the classifier.

    Raises:
        ValueError: If a value is not positive, or the image shrinks to nothing.
    """

    name: str
    input_size: int
    classes: int
    width: float
    stem_channels: int
    stem_stride: int
    stages: Sequence[Sequence[int]]
    head_channels: int
    dropout: float

    OPTIONS: ClassVar[tuple[str, ...]] = ()

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

    @abstractmethod
    def _stem(self) -> dict[str, OpSpec]:
        """Parts of the stem by name, in order."""

    def _slot_fields(self) -> Mapping[str, Any]:
        """What all slots have beyond channels, size and stride."""
        return {}

    @abstractmethod
    def _initialise(self, module: nn.Module) -> None:
        """Gives one module of a new network the weights that it begins with."""

    def slots(self) -> tuple[Slot, ...]:
        found: list[Slot] = []
        last = list(self._stem().values())[-1]
        channels, size, fields = last.out_channels, last.out_size, self._slot_fields()
        for stage_channels, layers, stage_stride in self.stages:
            for layer in range(layers):
                choice = Choice(f"layer{len(found) + 1}", self.OPTIONS)
                stride = stage_stride if layer == 0 else 1
                out = self._channels(stage_channels)
                slot = Slot(choice.name, choice, "mbconv", channels, out, size, stride, **fields)
                found.append(slot)
                channels, size = slot.out_channels, slot.out_size
        return tuple(found)

    def choices(self) -> tuple[Choice, ...]:
        return tuple(slot.choice for slot in self.slots())

    def _head(self) -> dict[str, OpSpec]:
        last = self.slots()[-1]
        width = self.head_channels
        return {
            "conv": OpSpec("conv", last.out_channels, width, last.out_size, activation=last.activation),
            "pool": OpSpec("pool", width, width, last.out_size),
            "classifier": OpSpec("linear", width, self.classes, 1),
        }

    def fixed_specs(self) -> tuple[OpSpec, ...]:
        return (*self._stem().values(), *self._head().values())

    def build(self, pick: Callable[[Slot], nn.Module]) -> nn.Module:
        parts = OrderedDict((name, build_op(spec)) for name, spec in self._stem().items())
        stem = nn.Sequential(parts) if len(parts) > 1 else next(iter(parts.values()))
        layers = OrderedDict((slot.name, pick(slot)) for slot in self.slots())
        head = OrderedDict((name, build_op(spec)) for name, spec in self._head().items())
        if self.dropout:
            head["dropout"] = nn.Dropout(self.dropout)
            head.move_to_end("classifier")
        net = LayerwiseNet(stem, layers, head)
        net.apply(self._initialise)
        return net


def initialise_conv(module: nn.Module) -> None:
    """Convolution weights from N(0, sqrt(2 / (K^2 * out_channels))), biases zero (He et al. 2015, by fan-out)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
