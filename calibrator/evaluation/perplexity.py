"""Perplexity by window length, every length over the same span of text so that lengths compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrator.loss import token_losses, window_losses
from calibrator.model import StockModel
from calibrator.recurrence import State
from converter.console import Reporter
from converter.errors import UsageError

PIECE = 8192
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class LengthLosses:
    """Mean next-token loss of each window of one length.

    Attributes:
        length: tokens a window; each makes ``length - 1`` predictions from zero state.
        losses: (windows,) nats a token, float64.
    """

    length: int
    losses: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over the span."""
        return math.exp(self.losses.mean())


@torch.no_grad()
def measure_lengths(
    stock: StockModel, span: Tensor, lengths: Sequence[int], reporter: Reporter, what: str
) -> list[LengthLosses]:
    """Measure the loss at several window lengths that all tile one span.

    Args:
        span: (windows, longest length) token ids.
        lengths: tokens; each must divide the longest.
        what: named in the progress line.

    Raises:
        UsageError: a length does not divide the longest.
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
            size = max(1, BATCH_TOKENS // length)
            losses = []
            for batch in windows.split(size):
                losses.append(mean_losses(stock, batch))
                task.advance(batch.numel())
            results.append(LengthLosses(length, torch.cat(losses)))
    return results


def mean_losses(stock: StockModel, windows: Tensor) -> Tensor:
    """Mean loss of each window, in one pass or, where that is exact, in pieces that carry their state.

    Args:
        windows: (batch, length) token ids.

    Returns:
        (batch,) nats a token, float64, on the CPU.
    """
    if windows.shape[1] > PIECE and stock.can_carry:
        return stream_losses(stock, windows).mean(1)
    return window_losses(stock, windows.to(stock.device)).double().mean(1).cpu()


def stream_losses(stock: StockModel, windows: Tensor) -> Tensor:
    """Loss of every prediction of long windows, run in pieces that carry their state.

    Args:
        windows: (batch, length) token ids.

    Returns:
        (batch, length - 1) nats, float64, on the CPU.
    """
    state: State | None = None
    losses = []
    for start in range(0, windows.shape[1] - 1, PIECE):
        piece = windows[:, start : start + PIECE + 1].to(stock.device)
        with stock.recurrence.carried(state) as state:
            hidden = stock.hidden_states(piece[:, :-1])
        losses.append(token_losses(stock, hidden, piece[:, 1:]).double().cpu())
    return torch.cat(losses, dim=1)


def bootstrap_error(base: LengthLosses, converted: LengthLosses, seed: int = 0, draws: int = 2000) -> float | None:
    """Standard error of log(converted perplexity / base perplexity), by a paired bootstrap over windows.

    Returns:
        None where the span has fewer than two windows of this length.
    """
    change = converted.losses - base.losses
    if len(change) < 2:
        return None
    chosen = torch.randint(len(change), (draws, len(change)), generator=torch.Generator().manual_seed(seed))
    return float(change[chosen].mean(1).std())
