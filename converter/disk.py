"""The disk that a folder lies on: its room, its name where that is gone, and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import OutputError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ELSEWHERE = "Free some space, or choose a folder on another disk."
_OF_ANOTHER_SYSTEM = (
    "Choose a folder on another file system (FAT32 ends at 4 GB a file), or raise the limit of `ulimit -f`."
)


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


def require_file_size(folder: Path, size: int) -> None:
    """Raise OutputError unless a file of ``size`` bytes may lie in ``folder``, as far as the system tells it."""
    with full_disk_named(folder), named(folder), tempfile.TemporaryFile(dir=folder) as probe:
        # Weight files are made as long as they will be before they are filled.
        os.ftruncate(probe.fileno(), 1)
        is_limited = 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < size
        try:
            # Linux seeks no further than the longest file of the file system.
            os.lseek(probe.fileno(), size, os.SEEK_SET)
        except OSError:
            is_limited = True
        if is_limited:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a file's name to the system's errors that come without one, as those of reading and writing do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def full_disk_named(folder: Path, fix: str = "") -> Iterator[None]:
    """Name the disk of ``folder`` where the block finds it full: the system's own error names neither.

    Raises:
        OutputError: it has no room left, or takes no file as large as that.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        is_size = error.errno == errno.EFBIG
        what = "takes no file as large as that" if is_size else "has no room left"
        raise OutputError(
            f"The disk at {disk_of(folder)} {what} ({error.strerror}).",
            fix or (_OF_ANOTHER_SYSTEM if is_size else _ELSEWHERE),
        ) from error


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
