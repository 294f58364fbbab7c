"""What a calibration is asked for, in plain values: no torch here, so that methods without a model are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from calibrator.distributed import Ranks
from converter.errors import UsageError
from converter.scales import Form, Granularity


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for.

    Attributes:
        method: a name in :data:`calibrator.methods.METHODS`.
        granularity, form: see :class:`converter.scales.ScaleSet`.
        train_len, target_len: tokens; ``train_len`` is 0 where it is neither known nor needed.
        seed: of every random draw.
        max_short_loss: how much the perplexity up to ``train_len`` may rise on validation windows, as a fraction.
        load_dtype: torch name of the dtype in which candidates are validated (``bfloat16``).
        join_documents: windows may run from one document into the next.
        validations: how many iterates are validated.
        short_windows: windows of ``train_len`` in each step.
        attention_window: tokens of a long text that a hybrid's attention sees at most; None for ``target_len``.
        streams: long texts side by side in each step. This and ``short_windows`` are multiples of the number of
            processes that calibrate together.
        steps: optimiser steps; None for the method's default, as with the next two.
        lr: learning rate of log s; of s with a preset.
        probes: pairs of perturbed factors that SPSA measures in each step.
        preset: SPSA as the paper ran it, see :mod:`calibrator.methods.spsa`.
        factor: the one factor of ``constant``; None to search for it.
        quantile: where ``winsorize`` clips, above 0 and below 0.5.
        tau: the slowest time constant that ``floor`` leaves, in tokens; None to try a few.

    Raises:
        UsageError: a learning rate that no optimiser takes.
    """

    method: str
    granularity: Granularity
    form: Form
    train_len: int
    target_len: int
    seed: int = 0
    max_short_loss: float = 0.005
    load_dtype: str = "float32"
    join_documents: bool = False
    validations: int = 4
    short_windows: int = 8
    attention_window: int | None = None
    streams: int = 1
    steps: int | None = None
    lr: float | None = None
    probes: int | None = None
    preset: Literal["paper"] | None = None
    factor: float | None = None
    quantile: float = 0.25
    tau: float | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"--lr is {self.lr}.", "Give a number above 0, or leave it out.")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise UsageError(f"--tau is {self.tau}.", "Give a number of tokens above 0, such as 2048.")

    def split_over(self, ranks: Ranks) -> Settings:
        """The settings with as many windows for each process, at least as many in all."""
        streams, short_windows = (
            -(-count // ranks.size) * ranks.size for count in (self.streams, self.short_windows)
        )
        return replace(self, streams=streams, short_windows=short_windows)
