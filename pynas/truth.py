"""Tables of networks that were trained alone: the truth that a ranking is compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynas.architecture import Architecture

MACRO_LAYERS, MACRO_OPTIONS = 8, 3
FIELDS = ("test_acc", "params", "flops")


@dataclass(frozen=True)
class Truth:
    """Accuracies of networks trained alone, and what they cost.

    A key holds one digit for each choice of the space: the index of the option taken.

    Args:
        name: What the table is, in words.
        space: Name of the search space whose members it holds.
        accuracy: Mean test accuracy over seeds by key, between 0 and 1.
        seeds: Test accuracy of every training by key.
        params: Parameters by key.
        macs: Multiply-adds by key.
    """

    name: str
    space: str
    accuracy: Mapping[str, float]
    seeds: Mapping[str, tuple[float, ...]]
    params: Mapping[str, int]
    macs: Mapping[str, int]

    def key(self, architecture: Architecture) -> str:
        """Where an architecture stands in the table. Raises ValueError when it is a member of another space."""
        if architecture.space != self.space:
            raise ValueError(
                f"The truth ({self.name}) holds networks of space {self.space!r}, not of {architecture.space!r}. Give "
                "a table of that space, or networks of it that were trained alone."
            )
        chosen = architecture.choices
        choices = architecture.search_space().choices()
        return "".join(str(choice.options.index(chosen[choice.name][0])) for choice in choices)


def read_truth(path: str | Path, *, space: str = "macro", options: Sequence[int] | None = None) -> Truth:
    """Reads a table in the format of NAS-Bench-Macro (Su et al., CVPR 2021), 6,561 networks of 8 layers.

    The file is a JSON object: by key `test_acc` (accuracy of each seed in percent), `params` and `flops` (multiply-adds
    of convolutions and classifier). Keys that denote the same network hold equal rows. Other fields are ignored.

    Args:
        path: Of the JSON.
        space: Whose table it is said to be.
        options: Number of options of every choice, at most 10; 8 times 3 by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table, or the table of another space.
    """
    path = Path(path)
    sizes = tuple(options) if options is not None else (MACRO_OPTIONS,) * MACRO_LAYERS
    if not path.is_file():
        raise FileNotFoundError(f"There is no truth table {path}. Give the JSON of NAS-Bench-Macro, or one like it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Give the JSON of NAS-Bench-Macro, or one like it.") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a JSON object with a row for each network, by key.")
    for key, row in content.items():
        _check_key(path, key, sizes, space)
        _check_row(path, key, row)
    seeds = {key: tuple(value / 100 for value in row["test_acc"]) for key, row in content.items()}
    return Truth(
        f"{path.name}, {len(content):,} networks",
        space,
        {key: math.fsum(values) / len(values) for key, values in seeds.items()},
        seeds,
        {key: row["params"] for key, row in content.items()},
        {key: row["flops"] for key, row in content.items()},
    )


def _check_key(path: Path, key: str, sizes: tuple[int, ...], space: str) -> None:
    other = f"It looks like the table of another space than {space!r}. Without a table: rank(run, run.trained)."
    if len(key) != len(sizes) or not (key.isascii() and key.isdigit()):
        raise ValueError(f"{path}: a key must be {len(sizes)} digits, one for each choice, but one is {key!r}. {other}")
    for place, (digit, size) in enumerate(zip(key, sizes, strict=True), 1):
        if int(digit) >= size:
            raise ValueError(
                f"{path}: key {key!r} takes option {digit} at choice {place}, which has {size}, counted from 0. {other}"
            )


def _check_row(path: Path, key: str, row: Any) -> None:
    if not isinstance(row, dict) or any(field not in row for field in FIELDS):
        raise ValueError(f"{path}: row {key!r} must be an object with {', '.join(FIELDS)}.")
    accuracies = row["test_acc"]
    fine = isinstance(accuracies, list) and accuracies and all(_number(value, 0, 100) for value in accuracies)
    if not fine:
        raise ValueError(f"{path}: test_acc of row {key!r} must be a list of percentages, not {accuracies!r}.")
    for field in ("params", "flops"):
        if isinstance(row[field], bool) or not isinstance(row[field], int) or row[field] < 0:
            raise ValueError(f"{path}: {field} of row {key!r} must be a whole number, not {row[field]!r}.")


def _number(value: Any, low: float, high: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high
