"""What one conversion asks of the model: calibrate it, measure it before and after, and compare the two."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibrator.calibration import Outcome, Problem, Resources, calibrate, pose
from calibrator.distributed import ALONE, Ranks
from calibrator.evaluation.memory import MemoryBefore, measure_before
from calibrator.evaluation.perplexity import LengthLosses, bootstrap_error, how_measured, measure_lengths
from calibrator.evaluation.sliding import choose_window, sliding_losses
from calibrator.layout import Arrange, choose_arrangement
from calibrator.memory import MemoryMode
from calibrator.methods.mambaextend import scaled_steps
from calibrator.model import StockModel, load_model, pick_device
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text, TextSource, read_text, take_span
from calibrator.train_len import look_up_train_len, measure_train_len
from converter.errors import TextError, UsageError, VerificationError
from converter.lengths import format_length
from converter.manifest import CalibrationRecord, MemoryTable, PerplexityTable, TextRecord
from converter.reporting import Reporter
from converter.scales import ScaleSet

PROBE_TOKENS = 512
# Of the held-out text in the calibration text: two books may share a licence or a quotation.
MOST_SHARED = 0.01
# The largest difference of logits, relative to the largest logit, between a calibrated and a converted model.
FP32_TOLERANCE = 1e-4
LOAD_DTYPE_TOLERANCE = 2e-2


@dataclass(frozen=True)
class TextChoice:
    """A text to read, and one that stands in where it cannot be reached (None: that is an error)."""

    source: TextSource
    fallback: TextSource | None = None


@dataclass(frozen=True)
class Machine:
    """What a job may use.

    Attributes:
        device: as the user names it.
        allow_slow: run on a GPU without the kernels.
        split: spread the layers over all GPUs.
        memory, ranks: see :class:`calibrator.calibration.Resources`.
    """

    device: str = "auto"
    allow_slow: bool = False
    split: bool = False
    memory: MemoryMode = "auto"
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Measured:
    """What the converted model was found to be.

    Attributes:
        table: perplexity before and after; None where none was asked for.
        fold_error: with a scaled time step, the largest difference of logits between the model whose Δ is truly
            scaled and the converted one, relative to the largest logit, in float32; else None.
        memory: what it finds in long text; None where that was not measured.
    """

    table: PerplexityTable | None
    fold_error: float | None
    memory: MemoryTable | None = None


class Job:
    """The model side of one conversion, from the unscaled model to the measured result.

    Args:
        folder: the unscaled checkpoint in the transformers layout; it may go once the job is made.
        keys: names of its A_log tensors.
        windows: of the longest length, in the before/after table; 0 for no table.
    """

    def __init__(
        self, folder: Path, keys: Iterable[str], machine: Machine, windows: int, reporter: Reporter
    ) -> None:
        self._keys = tuple(keys)
        self._machine = machine
        self._windows = windows
        self._reporter = reporter
        self._stock = load_model(
            folder,
            self._keys,
            device=pick_device(machine.device),
            allow_slow=machine.allow_slow,
            split=machine.split,
            reporter=reporter,
        )
        self._calibration: list[Text] = []
        self._held_out = Text("", ())
        self._problem: Problem | None = None
        self._outcome: Outcome | None = None
        self._memory: MemoryBefore | None = None
        self._sliding: tuple[int, float] | None = None
        self._lengths: list[int] = []
        self._span = torch.empty(0, 0)
        self._base: list[LengthLosses] = []
        self._probes: dict[torch.dtype, Tensor] = {}
        self._stepped: Tensor | None = None
        self.notes: list[str] = []

    @property
    def texts(self) -> list[TextRecord]:
        """What was calibrated on, for the manifest."""
        return [text.record("calibration") for text in self._calibration]

    def read_texts(
        self, calibration: Sequence[TextChoice], held_out: TextChoice, limit: int, join: bool = False
    ) -> None:
        """Read the texts, up to ``limit`` tokens each; see :func:`read_text`.

        Raises:
            UsageError: what is to be measured on is to be calibrated on too.
        """
        self._calibration = [self._read(choice, limit, join) for choice in calibration]
        self._held_out = self._read(held_out, limit, join)
        for text in self._calibration:
            share = text.share_of(self._held_out)
            if share > MOST_SHARED:
                raise UsageError(
                    f"{text.name} is calibrated on and holds {share:.0%} of the text to measure on, "
                    f"{self._held_out.name}.",
                    "Give another text with --held-out or --data.",
                )

    def _read(self, choice: TextChoice, limit: int, join: bool) -> Text:
        stock, reporter = self._stock, self._reporter

        def read(source: TextSource) -> Text:
            def arrange(content: str) -> Arrange:
                with stock.recurrence:
                    arrangement, why = choose_arrangement(stock, content)
                if why:
                    reporter.line(f"{Path(source.location).name} {why}")
                return arrangement

            return read_text(
                source, stock.tokenizer, limit=limit, join=join, rows=stock.rows, arrange=arrange, reporter=reporter
            )

        try:
            return read(choice.source)
        except TextError as error:
            if choice.fallback is None:
                raise
            text = read(choice.fallback)
            note = f"The bundled novel {text.name} stands in for {choice.source.location}, which cannot be reached."
            self._reporter.warn(f"{note} ({error.message})")
            self.notes.append(note)
            return text

    def find_train_len(self, name: str, kind: str) -> tuple[int, str]:
        """The model's training length in tokens, and whether it is from the ``family table`` or ``measured``."""
        if known := look_up_train_len(name, kind):
            return known, "family table"
        texts = self._calibration or [self._held_out]
        with self._stock.recurrence:
            return measure_train_len(self._stock, texts, self._reporter), "measured"

    def choose_lengths(self, train_len: int, target_len: int) -> None:
        """Settle the lengths of the before/after table, and cut the windows that they tile.

        Raises:
            TextError: the held-out text is too short.
        """
        if self._windows:
            longest = max(map(len, self._held_out.documents))
            every_octave = self._stock.device.type != "cpu"
            self._lengths = table_lengths(train_len, target_len, longest, every_octave=every_octave)
            self._span = take_span(self._held_out, max(self._lengths), self._windows)

    def pose(self, settings: Settings, revision: str) -> None:
        """Settle what is to be calibrated.

        Raises:
            TextError: the texts are too short.
        """
        self._problem = self._pose(settings, revision)
        reach = max(map(len, self._problem.validation.documents))
        if reach < settings.target_len:
            note = f"Factors for {settings.target_len:,} tokens are judged on {reach:,} only: no more is set aside."
            self._reporter.warn(f"{note} A longer text, --data, is judged farther.")
            self.notes.append(note)

    def assist(self, revision: str) -> None:
        """Take this process's share of the calibration that the first process leads."""
        calibrate(self._pose(None, revision))

    def _pose(self, settings: Settings | None, revision: str) -> Problem:
        """The problem with the first process's texts and settings."""
        ranks = self._machine.ranks
        texts, settings = ranks.from_first(lambda: (self._calibration, settings and settings.split_over(ranks)))
        assert settings is not None
        resources = Resources(self._machine.memory, ranks)
        return pose(self._stock, texts, settings, self._reporter, revision, resources)

    def calibrate(self, train_len_origin: str) -> tuple[ScaleSet, CalibrationRecord]:
        """Find the scales of the problem posed."""
        assert self._problem is not None
        settings, reporter = self._problem.settings, self._reporter
        outcome = self._outcome = calibrate(self._problem)
        if outcome.guard:
            reporter.line(outcome.guard)
        if outcome.kept_step == 0:
            reporter.line("No factors beat the unscaled model over all lengths, so every factor stays 1.")
        else:
            reporter.line(outcome.short)
            if outcome.kept_skills:
                reporter.line(outcome.kept_skills)
        record = CalibrationRecord(
            method=settings.method,
            settings=dataclasses.asdict(settings),
            train_len=settings.train_len,
            train_len_origin=train_len_origin,
            target_len=settings.target_len,
            seed=settings.seed,
            steps=outcome.steps,
            kept_step=outcome.kept_step,
            guard=outcome.guard,
            seconds=round(outcome.seconds, 1),
            device=device_name(self._stock),
            history=outcome.history,
        )
        return outcome.scales, record

    def take(self, scales: ScaleSet, load_dtype: str) -> None:
        """Measure the unscaled model, and note what the scaled one says, before it gives way to the converted."""
        self._base = self._measure(self._stock)
        if self._lengths and self._problem is not None:
            self._measure_baselines(self._problem)
        run_dtype = self._stock.model.dtype
        if scales.target == "delta":
            self._stepped = probe_steps(self._stock, scales, self._held_out)
        self._probes = {
            dtype: probe_logits(self._stock, scales, dtype, self._held_out)
            for dtype in (run_dtype, getattr(torch, load_dtype))
        }

    def check(self, baked: Path) -> Measured:
        """Load the baked folder with stock transformers, compare its logits with the calibrated, measure it.

        Raises:
            LayoutError: keys are missing or left over. VerificationError: other logits.
        """
        device, run_dtype = self._stock.device, next(iter(self._probes))
        self._stock.model.to("meta")
        gc.collect()
        split = self._machine.split
        converted = load_model(baked, self._keys, device=device, dtype=run_dtype, allow_slow=True, split=split)
        table = None
        if self._lengths:
            after = self._measure(converted)
            table = make_table(converted, self._held_out, self._span, self._base, after, self._sliding)
            print_table(table, self._reporter)
        memory = None
        if self._memory is not None and self._outcome is not None:
            with converted.recurrence:
                memory = self._memory.table(
                    converted, self._outcome.skills, self._outcome.kept_skills, self._reporter
                )
        fold_error = None
        if self._stepped is not None:
            fold_error = difference(self._stepped, probe_logits(converted, None, torch.float32, self._held_out))
            self._reporter.line(
                f"Folding the scaled time step into stock weights moves logits by {fold_error:.1e} of the largest."
            )
        for dtype, logits in self._probes.items():
            # Folded weights are rounded to the number format they are stored in, whatever they run in.
            is_exact = dtype == torch.float32 and self._stepped is None
            found = difference(logits, probe_logits(converted, None, dtype, self._held_out))
            compare(found, FP32_TOLERANCE if is_exact else LOAD_DTYPE_TOLERANCE, dtype)
        return Measured(table, fold_error, memory)

    def finish(self) -> None:
        """Forget the journal: the result is safe."""
        if self._problem is not None:
            self._problem.journal.remove()

    def _measure_baselines(self, problem: Problem) -> None:
        """The unscaled model on a sliding window, and what it finds in long text."""
        stock, settings = self._stock, problem.settings
        with stock.recurrence:
            window = choose_window(stock, problem.validation.documents, settings.train_len)
            losses = sliding_losses(stock, self._span[:, : self._span.shape[1] // window * window], window)
            self._sliding = window, float(losses.mean().exp())
            self._memory = measure_before(
                *(stock, self._held_out, problem.skills, settings.train_len, settings.target_len),
                *(window, settings.seed, self._reporter),
            )

    def _measure(self, stock: StockModel) -> list[LengthLosses]:
        if not self._lengths:
            return []
        what = "the source" if stock is self._stock else "the converted model"
        with stock.recurrence:
            return measure_lengths(stock, self._span, self._lengths, self._reporter, what)


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


def make_table(
    stock: StockModel,
    text: Text,
    span: Tensor,
    base: Iterable[LengthLosses],
    converted: Iterable[LengthLosses],
    sliding: tuple[int, float] | None,
) -> PerplexityTable:
    """Put two measurements over the same span side by side, and a sliding window's."""
    pairs = list(zip(base, converted, strict=True))
    errors = {str(before.length): bootstrap_error(before, after) for before, after in pairs}
    return PerplexityTable(
        text=text.record("held-out"),
        span_tokens=span.numel(),
        dtype=str(stock.model.dtype).removeprefix("torch."),
        base={str(before.length): before.perplexity for before, _ in pairs},
        converted={str(after.length): after.perplexity for _, after in pairs},
        standard_error={length: error for length, error in errors.items() if error is not None},
        sliding=sliding[1] if sliding else None,
        sliding_window=sliding[0] if sliding else None,
        passes=how_measured(after for _, after in pairs),
    )


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
    reporter.table(title, ("tokens", "before", "after", "change"), rows)
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
    stock.model.to(dtype)
    with stock.recurrence:
        if scales is None:
            return stock.logits(stock.hidden_states(tokens))[0].cpu()
        scaling = Scaling(stock.mixers, stock.A_log, scales.granularity, scales.form, scales.target)
        with scaling, scaling.rounded(dtype):
            scaling.load(scales)
            return stock.logits(stock.hidden_states(tokens))[0].cpu()


def device_name(stock: StockModel) -> str:
    """What the model runs on, for the manifest: ``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(stock.device) if stock.device.type == "cuda" else stock.device.type


@torch.no_grad()
def probe_steps(stock: StockModel, scales: ScaleSet, text: Text) -> Tensor:
    """As :func:`probe_logits` in float32, of the unscaled model with its time step truly scaled."""
    tokens = text.documents[0][None, :PROBE_TOKENS].to(stock.device)
    stock.model.to(torch.float32)
    with stock.recurrence, scaled_steps(stock, scales):
        return stock.logits(stock.hidden_states(tokens))[0].cpu()


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of logits relative to the largest logit."""
    return float((expected - found).abs().max() / expected.abs().max())


def compare(found: float, tolerance: float, dtype: torch.dtype) -> None:
    """Raise VerificationError where a :func:`difference` is more than rounding."""
    if not found <= tolerance:
        raise VerificationError(
            f"The converted model's logits differ from the calibrated model's by {found:.1e} of the largest in "
            f"{dtype} (at most {tolerance:.0e} is rounding)."
        )
