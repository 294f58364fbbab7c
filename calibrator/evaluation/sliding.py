"""The honest baseline: the unscaled model on a sliding window whose state is reset.

Windows of W tokens start every W / 2 tokens from zero state, and each predicts its second half. That keeps the
perplexity flat at any length with no calibration at all. It costs twice the passes, a restart every W / 2 tokens
when generating, and it sees nothing beyond its window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import Answers, Reader, read_answers
from calibrator.facts import Fact
from calibrator.model import StockModel

WIDTHS = (1, 2, 4)
"""Windows to choose from, in training lengths."""


@torch.no_grad()
def sliding_losses(stock: StockModel, span: Tensor, window: int) -> Tensor:
    """Loss of every prediction under a sliding window.

    Args:
        span: (rows, length) token ids; the length is a multiple of ``window``.
        window: tokens, even.

    Returns:
        (rows, length - 1) nats, float64, on the CPU.
    """
    half = window // 2
    rows = []
    for row in span:
        every = prediction_losses(stock, row.unfold(0, window, half))
        rows.append(torch.cat([every[0, : half - 1], every[:, half - 1 :].flatten()]))
    return torch.stack(rows)


def at_end(window: int) -> Reader:
    """Shows a model the last ``window`` tokens of a prompt alone."""

    def read(stock: StockModel, rows: Tensor, prompt: int, facts: Sequence[Fact], _opening: int) -> Answers:
        first = max(0, prompt - window)
        return read_answers(stock, rows[:, first:], prompt - first, facts)

    return read


def choose_window(stock: StockModel, rows: Sequence[Tensor], train_len: int) -> int:
    """The best of a few windows on text that is not the one to measure on.

    Args:
        rows: token ids of each document.
    """
    longest = max(rows, key=len)
    even = train_len // 2 * 2
    widths = [width * even for width in WIDTHS if 2 * width * even <= len(longest)] or [even]
    count = min(16 * even, len(longest)) // max(widths) * max(widths)
    losses = {width: float(sliding_losses(stock, longest[None, :count], width).mean()) for width in widths}
    return min(losses, key=lambda width: losses[width])
