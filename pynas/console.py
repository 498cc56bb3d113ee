"""What a person sees while pynas works: progress with time left on stderr, tables on stdout."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class Show:
    """Prints lines, tables and progress bars.

    Args:
        quiet: Prints nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out = Console(quiet=quiet, highlight=False)
        self.err = Console(quiet=quiet, stderr=True, highlight=False)

    def line(self, text: str) -> None:
        """A line on stdout, broken by the terminal alone."""
        self.out.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """What must not be missed: in red on stderr; where nothing is printed, a Python warning."""
        if self.quiet:
            warnings.warn(text, stacklevel=3)
        self.err.print(f"WARNING: {text}", style="bold red", markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        """A table on stdout."""
        table = Table(
            title=title, title_justify="left", title_style="bold", caption=note or None, caption_justify="left"
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """Progress on stderr for `total` steps: a bar in a terminal, a line at every quarter elsewhere."""
        if not self.err.is_terminal:
            yield Lines(title, total, self.err)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.err) as progress:
            yield Live(progress, progress.add_task(title, total=max(1, total), text=""))


class Bar(Protocol):
    """Something that is told how far a piece of work has come."""

    def advance(self, text: str) -> None:
        """One step further, with a few words on how it goes."""

    def report(self, done: int, total: int, seconds_left: float) -> None:
        """Where a measurement stands."""


class Live:
    """A bar that moves."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, text: str) -> None:
        self._progress.update(self._task, advance=1, text=text)

    def report(self, done: int, total: int, seconds_left: float) -> None:
        self._progress.update(self._task, completed=done, total=total)


class Lines:
    """A line at every quarter, for logs."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self._title, self._total, self._console = title, max(1, total), console
        self._done = self._quarters = self._before = 0
        self._began = time.monotonic()

    def advance(self, text: str) -> None:
        self._before += text == "resumed"  # was done before, so it says nothing of the time that the rest takes
        fresh = self._done + 1 - self._before
        if fresh > 0 and self._done + 1 < self._total:
            seconds = (time.monotonic() - self._began) / fresh * (self._total - self._done - 1)
            text = f"{text}  {seconds:.0f} s left"
        self._show(self._done + 1, self._total, text)

    def report(self, done: int, total: int, seconds_left: float) -> None:
        self._show(done, total, f"{seconds_left:.0f} s left")

    def _show(self, done: int, total: int, text: str) -> None:
        self._done = done
        if 4 * done // total > self._quarters:  # a measurement may step back to take a repeat again
            self._quarters = 4 * done // total
            seconds = time.monotonic() - self._began
            self._console.print(f"{self._title}: {done}/{total} after {seconds:.0f} s  {text}", markup=False)
