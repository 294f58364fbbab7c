"""The SHA-256 of each file of a conversion, by which later changes are found without its base."""

from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from converter.checkpoint_files import LICENCES, is_own
from converter.concurrent_parts import PARTS_AT_ONCE
from converter.manifest import MANIFEST_NAME, Manifest


def sealed(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest of a folder that was written, with the digest of each file in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    due = {name: path for name, path in names.items() if is_sealed(name)}
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        return dataclasses.replace(manifest, files=dict(zip(due, pool.map(sha256_of, due.values()), strict=True)))


def is_sealed(path: str) -> bool:
    """Whether the manifest has the digest of this file; people edit cards, and licences may be added."""
    is_drawn = path.endswith(".png") and is_own(path)
    return not (path in (MANIFEST_NAME, "README.md") or is_drawn or LICENCES.fullmatch(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
