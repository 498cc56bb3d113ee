"""What a report is made of: sections with pictures and tables. Everything is text until the page escapes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NARROW, HALF, WHOLE = 322.0, 490.0, 1008.0  # widths of pictures in pixels: on a phone, half a page, a whole page


class Absent(ValueError):
    """A part of the report that a run has no data for; the message says why, as it reads after the part's title."""


@dataclass(frozen=True)
class Table:
    """Numbers as text.

    Args:
        columns: Heads.
        rows: Cells; the first of each row names it.
        note: Under the table.
        prose: Whether cells hold sentences, so that phones stack them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with its words and numbers.

    Args:
        title: Over it.
        alt: What it shows, for those who do not see it; names the main number.
        draw: Draws it at a width in pixels: `NARROW`, and `HALF` or `WHOLE`.
        table: Its numbers.
        caption: Under it.
        whole: Whether it needs the whole width of the page.
    """

    title: str
    alt: str
    draw: Callable[[float], Figure]
    table: Table
    caption: str = ""
    whole: bool = False


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page.

    Args:
        name: What it is.
        value: With its unit.
        told: A few words on where it comes from.
    """

    name: str
    value: str
    told: str = ""


@dataclass(frozen=True)
class Listing:
    """A table that stands open; without a title where the section says enough."""

    title: str
    table: Table


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    title: str
    text: str


@dataclass(frozen=True)
class Image:
    """A picture that another command left as PNG."""

    title: str
    alt: str
    png: bytes


Part = Picture | Listing | Words | Code | Image


@dataclass(frozen=True)
class Section:
    """A part of the page, with what it shows in order."""

    key: str
    title: str
    parts: Sequence[Part]


def number(value: object, form: str = ".4g") -> str:
    """A number as it stands in a table; a dash for none."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def percent(value: float | None) -> str:
    """A share as a percentage; a dash for none."""
    return "–" if value is None else f"{value:.2%}"
