"""What a person sees while a command runs: lines, tables and progress on stderr, data on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

from converter.reporting import Reporter, Task, Unseen


class Console(Reporter):
    """Shows messages on stderr.

    Args:
        quiet: show warnings and errors only.
        verbose: show details as well.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._console = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        if not self.quiet:
            self._print(text, markup=False)

    def detail(self, text: str) -> None:
        if self.verbose:
            self._print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self._print(f"Warning: {text}", style="yellow", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.quiet:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._print(table, soft_wrap=False)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        shown = None
        with self._while_it_works():
            if self._console.is_terminal and not self.quiet:
                shown = _RichTask(self, description, total)
            else:
                self.line(f"{description} …")
        try:
            yield shown or Unseen()
        finally:
            if shown:
                shown.stop()

    def _print(self, content: Table | str, **options: Any) -> None:
        with self._while_it_works():
            self._console.print(content, **options)

    @contextmanager
    def _while_it_works(self) -> Iterator[None]:
        """Fall silent once the terminal fails: a run of hours does not end because nobody reads along."""
        try:
            yield
        except Exception:
            self._console.quiet = True


class _RichTask:
    def __init__(self, console: Console, description: str, total: float) -> None:
        self._while_it_works = console._while_it_works
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console._console,
        )
        self._id = self._progress.add_task(description, total=total)
        self._progress.start()

    def advance(self, amount: float = 1) -> None:
        with self._while_it_works():
            self._progress.advance(self._id, amount)

    def describe(self, text: str) -> None:
        with self._while_it_works():
            self._progress.update(self._id, description=text)

    def stop(self) -> None:
        with self._while_it_works():
            self._progress.stop()
