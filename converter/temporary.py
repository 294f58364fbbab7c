"""Lock files, temporary folders that hold one, and the folder in the user's cache for what a failed run would lose.

A lock is held by a running process, and released however it ends. The next run removes the temporary folders of
killed ones.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from converter.disk import full_disk_named
from converter.errors import OutputError, system_errors
from converter.interruption import undisturbed
from converter.reporting import SILENT, Reporter

_LOCK = ".mmod-lock"


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


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new empty folder in TMPDIR that is gone when the block ends.

    Raises:
        OutputError: there is no place for one.
    """
    fix = "Set TMPDIR to a folder that can be written to."
    with system_errors("There is no place for a temporary folder", OutputError, fix):
        parent = Path(tempfile.gettempdir())
    _clear(parent)
    fix = "Free some space, or set TMPDIR to a folder on another disk."
    with full_disk_named(parent, fix), ExitStack() as stack:
        folder = _locked_name(parent, stack)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            with undisturbed():
                shutil.rmtree(folder, ignore_errors=True)


def _locked_name(parent: Path, stack: ExitStack) -> Path:
    """A name that is free, whose lock is held until the stack closes."""
    while True:
        folder = parent / f"mmod-{secrets.token_hex(8)}"
        # Another run may clear the lock's file away before it is locked.
        with suppress(Held):
            stack.enter_context(lock(Path(f"{folder}{_LOCK}"), SILENT))
            return folder


def _clear(parent: Path) -> None:
    """Remove the folders of runs that were killed: those whose lock is free."""
    for path in parent.glob(f"mmod-*{_LOCK}"):
        # Another run's, or another user's.
        with suppress(Held, OSError), lock(path, SILENT) as is_locked:
            if is_locked:
                shutil.rmtree(str(path).removesuffix(_LOCK), ignore_errors=True)


def cache_folder() -> Path:
    """The folder in the user's cache, which need not be there yet."""
    home = os.path.expanduser("~")
    # A user whom the system does not know, as in a container, may have no home.
    cache = os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir() if home == "~" else home, ".cache")
    return Path(cache, "mmod-convert")
