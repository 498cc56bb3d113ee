"""Whole networks of a space: their ops in order, and files of (architecture, latency) that users bring."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cost_models.rows import check_ms
from cost_models.spec import OpSpec
from pynas.architecture import Architecture
from pynas.registry import SearchSpace, Vanishing
from pynas.supernet import deployed_specs

COLUMNS = ("architecture", "latency_ms")
BETWEEN = re.compile(r"[\s,;-]+")
EXAMPLE = "a line of the file is, for instance: k3_e6 skip k5_e3 ...,12.34"


@dataclass(frozen=True)
class TimedNet:
    """One line of a file of timed networks."""

    architecture: Architecture
    latency_ms: float


def net_specs(space: SearchSpace, architecture: Architecture) -> tuple[OpSpec, ...]:
    """Ops of a network as it is deployed: those of its slots in order, skip ops included, then all others.

    Without those that vanished, in a space where some can.
    """
    if isinstance(space, Vanishing):
        return space.net_specs(architecture.choices)
    chosen = [spec for slot in space.slots() for spec in deployed_specs(slot, architecture.choices[slot.choice.name])]
    return (*chosen, *space.fixed_specs())


def random_nets(space: SearchSpace, count: int, seed: int) -> list[Architecture]:
    """Different architectures, every option of every choice with the same probability.

    Raises:
        ValueError: The space has fewer.
    """
    random = np.random.default_rng(seed)
    choices, options = space.choices(), space.options()
    found: dict[str, Architecture] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        picked = {choice.name: (choice.options[random.integers(len(choice.options))],) for choice in choices}
        architecture = Architecture(space.name, picked, options)
        found.setdefault(architecture.fingerprint, architecture)
    if len(found) < count:
        raise ValueError(f"Space {space.name!r} gave only {len(found)} different networks of {count}. Ask for fewer.")
    return list(found.values())


def read_timed_nets(space: SearchSpace, path: str | Path) -> list[TimedNet]:
    """Reads a CSV file with the columns `architecture` and `latency_ms`; others are ignored.

    An architecture is the options in the order of the space's choices, joined by spaces, commas, semicolons or "-"
    (with commas in quotes); or its JSON; or the path of a JSON file, from the folder of the CSV file. Lines should be
    in the order in which the networks were timed; the same network may come several times.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Anything wrong with it; the message names file and line.
    """
    where = Path(path)
    if not where.is_file():
        raise FileNotFoundError(f"There is no file {where}.")
    try:
        text = where.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not a text file: {error}.") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    nets: list[TimedNet] = []
    try:
        header = [name.strip() for name in next(lines, [])]
        _check_header(header)
        nets += [_parse(space, header, values, where.parent) for values in lines if any(map(str.strip, values))]
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{where}, line {max(lines.line_num, 1)}: {str(error).rstrip('.')}.") from error
    if not nets:
        raise ValueError(f"{where} has no network after its header; {EXAMPLE}.")
    return nets


def _check_header(header: list[str]) -> None:
    for name in COLUMNS:
        if header.count(name) != 1:
            how = "lacks" if name not in header else "repeats"
            raise ValueError(f"the header {how} the column {name!r}; it must name architecture and latency_ms")


def _parse(space: SearchSpace, header: Sequence[str], values: Sequence[str], folder: Path) -> TimedNet:
    if len(values) != len(header):
        raise ValueError(
            f"there are {len(values)} values for {len(header)} columns; put quotes around text with commas, and write "
            "decimals with a point"
        )
    cells = {name: value.strip() for name, value in zip(header, values, strict=True)}
    if not cells["architecture"]:
        raise ValueError("the architecture is empty")
    try:
        latency_ms = float(cells["latency_ms"])
    except ValueError:
        raise ValueError(f"latency_ms is {cells['latency_ms']!r}; it must be a number of milliseconds") from None
    check_ms("latency_ms", latency_ms)
    return TimedNet(parse_architecture(space, cells["architecture"], folder), latency_ms)


def parse_architecture(space: SearchSpace, text: str, folder: Path) -> Architecture:
    """An architecture of `space` from JSON, from the path of a JSON file, or from its options in order.

    Args:
        space: That it must be a member of.
        text: One of the three.
        folder: Where relative paths start.

    Raises:
        ValueError: It is none of them, or belongs to another space.
        FileNotFoundError: There is no such JSON file.
    """
    if text.startswith("{"):
        architecture = Architecture.from_json(text)
    elif text.endswith(".json"):
        architecture = Architecture.load(folder / text)
    else:
        return _from_options(space, text)
    if architecture.space != space.name or architecture.options != dict(space.options()):
        raise ValueError(
            f"the architecture belongs to the space {architecture.space!r} with other options than asked for "
            f"({space.name!r}, {dict(space.options())})"
            if architecture.space == space.name
            else f"the architecture belongs to the space {architecture.space!r}, not to {space.name!r}"
        )
    return architecture


def _from_options(space: SearchSpace, text: str) -> Architecture:
    inside = re.fullmatch(rf"{re.escape(space.name)}\[(.*)\]", text)  # as str(Architecture) writes it
    names = [name for name in BETWEEN.split(inside[1] if inside else text) if name]
    choices = space.choices()
    if len(names) != len(choices):
        raise ValueError(
            f"the architecture names {len(names)} options; space {space.name!r} has {len(choices)} choices"
        )
    picked = {choice.name: tuple(name.split("+")) for choice, name in zip(choices, names, strict=True)}
    return Architecture(space.name, picked, space.options())
