"""Temporary folders; those of killed runs are removed by the next run."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.disk import full_disk_named
from converter.errors import OutputError
from converter.interruption import undisturbed
from converter.locks import Held, lock
from converter.reporting import Reporter

_LOCK = ".mmod-lock"
MEMORY = Path("/dev/shm")


@contextmanager
def temporary_folder(in_memory: int = 0) -> Iterator[Path]:
    """A new empty folder that is gone when the block ends, in TMPDIR or in memory.

    Args:
        in_memory: bytes for which the folder is made in memory, where that has room for them.

    Raises:
        OutputError: there is no place for one.
    """
    try:
        has_room = in_memory and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > in_memory
        parent = MEMORY if has_room else Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise OutputError(
            f"There is no place for a temporary folder: {error.strerror}.",
            "Set TMPDIR to a folder that can be written to.",
        ) from error
    _clear(parent)
    folder = parent / f"mmod-{secrets.token_hex(8)}"
    fix = "Free some space, or set TMPDIR to a folder on another disk."
    with full_disk_named(parent, fix), lock(Path(f"{folder}{_LOCK}"), Reporter()):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            with undisturbed():
                shutil.rmtree(folder, ignore_errors=True)


def _clear(parent: Path) -> None:
    """Remove the folders of runs that were killed: those whose lock is free."""
    for path in parent.glob(f"mmod-*{_LOCK}"):
        # Another run's, or another user's.
        with suppress(Held, OSError), lock(path, Reporter()) as is_locked:
            if is_locked:
                shutil.rmtree(str(path).removesuffix(_LOCK), ignore_errors=True)
