"""The functions of the front door as commands: flags, help, YAML configs and errors, all from their signatures."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, auto_cli

import cost_models
from pynas import api, exporting, measuring, reports
from pynas.compare import compare
from pynas.console import Show
from pynas.deploy import deploy
from pynas.export import FORMATS
from pynas.info import info
from pynas.published import PUBLISHED
from pynas.registry import FAMILIES, SPACES, STRATEGIES
from pynas.report.listing import runs
from pynas.report.page import report
from pynas.settings import usual_strategy
from pynas.spaces.hosts import HOSTS
from pynas.tuning import tune


def list_names(what: Literal["spaces", "strategies", "hosts", "devices", "formats", "published", "ops"]) -> None:
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
        "hosts": HOSTS,
        "strategies": STRATEGIES,
        "formats": FORMATS,
        "published": PUBLISHED,
    }
    for name in registries[what].names():
        show.line(name)


def _options() -> list[tuple[str, object]]:
    from pynas.ops.branches import BRANCHES
    from pynas.ops.mbconv import OPTIONS

    return [*OPTIONS.items(), *((name, type(kind).__name__) for name, kind in BRANCHES.items())]


def _of_folder(function: Callable[..., Any], kind: Any = str) -> Callable[..., Any]:
    """A function of a run as a command, which can only be given its folder, or several."""

    @functools.wraps(function)
    def command(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    signature = inspect.signature(function, eval_str=True)
    run, *rest = signature.parameters.values()
    command.__signature__ = signature.replace(parameters=[run.replace(annotation=kind), *rest])  # type: ignore[attr-defined]
    del command.__wrapped__  # the parser would read that one's
    return command


COMMANDS: dict[str, Any] = {
    "search": api.search,
    "retrain": _of_folder(api.retrain),
    "evaluate": _of_folder(api.evaluate),
    "export": _of_folder(exporting.export),
    "deploy": _of_folder(deploy),
    "compare": compare,
    "report": _of_folder(report, list[str]),
    "runs": _of_folder(runs),
    "measure": measuring.measure,
    "table": {"_help": "Look at tables, make them.", "check": measuring.check_table, "fit": measuring.fit_table},
    "fairness": reports.fairness,
    "rank": reports.rank_run,
    "draw": reports.draw,
    "kernels": {"_help": "Make GPU kernels fast here.", "tune": tune},
    "list": list_names,
    "info": info,
}


def main(args: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for an error that the user can mend, 130 after Ctrl-C."""
    given = sys.argv[1:] if args is None else args
    try:
        auto_cli(COMMANDS, args=_listed(_named_strategy(given)), prog="pynas", exit_on_error=False)
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
    lacking = re.search(r"arguments are required: (.+)", text)
    if command and lacking:
        names = ", ".join(name.strip().split(".")[-1] for name in lacking[1].split(","))
        return f"pynas {command} needs: {names}. {see}"
    keys = re.findall(r'Parser key "([^"]+)"', text)
    values = re.findall(r"Got value: (.*)", text) or re.findall(r"Given value: (.*)", text)
    if not keys or not values:
        return f"{text.splitlines()[0].removeprefix('error: ').rstrip('.')}. {see}"
    kinds = re.findall(r"Expected a (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])", text)
    words = dict.fromkeys((name or literal).replace("NoneType", "null") for name, literal in kinds)
    if keys[0] == "strategy" and len(keys) + keys[-1].count(".") > 1:
        words.pop("str", None)  # what the strategy itself may be, not its hyper-parameter
    allowed = " or ".join(words)
    return f"--{'.'.join(keys)} cannot be {values[0].strip()!r}; expected {allowed}. {see}"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    lines = str(error).splitlines()
    # A class that refuses its values is quoted by the parser as one of several attempts; its own words say it best.
    own = [line.strip()[2:] for line in lines if line.strip().startswith("- ") and "- Expected a" not in line]
    return own[0] if len(lines) > 1 and own else " ".join(lines)


def _named_strategy(args: list[str]) -> list[str]:
    """Lets `--strategy NAME --strategy.field value` use registry names and presets, where the parser wants a class."""
    changed = [arg.removeprefix("--strategy.").split("=")[0] for arg in args if arg.startswith("--strategy.")]
    if not changed or "help" in changed:
        return args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--strategy", "--preset", "--config", "--epochs", "--batch_size"):
        parser.add_argument(flag)
    asked_space = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked_space.add_argument("--space")
    try:
        asked, rest = parser.parse_known_args(args)
    except argparse.ArgumentError:
        return args  # a flag without its value; the real parser says so
    name = asked.strategy or _named_in(asked.config, "strategy") or "auto"
    if name == "auto":
        space = asked_space.parse_known_args(rest)[0].space or _named_in(asked.config, "space")
        name = usual_strategy(space, {}) if space is not None and space in SPACES else "fbnet"
    if name not in STRATEGIES:
        return args
    cls = STRATEGIES.get(name)
    values = dict(cls.preset_values(asked.preset or "quick", changed))
    values |= {key: vars(asked)[key] for key in ("epochs", "batch_size") if vars(asked)[key] is not None}
    config = [f"--config={asked.config}"] if asked.config else []
    filled = [f"--strategy.{field}={value}" for field, value in values.items()]
    for field, value in cls.SPACE_OPTIONS.get(asked.preset, {}).items():
        filled.append(f"--space_options.{field}={value if isinstance(value, str) else json.dumps(value)}")
    return [rest[0], *config, f"--strategy={cls.__module__}.{cls.__qualname__}", *filled, *rest[1:]]


def _listed(args: list[str]) -> list[str]:
    """Lets `pynas report RUN RUN` name several runs, where the parser wants one list, and `pynas runs FOLDER` a folder,
    where it wants a flag."""
    if args[:1] == ["runs"] and len(args) > 1 and not args[1].startswith("-"):
        return [args[0], "--folder", *args[1:]]
    if args[:1] not in (["fairness"], ["report"]):
        return args
    flagged = {place for place, arg in enumerate(args) if arg.startswith("-")}
    flagged |= {place + 1 for place in flagged if "=" not in args[place]}  # every flag takes a value
    runs = [arg for place, arg in enumerate(args) if place > 0 and place not in flagged]
    rest = [arg for place, arg in enumerate(args) if place in flagged]
    return [args[0], json.dumps(runs), *rest] if runs else args


def _named_in(config: str | None, key: str) -> str | None:
    """What a configuration file names; "described" for a strategy that it gives in full, which stays as it is."""
    if config is None or not Path(config).is_file():
        return None
    content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, str) or found is None else "described"
