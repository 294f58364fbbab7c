"""What one conversion asks of the model: calibrate it, measure it before and after, and compare the two."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibrator.calibration import Outcome, Resources, Settings, calibrate
from calibrator.distributed import ALONE, Ranks
from calibrator.evaluation.perplexity import LengthLosses, bootstrap_error, measure_lengths
from calibrator.loss import window_losses
from calibrator.memory import MemoryMode
from calibrator.model import StockModel, load_model, pick_device
from calibrator.scaling import Scaling
from calibrator.text import Text, TextSource, read_text, take_span
from calibrator.train_len import look_up_train_len, measure_train_len
from converter.console import Reporter
from converter.errors import TextError, VerificationError
from converter.lengths import format_length
from converter.manifest import CalibrationRecord, PerplexityTable, TextRecord
from converter.scales import ScaleSet

PROBE_TOKENS = 512
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


class Job:
    """The model side of one conversion, from the unscaled model to the measured result.

    Args:
        folder: the unscaled checkpoint in the transformers layout; it may go once the job is made.
        keys: names of its A_log tensors.
        windows: of the longest length, in the before/after table.
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
        self._base: list[LengthLosses] = []
        self._probes: dict[torch.dtype, Tensor] = {}
        self.notes: list[str] = []

    @property
    def load_dtype(self) -> str:
        """Torch name of the dtype in which stock transformers loads the weights by default."""
        return str(self._stock.load_dtype).removeprefix("torch.")

    @property
    def texts(self) -> list[TextRecord]:
        """What was calibrated on, for the manifest."""
        return [text.record("calibration") for text in self._calibration]

    def read_texts(self, calibration: Sequence[TextChoice], held_out: TextChoice, limit: int) -> None:
        """Read the texts, up to ``limit`` tokens each."""
        self._calibration = [self._read(choice, limit) for choice in calibration]
        self._held_out = self._read(held_out, limit)

    def _read(self, choice: TextChoice, limit: int) -> Text:
        try:
            return read_text(choice.source, self._stock.tokenizer, limit=limit)
        except TextError as error:
            if choice.fallback is None:
                raise
            text = read_text(choice.fallback, self._stock.tokenizer, limit=limit)
            note = f"The bundled novel {text.name} stands in for {choice.source.location}, which cannot be reached."
            self._reporter.warn(f"{note} ({error.message})")
            self.notes.append(note)
            return text

    def find_train_len(self, name: str) -> tuple[int, str]:
        """The model's training length in tokens, and whether it is from the ``family table`` or ``measured``."""
        known = look_up_train_len(name)
        return (known, "family table") if known else (measure_train_len(self._stock, self._calibration), "measured")

    def calibrate(
        self, settings: Settings, train_len_origin: str, revision: str
    ) -> tuple[ScaleSet, CalibrationRecord]:
        """Find the scales, and measure the unscaled model for the table."""
        stock, reporter = self._stock, self._reporter
        outcome = self._calibrate(settings, revision)
        if outcome.guard:
            reporter.line(outcome.guard)
        if outcome.kept_step == 0:
            reporter.line("No factors beat the unscaled model over all lengths, so every factor stays 1.")
        longest = max(map(len, self._held_out.documents))
        every_octave = stock.device.type != "cpu"
        lengths = table_lengths(settings.train_len, settings.target_len, longest, every_octave=every_octave)
        self._base = self._measure(stock, lengths, "the source")
        run_dtype, load_dtype = stock.model.dtype, getattr(torch, settings.load_dtype)
        self._probes = {
            dtype: probe_logits(stock, outcome.scales, dtype, self._held_out) for dtype in (run_dtype, load_dtype)
        }
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
            device=device_name(stock),
            history=outcome.history,
        )
        return outcome.scales, record

    def assist(self, revision: str) -> None:
        """Take this process's share of the calibration that the first process leads."""
        self._calibrate(None, revision)

    def _calibrate(self, settings: Settings | None, revision: str) -> Outcome:
        """Calibrate on the first process's texts and settings."""
        ranks = self._machine.ranks
        texts, settings = ranks.from_first(lambda: (self._calibration, settings and settings.split_over(ranks)))
        assert settings is not None
        resources = Resources(self._machine.memory, ranks)
        return calibrate(self._stock, texts, settings, self._reporter, revision, resources)

    def check(self, baked: Path) -> PerplexityTable:
        """Load the baked folder with stock transformers, compare its logits with the calibrated, measure it.

        Raises:
            LayoutError: keys are missing or left over. VerificationError: other logits.
        """
        device, run_dtype = self._stock.device, next(iter(self._probes))
        self._stock.model.to("meta")
        gc.collect()
        split = self._machine.split
        converted = load_model(baked, self._keys, device=device, dtype=run_dtype, allow_slow=True, split=split)
        after = self._measure(converted, [losses.length for losses in self._base], "the converted model")
        for dtype, logits in self._probes.items():
            compare_logits(logits, probe_logits(converted, None, dtype, self._held_out), dtype)
        table = make_table(converted, self._held_out, self._windows, self._base, after)
        print_table(table, self._reporter)
        return table

    def _measure(self, stock: StockModel, lengths: Sequence[int], what: str) -> list[LengthLosses]:
        return measure(stock, self._held_out, lengths, self._windows, self._reporter, what)


def table_lengths(train_len: int, target_len: int, available: int, every_octave: bool) -> list[int]:
    """Lengths of the before/after table: from the training length to four times the target.

    Args:
        available: tokens of the longest held-out document; twice the longest length must fit unless that would
            leave out the target itself.
        every_octave: all powers of two between them, or four lengths only.
    """
    longest = 4 * target_len
    while longest > target_len and 2 * longest > available:
        longest //= 2
    if every_octave:
        lengths = [longest >> shift for shift in range(32) if longest >> shift >= train_len]
    else:
        lengths = [longest, target_len, target_len // 4, train_len]
    return sorted({length for length in lengths if length >= max(2, train_len) and longest % length == 0})


def estimate_seconds(stock: StockModel, tokens_forward: float, tokens_backward: float) -> float:
    """Time that so many tokens will take, from a forward pass timed on this machine; a backward counts three."""
    windows = torch.zeros(1, 1024, dtype=torch.int64, device=stock.device)
    with torch.no_grad(), stock.recurrence:
        stock.hidden_states(windows)
        started = time.monotonic()
        window_losses(stock, windows).sum().item()
        each = (time.monotonic() - started) / windows.numel()
    return each * (tokens_forward + 3 * tokens_backward)


def measure(
    stock: StockModel, text: Text, lengths: Sequence[int], windows: int, reporter: Reporter, what: str
) -> list[LengthLosses]:
    """Measure the perplexity of a model as it is; see :func:`measure_lengths`."""
    span = take_span(text, max(lengths), windows)
    with stock.recurrence:
        return measure_lengths(stock, span, lengths, reporter, what)


def make_table(
    stock: StockModel, text: Text, windows: int, base: Iterable[LengthLosses], converted: Iterable[LengthLosses]
) -> PerplexityTable:
    """Put two measurements over the same span side by side."""
    pairs = list(zip(base, converted, strict=True))
    errors = {str(before.length): bootstrap_error(before, after) for before, after in pairs}
    return PerplexityTable(
        text=text.record("held-out"),
        span_tokens=windows * max(before.length for before, _ in pairs),
        dtype=str(stock.model.dtype).removeprefix("torch."),
        base={str(before.length): before.perplexity for before, _ in pairs},
        converted={str(after.length): after.perplexity for _, after in pairs},
        standard_error={length: error for length, error in errors.items() if error is not None},
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


def compare_logits(calibrated: Tensor, converted: Tensor, dtype: torch.dtype) -> None:
    """Raise VerificationError where logits (length, vocab_size) differ by more than rounding in ``dtype``."""
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else LOAD_DTYPE_TOLERANCE
    difference = float((calibrated - converted).abs().max() / calibrated.abs().max())
    if not difference <= tolerance:
        raise VerificationError(
            f"The converted model's logits differ from the calibrated model's by {difference:.1e} of the "
            f"largest in {dtype} (at most {tolerance:.0e} is rounding)."
        )
