"""Keeps the scales that were found in the user's cache until the conversion is complete."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converter.cache import cache_folder, is_forgotten
from converter.command_line import command_line
from converter.layouts import Tensor
from converter.manifest import Manifest
from converter.reporting import Reporter, optional_step
from converter.scales import ScaleSet
from converter.scales_file import save_scales
from converter.temporary import MEMORY


class Keeper:
    """Stores the scales of one run, and knows the command that goes on from them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._folder: Path | None = None
        self.advice = ""

    def keep(
        self,
        scales: ScaleSet,
        A_log: Mapping[str, Tensor],
        *,
        model: str,
        output: Path,
        options: Mapping[str, Any],
    ) -> None:
        """Store scales as soon as they exist.

        Args:
            A_log: what they were found on.
            model, output, options: of the ``mmod bake`` that goes on from them.
        """
        lost = "The factors cannot be kept, so that an error later on would lose them"
        with optional_step(lost, self._reporter):
            self._folder = _store(scales, A_log)
            line = command_line("mmod bake", [model, str(output)], {**options, "scales": self._folder})
            self.advice = f"The factors are kept. Go on from them with: {line}"

    def describe(self, manifest: Manifest) -> None:
        """Add what is known of how the scales were found."""
        if self._folder is not None:
            with optional_step("How the factors were found is not kept with them", self._reporter):
                manifest.write(self._folder)

    def forget(self) -> None:
        """Remove the scales: the conversion is complete."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def keeping(reporter: Reporter) -> Iterator[Keeper]:
    """Any error after the scales are kept gets a note with the command that goes on from them."""
    keeper = Keeper(reporter)
    try:
        yield keeper
    except BaseException as error:
        if keeper.advice:
            error.add_note(keeper.advice)
        raise
    keeper.forget()


def _store(scales: ScaleSet, A_log: Mapping[str, Tensor]) -> Path:
    """Write into a new folder in the user's cache or, where that is full or cannot be written, elsewhere."""
    for make in (_new_in_cache, _new_temporary, lambda: _new_temporary(MEMORY)):
        folder = None
        try:
            folder = make()
            save_scales(folder, scales, A_log)
            return folder
        except Exception as error:
            failed = error
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    raise failed


def _new_in_cache() -> Path:
    parent = cache_folder() / "scales"
    parent.mkdir(parents=True, exist_ok=True)
    for kept in filter(is_forgotten, parent.iterdir()):
        shutil.rmtree(kept, ignore_errors=True)
    folder = parent / secrets.token_hex(4)
    folder.mkdir()
    return folder


def _new_temporary(parent: Path | None = None) -> Path:
    return Path(tempfile.mkdtemp(prefix="mmod-scales-", dir=parent))
