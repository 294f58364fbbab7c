"""The texts of one conversion: read, with stand-ins where they cannot be reached, and told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrator.line_ends import Arrange, choose_arrangement
from calibrator.model import StockModel
from calibrator.text import Text, TextSource, read_text, require_unweighted
from converter.errors import TextError, UsageError
from converter.reporting import Reporter

# Of the held-out text in the calibration text: two books may share a licence or a quotation.
MOST_SHARED = 0.01


@dataclass(frozen=True)
class TextChoice:
    """A text to read, and one that stands in where it cannot be reached (None: that is an error)."""

    source: TextSource
    fallback: TextSource | None = None


@dataclass(frozen=True)
class ChosenTexts:
    """What a conversion reads.

    Attributes:
        calibration: to calibrate on; empty where the scales are given.
        held_out: to measure on.
        notes: which text stands in for which, for the manifest.
    """

    calibration: tuple[Text, ...]
    held_out: Text
    notes: tuple[str, ...]


def read_chosen(
    stock: StockModel,
    calibration: Sequence[TextChoice],
    held_out: TextChoice,
    limit: int,
    join: bool,
    reporter: Reporter,
) -> ChosenTexts:
    """Read the texts in the model's tokens, up to ``limit`` each; see :func:`read_text`.

    Raises:
        UsageError: what is to be measured on is to be calibrated on too.
    """
    read = [_read(stock, choice, limit, join, reporter) for choice in (*calibration, held_out)]
    *texts, measured = (text for text, _ in read)
    for text in texts:
        share = text.share_of(measured)
        if share > MOST_SHARED:
            raise UsageError(
                f"{text.name} is calibrated on and holds {share:.0%} of the text to measure on, {measured.name}.",
                "Give another text with --held-out or --data.",
            )
    return ChosenTexts(tuple(texts), measured, tuple(note for _, note in read if note))


def _read(stock: StockModel, choice: TextChoice, limit: int, join: bool, reporter: Reporter) -> tuple[Text, str]:
    """A text, and a note where another stands in for it."""
    try:
        return read_for(stock, choice.source, limit=limit, join=join, reporter=reporter), ""
    except TextError as error:
        if choice.fallback is None:
            raise
        text = read_for(stock, choice.fallback, limit=limit, join=join, reporter=reporter)
        note = f"The bundled novel {text.name} stands in for {choice.source.location}, which cannot be reached."
        reporter.warn(f"{note} ({error.message})")
        return text, note


def read_for(stock: StockModel, source: TextSource, *, limit: int, join: bool = False, reporter: Reporter) -> Text:
    """Read a text in a model's tokens, without hard line ends if the model predicts it better so; that is said."""

    def arrange(content: str) -> Arrange:
        with stock.recurrence:
            arrangement, why = choose_arrangement(stock, content)
        if why:
            reporter.line(f"{Path(source.location).name} {why}")
        return arrangement

    return read_text(
        source, stock.tokenizer, limit=limit, join=join, rows=stock.rows, arrange=arrange, reporter=reporter
    )


def read_as_one(stock: StockModel, sources: Sequence[TextSource], *, limit: int, reporter: Reporter) -> Text:
    """Read several texts as the documents of one; see :func:`read_for`."""
    require_unweighted(sources)
    texts = [read_for(stock, source, limit=limit, reporter=reporter) for source in sources]
    return Text(", ".join(text.name for text in texts), tuple(d for text in texts for d in text.documents))
