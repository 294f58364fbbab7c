"""The SHA-256 of each file of a conversion, by which later changes are found without its base."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from converter.checkpoint_files import LICENCES, is_own
from converter.concurrent_parts import MEGABYTE, PARTS_AT_ONCE, Advance
from converter.manifest import MANIFEST_NAME, Manifest


class RunningDigest:
    """The SHA-256 of a file whose spans are written side by side, and read while they are still in memory."""

    def __init__(self) -> None:
        self._sha256, self._end, self._turn = hashlib.sha256(), 0, threading.Condition()

    def add(self, path: Path, start: int, end: int, advance: Advance) -> None:
        """Add the bytes from ``start`` to ``end`` once all before them were added.

        Args:
            advance: called now and then meanwhile; an exception ends the wait.
        """
        with self._turn, open(path, "rb", buffering=0) as file:
            while self._end != start:
                self._turn.wait(0.1)
                advance(0)
            file.seek(start)
            while piece := file.read(min(MEGABYTE, end - file.tell())):
                self._sha256.update(piece)
            self._end = end
            self._turn.notify_all()

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def sealed(manifest: Manifest, folder: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of a folder that was written, with the digest of each file in it.

    Args:
        known: digests that were taken while the files were written.
    """
    digests = dict(known or {})
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    due = {name: path for name, path in names.items() if is_sealed(name) and name not in digests}
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        digests |= zip(due, pool.map(sha256_of, due.values()), strict=True)
    return dataclasses.replace(manifest, files=dict(sorted(digests.items())))


def is_sealed(path: str) -> bool:
    """Whether the manifest has the digest of this file; people edit cards, and licences may be added."""
    is_drawn = path.endswith(".png") and is_own(path)
    return not (path in (MANIFEST_NAME, "README.md") or is_drawn or LICENCES.fullmatch(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
