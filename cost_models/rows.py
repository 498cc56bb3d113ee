"""latency.csv: one row per op, checked so that a damaged file is refused and never half believed."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .spec import ROW_FIELDS, OpSpec

FILE = "latency.csv"
COLUMNS = ("table", *ROW_FIELDS, "median_ms", "spread_ms", "repeats_ms")
ADDED = {"squeeze": "0"}  # columns that older tables do not have, and what their rows mean by that
ABSURD_MS = 1e9  # eleven days for one op


@dataclass(frozen=True)
class Row:
    """The latency of one op: all repeats in ms. Median and interquartile range follow from them."""

    spec: OpSpec
    repeats_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.spec.free:
            raise ValueError(f"a {self.spec.kind} op costs 0 by definition and must have no row")
        object.__setattr__(self, "spec", self.spec.deployed)
        if not self.repeats_ms:
            raise ValueError("there is no repeat")
        for value in self.repeats_ms:
            check_ms("a repeat", value)
        rounded = tuple(float(f"{value:.6g}") for value in self.repeats_ms)  # as written: disk and memory agree
        object.__setattr__(self, "repeats_ms", rounded)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.repeats_ms)

    @property
    def spread_ms(self) -> float:
        """Interquartile range."""
        if len(self.repeats_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.repeats_ms, n=4, method="inclusive")
        return high - low


def check_ms(what: str, value: float) -> None:
    """Raise ValueError unless a latency is finite, positive and below 1e9 ms."""
    if not math.isfinite(value) or value <= 0 or value >= ABSURD_MS:
        raise ValueError(f"{what} is {value} ms; a latency must be positive and below {ABSURD_MS:g} ms")


def spread(rows: Iterable[Row]) -> float:
    """Relative spread of a table: the median over rows of interquartile range / median."""
    return statistics.median(row.spread_ms / row.median_ms for row in rows)


def to_csv(rows: Mapping[OpSpec, Row], identity: str) -> str:
    """The content of latency.csv, sorted by spec. `identity` goes into each row, so that files cannot be mixed up."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for spec in sorted(rows):
        row = rows[spec]
        latency = {"median_ms": f"{row.median_ms:.6g}", "spread_ms": f"{row.spread_ms:.6g}"}
        repeats = ";".join(f"{value:.6g}" for value in row.repeats_ms)
        writer.writerow({"table": identity, **spec.to_row(), **latency, "repeats_ms": repeats})
    return text.getvalue()


def read_csv(path: Path, identity: str) -> dict[OpSpec, Row]:
    """Read and check latency.csv.

    Args:
        path: the file.
        identity: what the device.toml beside it says; each row must agree.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything wrong with it; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error
    lines = csv.reader(io.StringIO(text, newline=""))
    rows: dict[OpSpec, Row] = {}
    try:
        columns = _columns(next(lines, []))
        if not text.endswith("\n"):
            last = text.count("\n") + 1
            raise ValueError(f"the file is cut off in line {last}; delete that line and measure again")
        for values in lines:
            row = _parse(values, columns, identity)
            if row.spec in rows:
                raise ValueError(f"the op {row.spec.key} has a row already; delete one of the two")
            rows[row.spec] = row
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(lines.line_num, 1)}: {str(error).rstrip('.')}.") from error
    return rows


def _columns(header: list[str]) -> tuple[str, ...]:
    """The columns of a file, which may lack those that were added later. Raises ValueError for any other header."""
    if tuple(header) in (COLUMNS, tuple(column for column in COLUMNS if column not in ADDED)):
        return tuple(header)
    missing = [column for column in COLUMNS if column not in header and column not in ADDED]
    strange = [column for column in header if column not in COLUMNS]
    detail = (
        f"missing: {', '.join(missing)}" if missing else f"not expected: {', '.join(strange)}" if strange else "order"
    )
    raise ValueError(f"the header is broken ({detail}); it must be {','.join(COLUMNS)}")


def _parse(values: list[str], columns: tuple[str, ...], identity: str) -> Row:
    if len(values) != len(columns):
        raise ValueError(f"there are {len(values)} values for {len(columns)} columns")
    cells = ADDED | dict(zip(columns, values, strict=True))
    if cells["table"] != identity:
        raise ValueError(
            f"the row belongs to the table {cells['table']!r}, but device.toml describes {identity!r}; "
            "rows of different devices or conditions must not be mixed"
        )
    spec = OpSpec.from_row({name: cells[name] for name in ROW_FIELDS})
    row = Row(spec, tuple(_number("repeats_ms", text) for text in cells["repeats_ms"].split(";")))
    median_ms, spread_ms = _number("median_ms", cells["median_ms"]), _number("spread_ms", cells["spread_ms"])
    check_ms("median_ms", median_ms)
    if not 0 <= spread_ms < ABSURD_MS:
        raise ValueError(f"spread_ms is {spread_ms}; it must be 0 or more")
    if not math.isclose(median_ms, row.median_ms, rel_tol=1e-4):
        raise ValueError(f"median_ms is {median_ms:g}, but the median of repeats_ms is {row.median_ms:g}")
    return row


def _number(column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}; it must be a number") from None
