"""The folder in the user's cache for what a failed run would lose."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

KEPT_SECONDS = 30 * 86400


def cache_folder() -> Path:
    """The folder, which need not be there yet."""
    home = os.path.expanduser("~")
    # A user whom the system does not know, as in a container, may have no home.
    cache = os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir() if home == "~" else home, ".cache")
    return Path(cache, "mmod-convert")


def is_forgotten(path: Path) -> bool:
    """Whether it is older than ``KEPT_SECONDS``."""
    return path.stat().st_mtime < time.time() - KEPT_SECONDS
