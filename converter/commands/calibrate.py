"""Scales tuned on a task instead of text: ``mmod calibrate --task``, whose product ``mmod bake --scales`` takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.commands.command_line import command_line
from converter.commands.evaluate import EvaluationRequest
from converter.commands.keeping import keeping
from converter.commands.opening import CALIBRATION_NOVEL, open_model
from converter.commands.provenance import read_versions
from converter.errors import UsageError
from converter.json_text import json_text
from converter.output import check_output, staged
from converter.reporting import Reporter
from converter.scales import Form, Granularity, auto_granularity
from converter.scales_file import save_scales

RECORD_NAME = "calibration.json"
TASKS = ("passkey",)


@dataclass(frozen=True)
class TuningRequest:
    """What to tune; the fields bear the names of the command line's options.

    Attributes:
        output: folder for the scales and the record of how they were found.
        data: text whose sentences fill the prompts; a bundled novel where empty.
        length: tokens of a prompt.
        samples, epochs, batch, lr: see :class:`calibrator.answers.AnswerSettings`.
    """

    model: str
    output: Path
    task: str = "passkey"
    data: tuple[str, ...] = ()
    length: int = 4096
    samples: int = 512
    epochs: int = 2
    batch: int = 8
    lr: float = 1e-2
    granularity: Granularity | Literal["auto"] = "auto"
    form: Form = "linear"
    seed: int = 0
    revision: str | None = None
    tokenizer: str | None = None
    trust_a_log: bool = False
    device: str = "auto"
    allow_slow: bool = False


def tune(request: TuningRequest, reporter: Reporter) -> dict[str, Any]:
    """Tune the scales of a model on a task and write them.

    Returns:
        The record that lies beside the scales, as a JSON object.

    Raises:
        MmodError: a model, text or option cannot be used, or the output exists.
    """
    from calibrator.answers import AnswerSettings, calibrate_on_passkeys
    from calibrator.evaluation.passkey import Filler

    if request.task not in TASKS:
        raise UsageError(f"There is no task '{request.task}'.", f"Use one of: {', '.join(TASKS)}.")
    if request.samples < request.batch:
        raise UsageError(f"{request.samples} samples make no batch of {request.batch}.", "Lower --batch.")
    check_output(request.output, overwrite=False)
    names = ("revision", "tokenizer", "trust_a_log", "device", "allow_slow", "seed")
    loading = EvaluationRequest(
        models=(request.model,),
        texts=request.data or (CALIBRATION_NOVEL,),
        **{name: getattr(request, name) for name in names},
    )
    options = {name: getattr(request, name) for name in ("revision", "tokenizer", "trust_a_log")}
    with keeping(reporter) as keeper, open_model(request.model, loading, reporter) as opened:
        stock, snapshot = opened.stock, opened.snapshot
        with staged(request.output, False, snapshot.folder, reporter) as folder:
            granularity = request.granularity
            if granularity == "auto":
                granularity = auto_granularity(tuple(next(iter(stock.A_log.values())).shape))
            settings = AnswerSettings(
                granularity=granularity,
                form=request.form,
                length=request.length,
                samples=request.samples,
                epochs=request.epochs,
                batch=request.batch,
                learning_rate=request.lr,
                seed=request.seed,
            )
            text = opened.text(64 * request.length)
            filler = Filler(text, stock.tokenizer)
            outcome = calibrate_on_passkeys(stock, filler, settings, snapshot.revision, reporter)
            A_log = opened.checkpoint.A_log
            options["compose"] = snapshot.manifest is not None
            keeper.keep(outcome.scales, A_log, model=request.model, output=Path("FOLDER"), options=options)
            save_scales(folder, outcome.scales, A_log)
            record = {
                "task": request.task,
                "source": snapshot.name,
                "revision": snapshot.revision,
                "settings": dataclasses.asdict(settings),
                "text": dataclasses.asdict(text.record("filler")),
                "kept_step": outcome.kept_step,
                "history": outcome.history,
                "seconds": round(outcome.seconds, 1),
                "versions": read_versions(),
            }
            (folder / RECORD_NAME).write_text(json_text(record) + "\n", encoding="utf-8")
        outcome.journal.remove()
    before, after = outcome.history[0]["loss"], min(entry["loss"] for entry in outcome.history)
    reporter.line(f"Held-out loss on the pass key: {before:.3f} nats a token before, {after:.3f} with the scales.")
    line = command_line("mmod bake", [request.model, "FOLDER"], {**options, "scales": request.output})
    reporter.line(f"Write them into the model with: {line}")
    return record
