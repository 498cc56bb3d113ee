"""Networks whose K x K convolutions RepNAS searches branches for.

To add one: a function here that lays the network out by a `Walk`, registered in `HOSTS` with its usual image size and
number of classes. Any other network can be a host as well: a function of the user's, named "package.module:function".
"""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.choices import Choice, Slot
from pynas.fuse import first_line
from pynas.ops.branches import BRANCHES
from pynas.ops.convert import input_sizes, places, replace
from pynas.ops.layers import ACTIVATIONS, build
from pynas.ops.rep import RepBlock, RepSlot, searched
from pynas.registry import Registry


@dataclass
class Walk:
    """Lays a network out from its input to its output, keeping note of its blocks and of everything else.

    Args:
        pick: Makes the module of a slot.
        size: Height and width of the image, in pixels.
        classes: Of the classifier.
        width: Multiplies channels; each is rounded to a multiple of 8 then, at least 8.
        small: Keep the resolution where the first two strides would halve it.
        kernel: K of the blocks.
        dropout: Before the classifier.
        without: Branches that are not searched.
        settings: Of every slot: `always`, `sharing`, `strided_pointwise`, `merged`.
    """

    pick: Callable[[Slot], nn.Module]
    size: int
    classes: int
    width: float = 1.0
    small: bool = False
    kernel: int = 3
    dropout: float = 0.0
    without: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    fixed: list[OpSpec] = field(default_factory=list)
    channels: int = 3
    _halved: int = 0

    def wide(self, channels: int) -> int:
        """Channels after `width`; unchanged by a width of 1."""
        return channels if self.width == 1 else max(8, round(channels * self.width / 8) * 8)

    def stride(self, stride: int) -> int:
        """A stride, or 1 where the image is too small for it."""
        self._halved += stride > 1
        return 1 if self.small and self._halved <= 2 else stride

    def block(
        self, name: str, channels: int, stride: int = 1, groups: int = 1, activation: str = "relu"
    ) -> nn.Sequential:
        """A slot for K x K branches and the activation behind it: (B, in, S, S) -> (B, channels, S', S')."""
        shape = {"kernel": self.kernel, "groups": groups, **self.settings}
        here = RepSlot("", Choice("", (), "any"), "rep", self.channels, channels, self.size, stride, **shape)
        choice = Choice(name, searched(here.shape, (), self.without), "any")
        slot = RepSlot(name, choice, "rep", self.channels, channels, self.size, stride, activation, **shape)
        self.slots.append(slot)
        self.channels, self.size = channels, slot.out_size
        return nn.Sequential(OrderedDict(conv=self.pick(slot), activation=ACTIVATIONS[activation](inplace=True)))

    def op(self, spec: OpSpec) -> nn.Module:
        """Something outside the slots."""
        self.fixed.append(spec)
        self.channels, self.size = spec.out_channels, spec.out_size
        return build(spec)

    def halved(self) -> nn.Module:
        """2 x 2 max pooling. Costs nothing here: no multiply-add, and no kind of op in the tables."""
        self.size //= 2
        return nn.MaxPool2d(2)

    def head(self) -> nn.Sequential:
        """Mean, dropout, classifier: (B, in, S, S) -> (B, classes)."""
        parts = OrderedDict(pool=self.op(OpSpec("pool", self.channels, self.channels, self.size)))
        if self.dropout:
            parts["dropout"] = nn.Dropout(self.dropout)
        parts["classifier"] = self.op(OpSpec("linear", self.channels, self.classes, 1))
        return nn.Sequential(parts)


@dataclass(frozen=True)
class Host:
    """A network to search branches for.

    Args:
        lay: Lays it out.
        input_size: Usual height and width of its image, in pixels.
        classes: Usual number of classes.
    """

    lay: Callable[[Walk], nn.Module]
    input_size: int = 224
    classes: int = 1000


HOSTS: Registry[Host] = Registry("host")


class Chain(nn.Module):
    """Layers one after the other, then a head: (B, 3, S, S) -> (B, classes)."""

    def __init__(self, layers: OrderedDict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(layers)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x))
        return logits


def repvgg(
    walk: Walk,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    groups: int = 1,
    stem: int = 0,
    strides: tuple[int, ...] = (),
) -> nn.Module:
    """RepVGG (arXiv 2101.03697): a stem block, then stages of blocks, each of which halves the image first.

    Args:
        walk: How.
        depths: Blocks of every stage.
        widths: Channels of every stage.
        groups: Of every second block behind the stem up to the 26th (the g2 and g4 nets).
        stem: Channels of the stem; by default those of the first stage, 64 at most.
        strides: Of stem and stages; 2 by default.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    halving = strides or (2,) * (len(depths) + 1)
    layers["stem"] = walk.block("stem", walk.wide(stem or min(64, widths[0])), walk.stride(halving[0]))
    number = 0
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        for block in range(depth):
            number += 1
            stride = walk.stride(halving[stage]) if block == 0 else 1
            many = groups if number % 2 == 0 and number <= 26 else 1
            name = f"stage{stage}_{block + 1}"
            layers[name] = walk.block(name, walk.wide(width), stride, many)
    return Chain(layers, walk.head())


def vgg16(walk: Walk) -> nn.Module:
    """VGG-16 as it is usual for 32-pixel images: 13 convolutions, five poolings, one classifier."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (depth, width) in enumerate(zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), strict=True), 1):
        for block in range(depth):
            name = f"stage{stage}_{block + 1}"
            layers[name] = walk.block(name, walk.wide(width))
        if walk.stride(2) == 2:
            layers[f"pool{stage}"] = walk.halved()
    return Chain(layers, walk.head())


class Bottleneck(nn.Module):
    """1x1 convolution, depthwise block, 1x1 convolution, and the input added where the shapes agree."""

    def __init__(self, walk: Walk, name: str, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        entry, hidden = walk.channels, expansion * walk.channels
        self.expand: nn.Module = nn.Identity()
        if expansion > 1:
            self.expand = walk.op(OpSpec("conv", entry, hidden, walk.size, activation="relu6"))
        self.depthwise = walk.block(name, hidden, stride, hidden, "relu6")
        self.project = walk.op(OpSpec("conv", hidden, channels, walk.size, activation="none"))
        self.residual = stride == 1 and entry == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def mobilenet_v2(walk: Walk) -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381): the 3x3 stem and the depthwise convolutions are the blocks."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = walk.block("stem", walk.wide(32), walk.stride(2), activation="relu6")
    for stage, (expansion, width, depth, first) in enumerate(stages, 1):
        for block in range(depth):
            name = f"stage{stage}_{block + 1}"
            stride = walk.stride(first) if block == 0 else 1
            layers[name] = Bottleneck(walk, name, walk.wide(width), stride, expansion)
    last = max(1280, walk.wide(1280)) if walk.width > 1 else walk.wide(1280)
    layers["last"] = walk.op(OpSpec("conv", walk.channels, last, walk.size, activation="relu6"))
    return Chain(layers, walk.head())


_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)
_REPVGG: dict[str, tuple[tuple[int, ...], float, float]] = {
    "repvgg_a0": (_A, 0.75, 2.5),
    "repvgg_a1": (_A, 1, 2.5),
    "repvgg_a2": (_A, 1.5, 2.75),
    "repvgg_b0": (_B, 1, 2.5),
    "repvgg_b1": (_B, 2, 4),
    "repvgg_b2": (_B, 2.5, 5),
    "repvgg_b3": (_B, 3, 5),
}
for _name, (_depths, _a, _b) in _REPVGG.items():
    _widths = (int(64 * _a), int(128 * _a), int(256 * _a), int(512 * _b))
    HOSTS.add(_name, Host(partial(repvgg, depths=_depths, widths=_widths)))
    if _name in ("repvgg_b1", "repvgg_b2", "repvgg_b3"):
        for _groups in (2, 4):
            HOSTS.add(f"{_name}g{_groups}", Host(partial(repvgg, depths=_depths, widths=_widths, groups=_groups)))
_tiny: dict[str, tuple[int, ...]] = {"depths": (2, 2, 2), "widths": (8, 16, 32), "strides": (1, 1, 2, 2)}
HOSTS.add("repvgg_tiny", Host(partial(repvgg, **_tiny), 16, 10))  # type: ignore[arg-type]
HOSTS.add("vgg16", Host(vgg16, 32, 10))
HOSTS.add("mobilenet_v2", Host(mobilenet_v2))


def host(name: str) -> Host:
    """A host by its name, or a user's function as "package.module:function".

    That is called with `num_classes` where it takes that, and answers with a network for images (B, 3, S, S); so that
    a run can be resumed, it must give the same network every time.

    Raises:
        ValueError: If there is none of that name, or the function cannot be imported.
    """
    if ":" not in name:
        return HOSTS.get(name)
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The host {name!r} cannot be imported: {first_line(error)}") from None
    if not callable(make):
        raise ValueError(f"The host {name!r} is no function, but {type(make).__name__}.")
    return Host(partial(imported, name=name, make=make))


def imported(walk: Walk, name: str, make: Callable[..., Any]) -> nn.Module:
    """A user's network, its K x K convolutions replaced by blocks that take over their weights."""
    if walk.width != 1 or walk.small:
        raise ValueError(f"The host {name!r} is the user's own: width and small_images do not apply to it.")
    parameters = inspect.signature(make).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    try:
        net = make(num_classes=walk.classes) if takes else make()
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"The host {name!r} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"The host {name!r} answers with {type(net).__name__}, not with a torch.nn.Module.")
    parameter = next(net.parameters(), torch.empty(0))
    example = torch.zeros(1, 3, walk.size, walk.size, device=parameter.device)
    found = places(net, example=example)
    if not found:
        raise ValueError(f"The host {name!r} has no convolution of 3x3, 5x5 or 7x7 that a block could stand for.")
    walk.fixed += _others(net, {place.name for place in found}, example)
    for place in found:
        slot = place.slot([branch for branch in BRANCHES if branch not in walk.without], **walk.settings)
        walk.slots.append(slot)
        module = walk.pick(slot)
        inside = [part for part in module.modules() if isinstance(part, RepBlock)]
        if inside:
            replace(net, place, module, inside[0])
    return net


def _others(net: nn.Module, taken: set[str], example: Tensor) -> list[OpSpec]:
    """Specs of the other convolutions and of linear layers; what else there is has none, and costs nothing here."""
    specs = []
    sizes = input_sizes(net, example)
    for name, module in net.named_modules():
        if name in taken or name not in sizes:
            continue
        if isinstance(module, nn.Conv2d):
            shape = (module.in_channels, module.out_channels, sizes[name])
            settings = {"stride": int(module.stride[0]), "groups": module.groups, "dilation": int(module.dilation[0])}
            specs.append(OpSpec("conv", *shape, kernel=int(module.kernel_size[0]), **settings, activation="none"))
        elif isinstance(module, nn.Linear):
            specs.append(OpSpec("linear", module.in_features, module.out_features, 1))
    return specs
