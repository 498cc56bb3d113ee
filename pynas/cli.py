"""The functions of `pynas.api` as commands: flags, help, YAML configs and errors, all from their signatures."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Literal

from jsonargparse import ArgumentError, auto_cli

import cost_models
from pynas import api
from pynas.console import Show
from pynas.export import FORMATS
from pynas.info import info
from pynas.published import PUBLISHED
from pynas.registry import FAMILIES, SPACES, STRATEGIES


def list_names(what: Literal["spaces", "strategies", "devices", "formats", "published", "ops"]) -> None:
    """Lists what can be named.

    Args:
        what: Kind of thing.
    """
    show = Show()
    if what == "devices":
        rows = [(device.name, device.source, device.description) for device in cost_models.devices()]
        show.table("devices", ("name", "source", "description"), rows)
        return
    if what == "ops":
        rows = [(name, "family", type(family).__name__) for name, family in FAMILIES.items()]
        rows += [(name, "option", str(choice)) for name, choice in _options()]
        show.table("ops", ("name", "kind", "what"), rows)
        return
    registries: dict[str, Any] = {
        "spaces": SPACES,
        "strategies": STRATEGIES,
        "formats": FORMATS,
        "published": PUBLISHED,
    }
    for name in registries[what].names():
        show.line(name)


def _options() -> list[tuple[str, object]]:
    from pynas.ops.mbconv import OPTIONS

    return list(OPTIONS.items())


COMMANDS: dict[str, Any] = {
    "search": api.search,
    "retrain": api.retrain,
    "evaluate": api.evaluate,
    "export": api.export,
    "measure": api.measure,
    "list": list_names,
    "info": info,
}


def main(args: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for an error that the user can mend, 130 after Ctrl-C."""
    given = sys.argv[1:] if args is None else args
    try:
        auto_cli(COMMANDS, args=_named_strategy(given), prog="pynas", exit_on_error=False)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{str(stop) or 'Stopped.'}\n")
        return 130
    except ArgumentError as error:
        sys.stderr.write(f"pynas: error: {_misuse(str(error), given)}\n")
        return 2
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("PYNAS_DEBUG"):
            raise
        sys.stderr.write(f"pynas: error: {_sentence(error)}\n")
        return 1
    return 0


def _misuse(text: str, given: list[str]) -> str:
    """One sentence for what the parser says in many lines."""
    command = given[0] if given and given[0] in COMMANDS else ""
    see = f"See: pynas {command} --help" if command else f"Commands: {', '.join(COMMANDS)}."
    keys = re.findall(r'Parser key "([^"]+)"', text)
    values = re.findall(r"Got value: (.*)", text) or re.findall(r"Given value: (.*)", text)
    if not keys or not values:
        return f"{text.splitlines()[0].removeprefix('error: ').rstrip('.')}. {see}"
    kinds = re.findall(r"Expected a (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])", text)
    allowed = " or ".join(dict.fromkeys((name or literal).replace("NoneType", "null") for name, literal in kinds))
    return f"--{'.'.join(keys)} cannot be {values[0].strip()!r}; expected {allowed}. {see}"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _named_strategy(args: list[str]) -> list[str]:
    """Lets `--strategy NAME --strategy.field value` use registry names and presets, where the parser wants a class."""
    flat = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if not any(arg.startswith("--strategy.") and arg != "--strategy.help" for arg in flat):
        return args
    name = flat[flat.index("--strategy") + 1] if "--strategy" in flat else "fbnet"
    preset = flat[flat.index("--preset") + 1] if "--preset" in flat else "quick"
    if name not in STRATEGIES:
        return args
    cls = STRATEGIES.get(name)
    rest: list[str] = []
    skip = False
    for arg in args:
        if skip or arg in ("--strategy", "--preset"):
            skip = not skip
        elif not arg.startswith(("--strategy=", "--preset=")):
            rest.append(arg)
    named = [arg.removeprefix("--strategy.") for arg in flat if arg.startswith("--strategy.")]
    fields = cls.preset_values(preset, named)
    filled = [f"--strategy.{field}={value}" for field, value in fields.items()]
    filled += [
        f"--strategy.{key}={flat[flat.index(f'--{key}') + 1]}" for key in ("epochs", "batch_size") if f"--{key}" in flat
    ]
    return [rest[0], f"--strategy={cls.__module__}.{cls.__qualname__}", *filled, *rest[1:]]
