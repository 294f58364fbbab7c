"""What a person sees while a command runs: lines, tables and progress on stderr, data on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
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
from rich.text import Text

from converter.reporting import Reporter, Task, printable

_UNLIMITED = 100_000
LINE_SECONDS = 30.0
"""Seconds between two lines of progress where the output is no terminal."""


class Console(Reporter):
    """Shows messages on stderr, or a command's answer on stdout.

    Args:
        quiet: show warnings and errors only.
        verbose: show details as well.
        stdout: write there, and without a limit of width where no terminal is.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, *, stdout: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._is_answer = stdout
        width = _UNLIMITED if stdout and not sys.stdout.isatty() else None
        self._console = RichConsole(stderr=not stdout, highlight=False, soft_wrap=True, width=width)

    def line(self, text: str) -> None:
        if not self.quiet:
            self._print(printable(text), markup=False)

    def detail(self, text: str) -> None:
        if self.verbose:
            self._print(printable(text), style="dim", markup=False)

    def warn(self, text: str) -> None:
        self._print(printable(f"Warning: {text}"), style="yellow", markup=False)

    def agrees(self, question: str) -> bool:
        is_there = sys.stdin is not None and sys.stdin.isatty() and self._console.is_terminal
        return is_there and typer.confirm(printable(question), err=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.quiet:
            return
        # As Text, since a plain string's brackets are read as markup.
        table = Table(title=Text(printable(title)) if title else None, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._print(table, soft_wrap=False)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        shown: _RichTask | _LineTask = _LineTask(self, description, total)
        if self._console.is_terminal and not self.quiet:
            with self._while_it_works():
                shown = _RichTask(self, description, total)
        else:
            self.line(f"{description} …")
        try:
            yield shown
        finally:
            shown.stop()

    def _print(self, content: Table | str, **options: Any) -> None:
        with self._while_it_works():
            self._console.print(content, **options)

    @contextmanager
    def _while_it_works(self) -> Iterator[None]:
        """Show nothing more once the terminal fails: that must not end a run of hours."""
        try:
            yield
        except Exception:
            if self._is_answer:
                raise
            self._console.quiet = True


class _LineTask(Task):
    """A task whose output goes to a file or a pipe: a line every half minute."""

    def __init__(self, console: Console, description: str, total: float) -> None:
        self._console, self._description, self._total, self._done = console, description, total, 0.0
        self._started = self._told = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS and self._done:
            self._told = now
            left = (now - self._started) * max(0.0, self._total / self._done - 1)
            self._console.line(
                f"{self._description}: {self._done:.0f} of {self._total:.0f}, about {left:.0f} s left"
            )

    def describe(self, text: str) -> None:
        self._description = text

    def stop(self) -> None:
        pass


class _RichTask(Task):
    def __init__(self, console: Console, description: str, total: float) -> None:
        self._while_it_works = console._while_it_works
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console._console,
        )
        self._id = self._progress.add_task(printable(description), total=total)
        self._progress.start()

    def advance(self, amount: float = 1) -> None:
        with self._while_it_works():
            self._progress.advance(self._id, amount)

    def describe(self, text: str) -> None:
        with self._while_it_works():
            self._progress.update(self._id, description=printable(text))

    def stop(self) -> None:
        with self._while_it_works():
            self._progress.stop()
