"""The space of RepNAS (arXiv 2109.03508): which branches stand in the place of each convolution of a host network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from cost_models.names import unknown
from cost_models.spec import OpSpec
from pynas.choices import Choice, Slot
from pynas.registry import FAMILIES, SPACES
from pynas.spaces.hosts import Walk, host

# What the article searches, and what the authors' code does: skip is always on where there is one, and strided
# 1x1-KxK branches have no 1x1 convolution.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "article": {"without": (), "always": (), "strided_pointwise": True},
    "released": {"without": ("skip",), "always": ("skip",), "strided_pointwise": False},
}


@dataclass(frozen=True)
class RepNASSpace:
    """Any subset of seven linear branches in the place of every K x K convolution; one convolution after training.

    A space of n branches in all has 2^n members, which all cost the same when they are folded. A member's own module,
    `Architecture.build()`, is the training form, each branch with weights of its own; `pynas.fuse` folds it, and
    `plain()` is the network that its state loads into.

    Args:
        name: Under which it is registered.
        host: A name of `pynas.spaces.hosts.HOSTS`, or a user's function as "package.module:function".
        input_size: Height and width of the image, in pixels; 0 for the host's usual.
        classes: Of the classifier; 0 for the host's usual.
        width: Multiplies the host's channels.
        small_images: Keep the resolution where the host's first two strides (or poolings) would halve it.
        kernel: K of the blocks: 3, 5 or 7; a user's host keeps its own.
        preset: "article": all seven branches are searched. "released": six, with skip always on where it fits, and
            plain KxK convolutions for strided 1x1-KxK branches.
        sharing: Whether the branches of a block slice one kernel while they are searched. The article claims that this
            trains faster and ranks branches better; the released code gives each weights of its own.
        dropout: Before the classifier of a named host, as in the released code.
        merged: Whether blocks train as one convolution each, with exact batch statistics; see `pynas.ops.moments`.

    Raises:
        ValueError: If a value cannot be, or the host is unknown or cannot be imported.
    """

    name: str = "repnas"
    host: str = "repvgg_a0"
    input_size: int = 0
    classes: int = 0
    width: float = 1.0
    small_images: bool = False
    kernel: int = 3
    preset: str = "article"
    sharing: bool = True
    dropout: float = 0.1
    merged: bool = False

    def __post_init__(self) -> None:
        here = f"space {self.name!r}"
        if not isinstance(self.host, str):
            raise ValueError(
                f"host of {here} must be a name, not {type(self.host).__name__}. For a network of your own give the "
                "function that makes it, as 'package.module:function', or use pynas.rep.convert."
            )
        usual = host(self.host)
        for field in ("input_size", "classes"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{field} of {here} must be a positive whole number, not {value!r}.")
            object.__setattr__(self, field, value or getattr(usual, field))
        if self.preset not in PRESETS:
            raise unknown(f"preset of {here}", self.preset, PRESETS)
        if self.kernel not in (3, 5, 7):
            raise ValueError(f"kernel of {here} must be 3, 5 or 7, not {self.kernel!r}.")
        for field in ("small_images", "sharing", "merged"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} of {here} must be true or false, not {getattr(self, field)!r}.")
        if not (isinstance(self.width, int | float) and 0 < self.width <= 16):
            raise ValueError(f"width of {here} must lie in (0, 16], not {self.width!r}.")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout of {here} must lie in [0, 1), not {self.dropout!r}.")

    def options(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["name"]
        return fields

    def build(self, pick: Callable[[Slot], nn.Module]) -> nn.Module:
        net = self._walked(pick)[1]
        return net

    def _walked(self, pick: Callable[[Slot], nn.Module]) -> tuple[Walk, nn.Module]:
        settings = dict(PRESETS[self.preset])
        without = settings.pop("without")
        settings |= {"sharing": self.sharing, "merged": self.merged}
        walk = Walk(
            pick,
            self.input_size,
            self.classes,
            self.width,
            self.small_images,
            self.kernel,
            self.dropout,
            without,
            settings,
        )
        try:
            net = host(self.host).lay(walk)
        except ValueError as error:
            raise ValueError(
                f"The host {self.host!r} does not fit images of {self.input_size} pixels: {error}"
            ) from None
        return walk, net

    @cached_property
    def _walk(self) -> Walk:
        """What the host is made of. No random number is drawn: a named host is laid out without weights."""
        named = ":" not in self.host
        with torch.device("meta") if named else torch.random.fork_rng(devices=[]):
            return self._walked(lambda slot: nn.Identity())[0]

    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._walk.slots)

    def choices(self) -> tuple[Choice, ...]:
        return tuple(slot.choice for slot in self.slots())

    def fixed_specs(self) -> tuple[OpSpec, ...]:
        return tuple(self._walk.fixed)

    def plain(self) -> nn.Module:
        """The host with one convolution, with a bias, a block: what every folded member's state loads into."""
        return self.build(lambda slot: FAMILIES.get(slot.family).plain(slot))  # type: ignore[attr-defined]


SPACES.add("repnas", RepNASSpace)
