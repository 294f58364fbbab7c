"""Before and after: what the unscaled model does on held-out text, and how the baked one compares."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibrator.calibration import Outcome, Problem
from calibrator.evaluation.baselines import choose_window, sliding_losses
from calibrator.evaluation.memory import MemoryBefore, measure_before
from calibrator.evaluation.perplexity import LengthLosses, bootstrap_error, how_measured, measure_lengths
from calibrator.model import DAMAGED, StockModel, load_model
from calibrator.scaling import Scaling
from calibrator.text import Text, take_span
from converter.errors import CalibrationError, VerificationError
from converter.lengths import format_length
from converter.manifest import MemoryTable, PerplexityTable
from converter.reporting import Reporter
from converter.scales import ScaleSet

PROBE_TOKENS = 512
# The largest difference of logits, relative to the largest logit, between a calibrated and a converted model.
FP32_TOLERANCE = 1e-4
LOAD_DTYPE_TOLERANCE = 2e-2


Measured = tuple[PerplexityTable | None, MemoryTable | None]
"""Perplexity and memory before and after; None for what was not measured."""


@dataclass(frozen=True)
class Span:
    """Held-out text that windows of every length of the before/after table tile.

    Attributes:
        lengths: tokens; none for no table.
        tokens: (windows, longest) token ids.
    """

    text: Text
    lengths: tuple[int, ...]
    tokens: Tensor


@dataclass(frozen=True)
class Baseline:
    """What the unscaled model was found to be.

    Attributes:
        stock: the unscaled model; its memory is freed before the converted one is loaded.
        perplexity: one entry a length of the span.
        probes: logits of the model with its factors on, by dtype, the first the one it ran in.
        sliding: window and perplexity of the unscaled model on a sliding window; None where nothing was calibrated.
        memory: what it finds in long text, and what calibration found out about that.
    """

    stock: StockModel
    span: Span
    perplexity: list[LengthLosses]
    probes: dict[torch.dtype, Tensor]
    sliding: tuple[int, float] | None
    memory: tuple[MemoryBefore, Outcome] | None

    def compare(self, folder: Path, reporter: Reporter) -> Measured:
        """Load the baked folder with stock transformers, compare its logits with the calibrated, measure it.

        Raises:
            LayoutError: keys are missing or left over.
            VerificationError: the logits differ by more than rounding.
        """
        unscaled, span = self.stock, self.span
        device, run_dtype = unscaled.device, next(iter(self.probes))
        unscaled.release()
        gc.collect()
        converted = load_model(
            folder,
            tuple(unscaled.A_log),
            device=device,
            dtype=run_dtype,
            allow_slow=True,
            memory="stream" if unscaled.weights else "auto",
        )
        table = memory = None
        if span.lengths:
            with converted.recurrence:
                after = measure_lengths(converted, span.tokens, span.lengths, reporter, "the converted model")
            table = self._table(after, converted.dtype_name)
            print_table(table, reporter)
        if self.memory:
            before, outcome = self.memory
            with converted.recurrence:
                memory = before.table(converted, outcome.skills, outcome.kept_skills, reporter)
        for dtype, expected in self.probes.items():
            found = probe_logits(converted, None, dtype, span.text)
            difference = float((expected - found).abs().max() / expected.abs().max())
            tolerance = FP32_TOLERANCE if dtype == torch.float32 else LOAD_DTYPE_TOLERANCE
            if not difference <= tolerance:
                raise VerificationError(
                    f"The converted model's logits differ from the calibrated model's by {difference:.1e} of the "
                    f"largest in {dtype} (at most {tolerance:.0e} is rounding).",
                    "Please report it, with the versions in mmod.json.",
                )
        return table, memory

    def _table(self, converted: list[LengthLosses], dtype: str) -> PerplexityTable:
        """Two measurements over the span side by side, and a sliding window's."""
        pairs = list(zip(self.perplexity, converted, strict=True))
        errors = {str(before.length): bootstrap_error(before, after) for before, after in pairs}
        return PerplexityTable(
            text=self.span.text.record("held-out"),
            span_tokens=self.span.tokens.numel(),
            dtype=dtype,
            base={str(before.length): before.perplexity for before, _ in pairs},
            converted={str(after.length): after.perplexity for _, after in pairs},
            standard_error={length: error for length, error in errors.items() if error is not None},
            sliding=self.sliding[1] if self.sliding else None,
            sliding_window=self.sliding[0] if self.sliding else None,
            passes=how_measured(converted),
        )


@torch.no_grad()
def check_predictions(stock: StockModel, text: Text) -> None:
    """Refuse a model whose weights are damaged in a way that only its predictions show.

    Raises:
        CalibrationError: predictions are not finite, or all the same.
    """
    with stock.recurrence:
        logits = stock.logits(stock.hidden_states(stock.place(text.documents[0][None, :PROBE_TOKENS])))
    if not (logits.isfinite().all() and logits.min() < logits.max()):
        raise CalibrationError(
            "The model's predictions are not finite, or all the same: weights are zero, or far too large.",
            DAMAGED,
        )


def choose_span(stock: StockModel, text: Text, train_len: int, target_len: int, windows: int) -> Span:
    """Settle the lengths of the before/after table, and cut the windows that they tile.

    Args:
        windows: of the longest length; 0 for no table.

    Raises:
        TextError: the text is too short.
    """
    if not windows:
        return Span(text, (), torch.empty(0, 0))
    every_octave = stock.device.type != "cpu"
    lengths = table_lengths(train_len, target_len, max(map(len, text.documents)), every_octave=every_octave)
    return Span(text, tuple(lengths), take_span(text, max(lengths), windows))


def measure_baseline(
    stock: StockModel,
    span: Span,
    scales: ScaleSet,
    load_dtype: str,
    calibrated: tuple[Problem, Outcome] | None,
    reporter: Reporter,
) -> Baseline:
    """Measure the unscaled model, and note what the scaled one says.

    Args:
        calibrated: how the scales were found; None for given ones, of which memory is not measured.
    """
    perplexity: list[LengthLosses] = []
    if span.lengths:
        with stock.as_published(), stock.recurrence:
            perplexity = measure_lengths(stock, span.tokens, span.lengths, reporter, "the source")
    sliding = memory = None
    if span.lengths and calibrated:
        problem, outcome = calibrated
        settings = problem.settings
        with stock.as_published(), stock.recurrence:
            longest = span.tokens.shape[1]
            window = choose_window(stock, problem.validation.documents, settings.train_len, longest)
            losses = sliding_losses(stock, span.tokens[:, : longest // window * window], window)
            sliding = window, float(losses.mean().exp())
            before = measure_before(stock, span.text, problem.skills, settings, window, reporter)
            memory = before, outcome
    run_dtype = stock.model.dtype
    # A quantised model keeps the dtype that it was loaded in, and so do weights in host memory.
    others = () if stock.is_quantised or stock.weights else (getattr(torch, load_dtype),)
    dtypes = dict.fromkeys((run_dtype, *others))
    probes = {dtype: probe_logits(stock, scales, dtype, span.text) for dtype in dtypes}
    return Baseline(stock, span, perplexity, probes, sliding, memory)


def table_lengths(train_len: int, target_len: int, available: int, every_octave: bool) -> list[int]:
    """Lengths of the before/after table: from the training length to four times the target.

    A target that is no multiple of the training length counts as the next one that is, so that both tile one span.

    Args:
        available: tokens of the longest held-out document; twice the longest length must fit unless that would
            leave out the target itself.
        every_octave: all halvings of the longest as well, or a quarter of the target only.
    """
    train_len = max(2, train_len)
    target_len = -(-target_len // train_len) * train_len
    longest = 4 * target_len
    while longest > target_len and 2 * longest > available:
        longest //= 2
    between = [longest >> shift for shift in range(32)] if every_octave else [longest, target_len // 4]
    tiling = {length for length in between if length >= train_len and longest % length == 0}
    return sorted({train_len, target_len} | tiling)


def print_table(table: PerplexityTable, reporter: Reporter) -> None:
    """Show a before/after table."""
    rows = []
    for length, before in table.base.items():
        after = table.converted[length]
        error = table.standard_error.get(length)
        interval = f" ± {error:.1%}" if error is not None else ""
        shown = format_length(int(length))
        rows.append((shown, f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.1%}{interval}"))
    title = f"Perplexity on {table.text.name} (held out), {table.span_tokens} tokens at every length, {table.dtype}"
    reporter.table(title, ("tokens", "as trained", "converted", "change"), rows)
    reporter.line(table.passes)
    if table.sliding is not None:
        reporter.line(
            f"The unscaled model on a sliding window of {table.sliding_window} tokens, its state reset, has "
            f"{table.sliding:.2f}, however long the text, for twice the passes."
        )


@torch.no_grad()
def probe_logits(stock: StockModel, scales: ScaleSet | None, dtype: torch.dtype, text: Text) -> Tensor:
    """Logits on the first tokens of a text, in ``dtype``, which the model keeps: lost bits do not come back.

    Args:
        scales: put on the model for the probe; None for a model that has them baked in.

    Returns:
        (length, vocab_size) float32 on the CPU.
    """
    tokens = text.documents[0][None, :PROBE_TOKENS].to(stock.device)
    if stock.model.dtype != dtype:
        stock.model.to(dtype)
    with stock.recurrence:
        if scales is None:
            return stock.logits(stock.hidden_states(tokens))[0].cpu()
        scaling = Scaling(stock.mixers, stock.A_log, scales.granularity, scales.form)
        with scaling, scaling.rounded(dtype):
            scaling.load(scales)
            return stock.logits(stock.hidden_states(tokens))[0].cpu()
