"""An architecture is data: which options were chosen in which space. Everything else is rebuilt from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cost_models.files import write_atomic
from cost_models.names import unknown
from pynas.registry import FAMILIES, SPACES, SearchSpace

VERSION = 1


@dataclass(frozen=True)
class Architecture:
    """The product of a search.

    Args:
        space: Name of a registered search space.
        choices: For every choice of the space the names of the options taken; one name where the choice picks "one".
        options: What the space was made with (input size, classes, width, ...).
        version: Of this format.

    Raises:
        ValueError: If the space does not exist, or choices and options do not fit it.
    """

    space: str
    choices: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"The architecture has format version {self.version!r}; this pynas reads {VERSION}.")
        chosen = {name: tuple(options) for name, options in self.choices.items()}
        object.__setattr__(self, "choices", chosen)
        object.__setattr__(self, "options", dict(self.options))
        self._check(self.search_space())

    def _check(self, space: SearchSpace) -> None:
        wanted = {choice.name: choice for choice in space.choices()}
        for name in self.choices:
            if name not in wanted:
                raise unknown(f"choice of space {self.space!r}", name, wanted)
        for name, choice in wanted.items():
            if name not in self.choices:
                raise ValueError(
                    f"The architecture leaves out {name!r}; space {self.space!r} needs {len(wanted)} choices."
                )
            for option in self.choices[name]:
                if option not in choice.options:
                    raise unknown(f"option of {name!r}", option, choice.options)
            if choice.pick == "one" and len(self.choices[name]) != 1:
                raise ValueError(f"{name!r} takes one option, not {len(self.choices[name])}: {self.choices[name]}.")
            if len(set(self.choices[name])) != len(self.choices[name]):
                raise ValueError(f"{name!r} names an option twice: {self.choices[name]}.")
        # One order of subsets, so that equal architectures have equal texts.
        ordered = {
            name: tuple(option for option in choice.options if option in self.choices[name])
            for name, choice in wanted.items()
        }
        object.__setattr__(self, "choices", ordered)

    def search_space(self) -> SearchSpace:
        """The space that this architecture is a member of."""
        make = SPACES.get(self.space)
        try:
            return make(**self.options)
        except TypeError as error:
            raise ValueError(f"The options {sorted(self.options)} do not fit space {self.space!r}: {error}.") from None

    def build(self) -> nn.Module:
        """A plain network with fresh weights and no search code inside; input (B, 3, H, W), output (B, classes)."""
        space = self.search_space()
        return space.build(lambda slot: FAMILIES.get(slot.family).single(slot, self.choices[slot.choice.name]))

    def with_options(self, **changes: Any) -> Architecture:
        """The same choices in the space with some of its options changed: a deeper network of found cells, say.

        Raises:
            ValueError: If the space has no such option, or the choices do not fit.
        """
        return Architecture(self.space, self.choices, {**self.search_space().options(), **changes})

    def to_json(self) -> str:
        """Canonical JSON: the same architecture gives the same text."""
        content = {
            "space": self.space,
            "choices": {name: list(options) for name, options in self.choices.items()},
            "options": dict(self.options),
            "version": self.version,
        }
        return json.dumps(content, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Architecture:
        """Reads what `to_json` wrote. Raises ValueError when it is anything else."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The architecture is not JSON ({error}). Expected what Architecture.to_json writes."
            ) from None
        fields = {"space", "choices", "options", "version"}
        if not isinstance(content, dict) or set(content) != fields or not isinstance(content["choices"], dict):
            raise ValueError(f"The architecture must be a JSON object with exactly the fields {sorted(fields)}.")
        if not isinstance(content["options"], dict) or not isinstance(content["space"], str):
            raise ValueError("In an architecture, 'space' is a name and 'options' is an object.")
        for name, options in content["choices"].items():
            if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
                raise ValueError(
                    f"In an architecture, every choice is a list of option names; {name!r} is {options!r}."
                )
        return Architecture(**content)

    def save(self, path: str | Path) -> Path:
        """Writes the JSON atomically and returns the path."""
        write_atomic(Path(path), self.to_json() + "\n")
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> Architecture:
        """Reads a file written by `save`. Raises ValueError naming the file when it is broken."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no architecture file {path}.")
        try:
            return Architecture.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for this architecture."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        chosen = " ".join("+".join(options) or "-" for options in self.choices.values())
        return f"{self.space}[{chosen}]"
