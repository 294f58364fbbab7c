"""One calibration from start to end: what is asked, what a method gets to work with, and what comes out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from calibrator.distributed import ALONE, Ranks
from calibrator.journal import Journal
from calibrator.memory import Activations, MemoryMode
from calibrator.methods import METHODS
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.text import Text, WindowSampler, split_held_out
from calibrator.validation import Validation
from converter.console import Reporter
from converter.errors import TextError
from converter.scales import Form, Granularity, ScaleSet, Target


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for.

    Attributes:
        method: a name in :data:`calibrator.methods.METHODS`.
        granularity, form, target: see :class:`converter.scales.ScaleSet`.
        train_len, target_len: tokens.
        seed: of every random draw.
        max_short_loss: how much the perplexity up to ``train_len`` may rise on validation windows, as a fraction.
        load_dtype: torch name of the dtype in which candidates are validated (``bfloat16``).
        steps: optimiser steps; None for the method's default.
        learning_rate: of log s; None for the method's default.
        validations: how many iterates are validated.
        short_windows: windows of ``train_len`` in each step.
        streams: long texts side by side in each step. This and ``short_windows`` are multiples of the number of
            processes that calibrate together.
        options: what only one method has (``factor``, ``preset``, ``probes``, ``quantile``).
    """

    method: str
    granularity: Granularity
    form: Form
    train_len: int
    target_len: int
    target: Target = "A"
    seed: int = 0
    max_short_loss: float = 0.005
    load_dtype: str = "float32"
    steps: int | None = None
    learning_rate: float | None = None
    validations: int = 3
    short_windows: int = 8
    streams: int = 1
    options: Mapping[str, float | str] = field(default_factory=dict)

    def split_over(self, ranks: Ranks) -> Settings:
        """The settings with as many windows for each process, at least as many in all."""
        streams, short_windows = (
            -(-count // ranks.size) * ranks.size for count in (self.streams, self.short_windows)
        )
        return dataclasses.replace(self, streams=streams, short_windows=short_windows)


@dataclass(frozen=True)
class Resources:
    """What a calibration may use; no result depends on it, but for rounding.

    Attributes:
        memory: how activations are kept; see :class:`calibrator.memory.Activations`.
        ranks: the processes that share the work.
    """

    memory: MemoryMode = "auto"
    ranks: Ranks = ALONE


@dataclass
class Problem:
    """What a method works with.

    Attributes:
        stock: the frozen model, its recurrences open.
        scaling: the factors, on the model; a method moves them.
        sampler: windows of the calibration text.
        validation: judges the factors as they stand and keeps the best.
        journal: survives a killed run.
        activations: runs backward passes in the memory there is.
        ranks: the processes that share the work.
    """

    stock: StockModel
    scaling: Scaling
    sampler: WindowSampler
    validation: Validation
    settings: Settings
    journal: Journal
    reporter: Reporter
    activations: Activations
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    Attributes:
        scales: the best iterate that respects the guard; all ones where none beats the unscaled model.
        steps: optimiser steps taken. kept_step: the iterate kept, 0 for the unscaled model.
        guard: a sentence when the short-context guard decided, else "".
        history: one entry a validated iterate, for the manifest.
        seconds: wall time.
    """

    scales: ScaleSet
    steps: int
    kept_step: int
    guard: str
    history: list[dict[str, Any]]
    seconds: float


def calibrate(
    stock: StockModel,
    texts: list[Text],
    settings: Settings,
    reporter: Reporter,
    source_revision: str,
    resources: Resources | None = None,
) -> Outcome:
    """Find the scales of a frozen model.

    Args:
        texts: what to calibrate on; the end of the longest document is held out to validate.
        source_revision: of the checkpoint; a journal of another is not taken up.

    Raises:
        TextError: the texts are too short for the target length.
    """
    started = time.monotonic()
    resources = resources or Resources()
    texts, held_out = split_held_out(texts, 4 * settings.target_len, settings.target_len + 1)
    if held_out.shape[1] < 2 * settings.train_len:
        raise TextError("The text is too short to validate on.", "Give a longer text with --data.")
    key = {
        "source": source_revision,
        "texts": [dataclasses.asdict(text.record("calibration")) | {"weight": text.weight} for text in texts],
        "settings": dataclasses.asdict(settings),
        "device": stock.device.type,
    }
    scaling = Scaling(stock.mixers, stock.A_log, settings.granularity, settings.form, settings.target)
    with scaling, stock.recurrence:
        activations = Activations(stock, scaling.parameters(), resources.memory, reporter)
        activations.warm_up()
        validation = Validation(
            stock,
            scaling,
            held_out,
            train_len=settings.train_len,
            target_len=settings.target_len,
            max_short_loss=settings.max_short_loss,
            load_dtype=getattr(torch, settings.load_dtype),
            ranks=resources.ranks,
        )
        journal = Journal(key, reporter, resources.ranks)
        sampler = WindowSampler(texts, settings.seed)
        problem = Problem(
            stock, scaling, sampler, validation, settings, journal, reporter, activations, resources.ranks
        )
        steps = import_module(METHODS[settings.method]).calibrate(problem)
        journal.remove()
    best = validation.best
    return Outcome(
        scales=best.scales,
        steps=steps,
        kept_step=best.step,
        guard=validation.guard_sentence(),
        history=[candidate.record() for candidate in validation.candidates],
        seconds=time.monotonic() - started,
    )
