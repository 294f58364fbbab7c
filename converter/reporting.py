"""How the rooms speak to whoever runs them: lines, tables and progress, shown by nobody unless a subclass does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from converter.errors import words_of

# All that moves a terminal's cursor, colours or order of letters; a tab and a new line do no harm.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from a file or a server as a terminal may be given it: control characters by their numbers."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


class Task(Protocol):
    """One lasting step that is being shown."""

    def advance(self, amount: float = 1) -> None:
        """Say that ``amount`` more of the total is done."""

    def describe(self, text: str) -> None:
        """Change the text beside the bar."""


class Reporter:
    """Takes messages and shows none; :class:`converter.commands.console.Console` shows them on a terminal.

    Attributes:
        quiet: whether only warnings and errors are wanted.
        verbose: whether details are wanted, where making them costs time.
    """

    quiet = True
    verbose = False

    def line(self, text: str) -> None:
        """One line of information."""

    def detail(self, text: str) -> None:
        """One line for ``--verbose``."""

    def warn(self, text: str) -> None:
        """One line that ``--quiet`` shows too."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are figures."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Show progress with the remaining time while the block runs.

        Args:
            total: what :meth:`Task.advance` adds up to, in any unit.
        """
        yield Unseen()


@contextmanager
def dispensable(lost: str, reporter: Reporter) -> Iterator[None]:
    """Let the block fail for whatever reason, with a warning: a run goes on without a picture or a cache.

    Args:
        lost: the sentence that says what there will not be, without a full stop.
    """
    try:
        yield
    except Exception as error:
        reporter.warn(f"{lost}: {words_of(error)}")


class Unseen:
    """A step that nobody is shown."""

    def advance(self, amount: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass
