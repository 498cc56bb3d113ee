"""Names that users type, mapped to the things they mean."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import nn

from cost_models.names import unknown
from cost_models.spec import OpSpec
from pynas.choices import Choice, Slot

T = TypeVar("T")


class MissingExtra(ImportError):
    """A feature needs a package that is not installed.

    Args:
        feature: What the user asked for, as it reads in a sentence.
        package: What to give to pip.
    """

    def __init__(self, feature: str, package: str) -> None:
        names = " ".join(map(shlex.quote, package.split()))
        super().__init__(f"{feature} needs the package {package}: pip install {names}")


class Registry(Generic[T]):
    """Maps names to things of one kind, and answers a wrong name with a suggestion.

    Args:
        kind: What is registered, in the singular, as it reads in an error ("space", "strategy").
        see: What an error tells to do; by default the command that lists all names.

    >>> colours: Registry[int] = Registry("colour")
    >>> colours.add("red", 1)
    1
    >>> colours.names()
    ('red',)
    """

    def __init__(self, kind: str, see: str = "") -> None:
        self.kind = kind
        plural = {"strategy": "strategies"}.get(kind, f"{kind}s")
        self.see = see or f"See: pynas list {plural}"
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Registers `thing` and returns it. Raises ValueError when the name is taken."""
        if name in self._things:
            raise ValueError(f"The {self.kind} {name!r} is registered already. Choose another name.")
        self._things[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """The same as a decorator."""
        return lambda thing: self.add(name, thing)

    def get(self, name: str) -> T:
        """The thing of that name. Raises ValueError with what is allowed and the nearest name."""
        if name not in self._things:
            raise unknown(self.kind, name, self._things, self.see)
        return self._things[name]

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._things)

    def items(self) -> Iterator[tuple[str, T]]:
        """Pairs of name and thing."""
        return iter(self._things.items())

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


class Family(Protocol):
    """Owns the options of a slot: how all of them run in a supernet, and how the chosen one is built."""

    def mixed(self, slot: Slot) -> nn.Module:
        """All options of the slot; `forward(x, gates)` and `single_state(names)`."""

    def single(self, slot: Slot, names: tuple[str, ...]) -> nn.Module:
        """The chosen op alone: one name, or a set of names where the choice picks "any"."""

    def spec(self, slot: Slot, name: str) -> OpSpec:
        """What the option costs at this slot is asked by this spec."""


class SearchSpace(Protocol):
    """Lays out a network around slots; the same code builds supernet and found net."""

    @property
    def name(self) -> str: ...

    @property
    def input_size(self) -> int:
        """Height and width of the input image, in pixels."""

    @property
    def classes(self) -> int: ...

    def options(self) -> Mapping[str, Any]:
        """What `SPACES.get(name)(**options)` needs to rebuild this very space; plain JSON values."""

    def slots(self) -> tuple[Slot, ...]: ...

    def choices(self) -> tuple[Choice, ...]:
        """The distinct choices of the slots, in order."""

    def build(self, pick: Callable[[Slot], nn.Module]) -> nn.Module:
        """The whole network, with `pick(slot)` at every slot."""

    def fixed_specs(self) -> tuple[OpSpec, ...]:
        """Specs of everything outside the slots: stem, head."""


@runtime_checkable
class Vanishing(Protocol):
    """A space with options that let more of the network vanish than themselves.

    Its networks have `inherited(state)`: what of the supernet's state is theirs, sliced where what they read vanished.
    """

    def net_specs(self, choices: Mapping[str, tuple[str, ...]]) -> tuple[OpSpec, ...]:
        """Ops of the network that takes these choices, as it is built."""

    def sliced_specs(self) -> tuple[OpSpec, ...]:
        """What ops outside the slots become where what they read vanishes."""


# The registries live here, below everything that fills them, so that an Architecture can find its space
# without importing upward. Importing `pynas` fills them.
FAMILIES: Registry[Family] = Registry("family")
SPACES: Registry[Callable[..., SearchSpace]] = Registry("space")
STRATEGIES: Registry[type[Any]] = Registry("strategy")
