"""What a person sees while a command runs: lines, tables and progress on stderr, data on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from converter.reporting import Reporter, Task


class Console(Reporter):
    """Shows messages on stderr.

    Args:
        quiet: show warnings and errors only.
        verbose: show details as well.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._console = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        if not self.quiet:
            self._console.print(text, markup=False)

    def detail(self, text: str) -> None:
        if self.verbose:
            self._console.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"Warning: {text}", style="yellow", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.quiet:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table, soft_wrap=False)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self.quiet or not self._console.is_terminal,
        )
        if not self._console.is_terminal:
            self.line(f"{description} …")
        with progress:
            yield _RichTask(progress, description, total)


class _RichTask:
    def __init__(self, progress: Progress, description: str, total: float) -> None:
        self._progress = progress
        self._id = progress.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._id, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._id, description=text)
