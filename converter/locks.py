"""Lock files: held by a running process, and released however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.interruption import undisturbed
from converter.reporting import Reporter


class Held(Exception):
    """Another process holds the file."""


@contextmanager
def lock(path: Path, reporter: Reporter) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields False if the file system has no locks.

    Raises:
        Held: another process holds it.
    """
    is_ours = False
    with open(path, "a") as file:
        try:
            with undisturbed():
                is_locked = _take(file.fileno(), path, reporter)
                is_ours = True
            yield is_locked
        finally:
            if is_ours:
                path.unlink(missing_ok=True)


def _take(descriptor: int, path: Path, reporter: Reporter) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Held from error
    except OSError as error:
        reporter.warn(
            f"{path.parent} cannot be locked ({error.strerror}): nothing keeps a second run from the same output."
        )
        return False
    # The process before may have removed the name after this one opened it.
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        raise Held
    return True
