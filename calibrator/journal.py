"""The journal of a calibration: what a killed run needs to go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from calibrator.distributed import ALONE, Ranks
from converter.console import Reporter

SECONDS_BETWEEN = 20.0


class Journal:
    """One file in the user's cache, written at most every ``SECONDS_BETWEEN`` seconds.

    Args:
        key: everything that decides the result: source, texts, settings. A journal of the same source with
            another key is replaced, and the reporter says so.
        ranks: processes that calibrate together write a journal each, at the same steps.
    """

    def __init__(self, key: Mapping[str, Any], reporter: Reporter, ranks: Ranks = ALONE) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(str(key["source"]).encode()).hexdigest()[:16]
        number = f"-{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
        self._path = cache / "mmod-convert" / f"{name}{number}.journal"
        self._key = json.dumps(key, sort_keys=True, default=str)
        self._reporter = reporter
        self._ranks = ranks
        self._written = time.monotonic()

    def resume(self) -> dict[str, Any] | None:
        """The state that the last run of the same key saved, or None to start afresh."""
        state = self._read()
        steps = self._ranks.gather(-1 if state is None else int(state["step"]))
        if len(set(steps)) > 1:
            self._reporter.line("The processes of an interrupted run stopped at different steps; starting afresh.")
            return None
        if state is not None:
            self._reporter.line(f"Going on at step {state['step']}, where an interrupted run stopped.")
        return state

    def _read(self) -> dict[str, Any] | None:
        if not self._path.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self._path, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            self._reporter.warn(f"The journal of an interrupted run cannot be read ({error}); starting afresh.")
            return None
        if saved["key"] != self._key:
            self._reporter.line("An interrupted run of this model had other settings or text; starting afresh.")
            return None
        return dict(saved["state"])

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state unless that was done a moment ago; ``state`` holds tensors and plain values."""
        if not self._ranks.from_first(lambda: time.monotonic() - self._written >= SECONDS_BETWEEN):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        torch.save({"key": self._key, "state": state()}, partial)
        partial.replace(self._path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the run, which is complete."""
        self._path.unlink(missing_ok=True)
