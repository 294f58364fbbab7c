"""Tries at the start of a run what could fail at its end: writes the copy without its weights, and loads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converter.baking import write_companions
from converter.errors import CalibrationError, OutputError, boundary
from converter.layouts import Checkpoint
from converter.reporting import Reporter


@contextmanager
def rehearsed(
    checkpoint: Checkpoint,
    folder: Path,
    reporter: Reporter,
    *,
    target_len: int | None,
    entries: Mapping[str, Any] | None,
) -> Iterator[Path]:
    """Write everything but the weights, and let stock transformers find its tensors by their names and shapes.

    Args:
        folder: where the copy will be; a folder within it is gone again when the block ends.
        target_len, entries: as for :func:`converter.baking.bake`.

    Yields:
        The folder within, for whatever else is to be tried.

    Raises:
        LayoutError: tensors are missing, not known or of another shape.
        CalibrationError: stock transformers cannot build the model.
        OutputError: something cannot be written.
    """
    trial = folder / "rehearsal"
    trial.mkdir()
    try:
        with boundary(
            "The files beside the weights cannot be written", OutputError, "Put them right in the source."
        ):
            write_companions(checkpoint, trial, target_len=target_len, entries=entries)
        if not checkpoint.quantisation:
            check_names(checkpoint, trial, reporter)
        yield trial
    finally:
        shutil.rmtree(trial)


def check_names(checkpoint: Checkpoint, folder: Path, reporter: Reporter) -> None:
    """Match the checkpoint's tensors with the stock class of the config.json in ``folder``.

    A process that has not loaded torch stays as small as it is: another one does it.
    """
    from calibrator.stock_match import Match, match_stock

    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    ask: Callable[[Path, Mapping[str, Any]], Match] = match_stock if "torch" in sys.modules else _match_elsewhere
    match = ask(folder, shapes)
    match.check()
    if match.unknown:
        reporter.warn(f"The tensors' names are not matched with stock transformers: {match.unknown}.")


def _match_elsewhere(folder: Path, shapes: Mapping[str, Any]) -> Any:
    from calibrator.stock_match import Match

    command = [sys.executable, "-m", "calibrator.stock_match", str(folder)]
    done = subprocess.run(command, input=json.dumps(shapes), capture_output=True, text=True)
    if done.returncode:
        return Match(unknown=f"transformers does not start ({done.stderr.strip().splitlines()[-1:]})")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise CalibrationError(answer["error"], answer["fix"])
    return Match(**answer)
