"""The interface for messages, tables and progress. The base class shows nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from converter.errors import redacted_message

# Control characters that move a terminal's cursor or change its colours or direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from a file or server for a terminal: control characters are escaped."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


class Task:
    """One lasting step, which the base class does not show."""

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

    def agrees(self, question: str) -> bool:
        """Ask the user; False where nobody can answer."""
        return False

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are figures."""

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """Show progress with the remaining time while the block runs.

        Args:
            total: what :meth:`Task.advance` adds up to, in any unit.
        """
        yield Task()


SILENT = Reporter()


@contextmanager
def optional_step(lost: str, reporter: Reporter) -> Iterator[None]:
    """Turn any exception of the block into a warning: a run goes on without a picture or a cache.

    Args:
        lost: a sentence on what is missing then, without a full stop.
    """
    try:
        yield
    except Exception as error:
        reporter.warn(f"{lost}: {redacted_message(error)}")
