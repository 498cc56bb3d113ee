"""What a person sees while pynas works: progress with time left on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
        """A progress bar on stderr for `total` steps."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.err, transient=not self.err.is_terminal) as progress:
            yield Bar(progress, progress.add_task(title, total=max(1, total), text=""))


class Bar:
    """One running progress bar."""

    def __init__(self, progress: Progress, task: object) -> None:
        self._progress = progress
        self._task = task

    def advance(self, text: str) -> None:
        """One step further, with a few words on how it goes."""
        self._progress.update(self._task, advance=1, text=text)  # type: ignore[arg-type]

    def report(self, done: int, total: int, seconds_left: float) -> None:
        """Where a measurement stands."""
        self._progress.update(self._task, completed=done, total=total, text="")  # type: ignore[arg-type]
