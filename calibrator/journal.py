"""The journal of a calibration, from which a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from calibrator.distributed import ALONE, Ranks
from converter import __version__
from converter.errors import redacted_message
from converter.reporting import Reporter, optional_step
from converter.temporary import cache_folder

# Writing may take one part in so many of the time of a run.
SHARE = 50
KEPT_SECONDS = 30 * 86400


class Journal:
    """One file, written often enough that a killed run loses little.

    Args:
        key: everything that decides the result beside this tool's version: verb, source, texts, settings, device.
            Runs that differ in any of it have journals of their own.
        ranks: processes that calibrate together write a journal each, at the same steps.
        elsewhere: where it goes if the folder in the user's cache does not take it.
    """

    def __init__(
        self, key: Mapping[str, Any], reporter: Reporter, ranks: Ranks = ALONE, elsewhere: Path | None = None
    ) -> None:
        self._key = json.dumps({**key, "version": __version__}, sort_keys=True)
        name = hashlib.sha256(self._key.encode()).hexdigest()[:16]
        numbers = [f"-{rank}-of-{ranks.size}" for rank in range(ranks.size)] if ranks.size > 1 else [""]
        self._folders = [cache_folder(), *([elsewhere] if elsewhere else [])]
        self._writable = list(self._folders)
        self._names = [f"mmod-{name}{number}.journal" for number in numbers]
        self._reporter = reporter
        self._ranks = ranks
        self._next = 0.0

    def __enter__(self) -> Journal:
        """Have an error that ends the block say how to go on; without one the run is complete and is forgotten."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.remove()
        elif self._path is not None:
            error.add_note("Start the same command again: the calibration goes on where it stopped.")

    @property
    def _path(self) -> Path | None:
        """The journal of this process, if there is one."""
        found = [folder / self._names[self._ranks.rank] for folder in self._folders]
        # False as well in a folder that cannot be searched.
        found = [path for path in found if os.path.isfile(path)]
        return max(found, key=os.path.getmtime, default=None)

    def resume(self) -> dict[str, Any] | None:
        """The state that the last run of the same key saved, or None to start afresh."""
        state = self._read()
        steps = self._ranks.gather(-1 if state is None else state["step"])
        if len(set(steps)) > 1:
            self._reporter.line("The processes of an interrupted run stopped at different steps; starting afresh.")
            return None
        if state is not None:
            self._reporter.line(f"Going on after step {state['step']}, where an interrupted run stopped.")
        return state

    def _read(self) -> dict[str, Any] | None:
        if self._path is None:
            return None
        try:
            saved = torch.load(self._path, weights_only=True)
            key, state = saved["key"], {**saved["state"], "step": int(saved["state"]["step"])}
        except Exception as error:
            self._reporter.warn(f"The journal of an interrupted run cannot be read ({error!r}); starting afresh.")
            return None
        return state if key == self._key else None

    def save(self, state: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Write the state, unless it was written shortly before and ``last`` is not set.

        Args:
            state: returns tensors and plain values, ``step`` among them.
        """
        started = time.monotonic()
        if not self._ranks.from_first(lambda: last or started >= self._next) or not self._writable:
            return
        content = {"key": self._key, "state": state()}
        for folder in list(self._writable):
            path = folder / self._names[self._ranks.rank]
            partial = path.with_suffix(f".{os.getpid()}.partial")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for left in [*folder.glob("mmod-*.journal"), *folder.glob("mmod-*.partial")]:
                    if left.stat().st_mtime < time.time() - KEPT_SECONDS:
                        left.unlink(missing_ok=True)
                torch.save(content, partial)
                partial.replace(path)
                break
            except Exception as error:
                with suppress(OSError):
                    partial.unlink()
                self._writable.remove(folder)
                then = f"it goes to {self._writable[0]}" if self._writable else "a killed run will start over"
                self._reporter.warn(f"The journal {path} cannot be written ({redacted_message(error)}); {then}.")
        now = time.monotonic()
        self._next = now + SHARE * (now - started)

    def remove(self) -> None:
        """Forget the run, which is complete, on this host."""
        for path in [folder / name for folder in self._folders for name in self._names]:
            with (
                optional_step(f"The journal {path} cannot be removed", self._reporter),
                suppress(FileNotFoundError, NotADirectoryError),
            ):
                path.unlink()
