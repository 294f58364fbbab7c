"""The disk that a folder lies on: its room, its name where that is gone, and files written whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ELSEWHERE = "Free some space, or choose a folder on another disk."


def size_name(size: int) -> str:
    """A number of bytes as people say it."""
    for unit, amount in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= amount:
            return f"{size / amount:.1f} {unit}"
    return f"{size} B"


def disk_of(folder: Path) -> Path:
    """Where the disk of a folder is mounted."""
    folder = folder.resolve()
    return next((path for path in (folder, *folder.parents) if path.is_mount()), folder)


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless ``needed`` bytes are free on the disk of ``folder``, or it cannot tell."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return
    if disk.total and disk.free < needed:
        raise OutputError(
            f"The disk at {disk_of(folder)} has {size_name(disk.free)} free; {size_name(needed)} are needed.",
            _ELSEWHERE,
        )


@contextmanager
def full_disk_named(folder: Path, fix: str = _ELSEWHERE) -> Iterator[None]:
    """Name the disk of ``folder`` where the block finds it full: the system's own error names neither.

    Raises:
        OutputError: it has no room left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OutputError(f"The disk at {disk_of(folder)} has no room left ({error.strerror}).", fix) from error


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file and return its path; where that fails, one that is there stays as it was.

    A link stays a link, and a pipe or device is written to as it is.

    Raises:
        OutputError: the disk refuses.
    """
    place = path.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(exist_ok=True)
        if place.exists() and not place.is_file():
            place.write_bytes(content)
        else:
            partial.write_bytes(content)
            partial.replace(place)
        return path
    except OSError as error:
        # On a read-only disk this fails as well, whether the file is there or not.
        with suppress(OSError):
            partial.unlink()
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.", "See to the folder's rights and to room on its disk."
        ) from error
