"""Tries early in a run what could fail at its end: writes the copy without its weights, and loads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from converter.baking import write_companions
from converter.concurrent_parts import Advance
from converter.disk import full_disk_named, require_file_size
from converter.errors import CalibrationError, OutputError, boundary
from converter.layouts import Checkpoint
from converter.reporting import Reporter


@contextmanager
def rehearsed(checkpoint: Checkpoint, folder: Path) -> Iterator[Path]:
    """Write everything but the weights.

    Args:
        folder: where the copy will be; a folder within it is gone again when the block ends.

    Yields:
        The folder within, for what is to be tried.

    Raises:
        OutputError: something cannot be written.
    """
    require_file_size(folder, max(sum(tensor.nbytes for tensor in file.tensors) for file in checkpoint.files))
    trial = folder / "rehearsal"
    trial.mkdir()
    try:
        failure = boundary(
            "The files beside the weights cannot be written", OutputError, "Put them right in the source."
        )
        with failure, full_disk_named(trial):
            write_companions(checkpoint, trial)
        yield trial
    finally:
        shutil.rmtree(trial)


def check_loading(
    checkpoint: Checkpoint,
    trial: Path,
    reporter: Reporter,
    advance: Advance | None = None,
    *,
    runs_model: bool = False,
) -> None:
    """Let stock transformers load a rehearsed copy's tokenizer, and find its tensors by their names and shapes.

    A process that has not loaded torch stays as small as it is: another one does it.

    Args:
        advance: called now and then while that runs; an exception ends it.
        runs_model: it will be loaded here, so a quantised one needs its quantiser.

    Raises:
        LayoutError: tensors are missing, not known or of another shape.
        CalibrationError: stock transformers cannot build the model, or load the tokenizer.
    """
    if checkpoint.layout == "gguf":
        return
    from calibrator.stock_match import match_stock

    shapes = None
    if runs_model or not checkpoint.quantisation:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if "torch" in sys.modules:
        match = match_stock(trial, shapes)
    else:
        match = _match_elsewhere(trial, shapes, advance or (lambda _: None))
    match.check()
    if match.unknown:
        reporter.warn(f"The tensors' names are not matched with stock transformers: {match.unknown}.")


def _match_elsewhere(folder: Path, shapes: Mapping[str, Any] | None, advance: Advance) -> Any:
    from calibrator.stock_match import Match

    command = [sys.executable, "-m", "calibrator.stock_match", str(folder)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            answered, question = None, json.dumps(shapes)
            while answered is None:
                advance(0)
                with suppress(subprocess.TimeoutExpired):
                    answered = process.communicate(question, timeout=0.1)
                question = ""
        finally:
            process.kill()
    if process.returncode:
        return Match(unknown=f"transformers does not start ({answered[1].strip().rpartition(chr(10))[2]})")
    answer = json.loads(answered[0])
    if "error" in answer:
        raise CalibrationError(answer["error"], answer["fix"])
    return Match(**answer)
