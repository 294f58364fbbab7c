"""Signals: a run ends at once, but never in the middle of cleaning up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 3.0
"""Seconds after a signal in which further ones are ignored, so that they do not interrupt the clean-up."""


class Interrupted(BaseException):
    """A signal asked the run to end. Typer would hide a KeyboardInterrupt.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """The signals of this process, and whether they are deferred."""

    def __init__(self) -> None:
        self.deferring = 0
        self.deferred: int | None = None
        self.patient_until = 0.0

    def arrive(self, number: int, _frame: object) -> None:
        """The handler, which Python runs in the main thread."""
        if time.monotonic() < self.patient_until:
            return
        self.patient_until = time.monotonic() + PATIENCE
        if self.deferring:
            self.deferred = number
        else:
            raise Interrupted(number)


_signals = _Signals()


def end_on_signals() -> None:
    """Have Ctrl-C, a request to end and a closed terminal raise :class:`Interrupted` in the main thread."""
    signal.signal(signal.SIGINT, _signals.arrive)
    signal.signal(signal.SIGTERM, _signals.arrive)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _signals.arrive)


def ignore_signals() -> None:
    """Have the same signals do nothing from now on: the run is over, and its exit code stands."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def interrupt_again(number: int) -> None:
    """Send the signal once more, where the exception was raised in a finalizer and so did not end the run."""
    _signals.patient_until = 0.0
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep a signal that arrives within the block until its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.deferring += 1
    try:
        yield
    finally:
        _signals.deferring -= 1
        if not _signals.deferring and _signals.deferred is not None:
            number, _signals.deferred = _signals.deferred, None
            raise Interrupted(number)
