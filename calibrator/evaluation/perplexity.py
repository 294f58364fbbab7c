"""Perplexity by window length over one span of text, so that lengths compare, and how far it could be by chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibrator.loss import token_losses, window_losses
from calibrator.model import StockModel
from calibrator.text import Text
from converter.errors import CalibrationError, TextError, UsageError
from converter.reporting import Reporter

FIRST_BUCKET = 256
# Of a bootstrap.
DRAWS = 2000
# A pass of this many tokens or more is compared with so many pieces, and may differ by so much of its loss.
_LONG, _PIECES, _TOLERANCE = 1024, 4, 0.005


@dataclass(frozen=True)
class LengthLosses:
    """Mean next-token loss of each window of one length.

    Attributes:
        length: tokens a window; each makes ``length - 1`` predictions from zero state.
        losses: (windows,) nats a token, float64.
        by_position: upper edge in tokens to the mean loss of the predictions from half of it up to it, over all
            windows; the first bucket starts at the first prediction.
        pieces: tokens of the pieces that a window was run in, or its length.
        difference: of the first window's loss in one pass from that in carried pieces, as a share of it; None where
            the two were not compared.
    """

    length: int
    losses: Tensor
    by_position: Mapping[int, float] = field(default_factory=dict)
    pieces: int = 0
    difference: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over the span."""
        return math.exp(self.losses.mean())


@torch.no_grad()
def measure_lengths(
    stock: StockModel,
    span: Tensor,
    lengths: Sequence[int],
    reporter: Reporter,
    what: str,
    *,
    compare: bool = True,
) -> list[LengthLosses]:
    """Measure the loss at several window lengths that all tile one span.

    Args:
        span: (windows, longest length) token ids.
        lengths: tokens; each must divide the longest.
        what: named in the progress line.
        compare: hold the first window's loss in one pass against that in carried pieces, where it is long.

    Raises:
        UsageError: a length does not divide the longest.
        CalibrationError: one pass says something else than carried pieces.
    """
    for length in lengths:
        if length < 2 or span.shape[1] % length:
            raise UsageError(
                f"Length {length} does not tile windows of {span.shape[1]} tokens.",
                "Choose lengths that divide the longest one, such as powers of two.",
            )
    results = []
    with reporter.task(f"Perplexity of {what}", len(lengths) * span.numel()) as task:
        for length in lengths:
            windows = span.reshape(-1, length)
            rows = []
            for batch in stock.batches(windows):
                rows.append(prediction_losses(stock, batch))
                task.advance(batch.numel())
            losses = torch.cat(rows)
            is_whole = length <= stock.tokens_at_once
            difference = _difference(stock, windows[:1], losses[0]) if is_whole and compare else None
            pieces = length if is_whole else stock.tokens_of_piece(1, length)
            results.append(LengthLosses(length, losses.mean(1), mean_by_position(losses), pieces, difference))
    return results


def how_measured(results: Iterable[LengthLosses]) -> str:
    """A sentence on which lengths ran in one pass, and what the comparison with carried pieces found."""
    results = list(results)
    whole = [entry.length for entry in results if entry.pieces == entry.length]
    compared = [entry.difference for entry in results if entry.difference is not None]
    sentences = [f"Up to {max(whole):,} tokens a window ran in one pass."] if whole else []
    if compared:
        sentences.append(f"In pieces that carry their state its loss is the same within {max(compared):.2%}.")
    if pieces := {entry.pieces for entry in results} - set(whole):
        sentences.append(f"Longer windows ran in pieces of {max(pieces):,} tokens that carry their state.")
    return " ".join(sentences)


def _difference(stock: StockModel, window: Tensor, losses: Tensor) -> float | None:
    """How far the losses of one pass are from those of the same text in carried pieces, as a share.

    Raises:
        CalibrationError: by more than rounding explains.
    """
    length = window.shape[1]
    if length < _LONG:
        return None
    whole, pieces = float(losses.mean()), float(stream_losses(stock, window, -(-length // _PIECES)).mean())
    difference = abs(whole - pieces) / pieces
    if math.isfinite(whole) != math.isfinite(pieces) or difference > _TOLERANCE:
        raise CalibrationError(
            f"A window of {length:,} tokens has a loss of {whole:.4f} in one pass, and of {pieces:.4f} in carried "
            "pieces: one of the kernels goes wrong at this length.",
            "They are known to where tokens times width pass 2^31. Update mamba-ssm and causal-conv1d, or measure "
            "shorter lengths.",
        )
    return difference if math.isfinite(difference) else None


def prediction_losses(stock: StockModel, windows: Tensor) -> Tensor:
    """Loss of every prediction, in one pass or, of long windows, in pieces that carry their state.

    Args:
        windows: (count, length) token ids.

    Returns:
        (count, length - 1) nats, float64, on the CPU.
    """
    if windows.shape[1] > stock.tokens_at_once:
        return stream_losses(stock, windows, stock.tokens_of_piece(*windows.shape))
    losses = [window_losses(stock, batch.to(stock.device)).double().cpu() for batch in stock.batches(windows)]
    return torch.cat(losses)


def mean_by_position(losses: Tensor) -> dict[int, float]:
    """Mean loss in buckets of position that double in size, as :attr:`LengthLosses.by_position` has them.

    Args:
        losses: (windows, predictions) nats; prediction p sees p + 1 tokens.
    """
    edges = [0, FIRST_BUCKET]
    while edges[-1] < losses.shape[1] + 1:
        edges.append(2 * edges[-1])
    means = {}
    for low, high in itertools.pairwise(edges):
        part = losses[:, max(0, low - 1) : high - 1]
        if part.shape[1]:
            means[high] = float(part.mean())
    return means


def take_ends(text: Text, longest: int, places: int) -> Tensor:
    """Cut windows whose ends lie evenly spread over the longest document, so that every length can share them.

    Returns:
        (places, longest) token ids.

    Raises:
        TextError: the document is shorter than ``longest``.
    """
    document = max(text.documents, key=len)
    if len(document) < longest:
        raise TextError(
            f"The longest document of {text.name} has {len(document)} tokens; {longest} are needed.",
            "Give a longer text or shorter lengths.",
        )
    ends = torch.linspace(longest, len(document), places).long().tolist()
    return torch.stack([document[end - longest : end] for end in ends])


@torch.no_grad()
def tail_losses(stock: StockModel, windows: Tensor, tail: int) -> Tensor:
    """Mean loss of the last predictions of each window: all to ask of a model that drops earlier tokens.

    Args:
        windows: (count, length) token ids.
        tail: predictions at the end of a window, less than its length.

    Returns:
        (count,) nats, float64, on the CPU.
    """
    rows = []
    for batch in stock.batches(windows):
        tokens = batch.to(stock.device)
        hidden = stock.hidden_states(tokens)[:, -tail - 1 : -1]
        rows.append(token_losses(stock, hidden, tokens[:, -tail:]).double().mean(1).cpu())
    return torch.cat(rows)


def stream_losses(stock: StockModel, windows: Tensor, step: int, attention_window: int | None = None) -> Tensor:
    """Loss of every prediction of long windows, run in pieces that carry their state.

    Args:
        windows: (batch, length) token ids.
        step: tokens a piece at most.
        attention_window: tokens that attention sees at most; None for all.

    Returns:
        (batch, length - 1) nats, float64, on the CPU.
    """
    step, keep = stock.recurrence.piece_and_keys(step, attention_window)
    pieces = zip(stock.in_pieces(windows[:, :-1], step, keep=keep), windows[:, 1:].split(step, 1), strict=True)
    losses = [token_losses(stock, hidden, stock.place(targets)) for (hidden, _), targets in pieces]
    return torch.cat(losses, dim=1).double().cpu()


def bootstrap_error(base: LengthLosses, converted: LengthLosses) -> float | None:
    """Standard error of log(converted perplexity / base perplexity), by a paired bootstrap over blocks of windows.

    Returns:
        None if the span has fewer than two windows of this length.
    """
    change = converted.losses - base.losses
    return float(resample_means(change).std()) if len(change) > 1 else None


def resample_means(values: Tensor, seed: int = 0) -> Tensor:
    """Means of resampled windows, drawn in blocks of neighbours since neighbours in a text are alike.

    The circular block bootstrap (Politis and Romano, 1992), with blocks of n^(1/3) windows, the order of length
    that its authors show to be best for a mean.

    Args:
        values: (windows,) in the order of the text; or (windows, measures), every measure drawn alike.

    Returns:
        (DRAWS,) or (DRAWS, measures), float64.
    """
    count = len(values)
    size = max(1, round(count ** (1 / 3)))
    starts = torch.randint(count, (DRAWS, -(-count // size)), generator=torch.Generator().manual_seed(seed))
    chosen = (starts[..., None] + torch.arange(size)).flatten(1)[:, :count] % count
    return values.double()[chosen].mean(1)
