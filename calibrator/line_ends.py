"""Hard line ends: recognised, and taken out where the model predicts the text better without them.

Books come in lines of some 70 characters, as many models never saw text. Factors fitted to such a text are fitted
to its line ends, too, and what a model recalls of it is less than what it can.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from calibrator.loss import window_losses
from calibrator.model import StockModel

LEAST_LINES, LINE = 40, 70
TYPICAL_WIDTHS, MOST_WIDTH = (50, 90), 120
WINDOWS, WINDOW = 16, 256
Arrange = Callable[[str], str]


def is_hard_wrapped(content: str) -> bool:
    """Whether paragraphs of a text are broken into lines of about one width."""
    lines = content[: 1 << 18].splitlines()
    filled = [line for line in lines if line.strip()]
    if len(filled) < LEAST_LINES:
        return False
    widths = sorted(map(len, filled))
    going_on = sum(bool(line.strip() and after.strip()) for line, after in pairwise(lines))
    low, high = TYPICAL_WIDTHS
    return (
        low <= statistics.median(widths) <= high
        and widths[int(0.98 * (len(widths) - 1))] <= MOST_WIDTH
        and going_on > len(filled) / 2
    )


def unwrap(content: str) -> str:
    """The text with its lines and paragraphs joined by single spaces."""
    return re.sub(r"\s+", " ", content).strip()


def wrapped(windows: Tensor, stock: StockModel) -> Tensor:
    """Windows of a text (count, length) as they read with hard line ends, cut to their length again.

    A window that would become shorter, or have a token that the model does not know, stays as it is.
    """
    if stock.tokenizer is None:
        return windows
    texts = [textwrap.fill(text, LINE) for text in stock.tokenizer.batch_decode(windows)]
    found = stock.tokenizer(texts, add_special_tokens=False).input_ids
    rows = [torch.tensor(ids[: windows.shape[1]]) for ids in found]
    fits = [len(row) == windows.shape[1] and int(row.max()) < stock.rows for row in rows]
    return torch.stack([row if fit else old for row, old, fit in zip(rows, windows, fits, strict=True)])


def choose_arrangement(stock: StockModel, content: str) -> tuple[Arrange, str]:
    """How to arrange a text that starts with ``content``, and a sentence where that changes it.

    Args:
        stock: the unscaled model, its recurrence open.
    """
    if not is_hard_wrapped(content):
        return str, ""
    wrapped, unwrapped = (_nats_a_character(stock, text) for text in (content, unwrap(content)))
    if unwrapped >= wrapped:
        return str, ""
    return unwrap, (
        f"has hard line ends, which are taken out: the unscaled model predicts it better so "
        f"({unwrapped:.3f} nats a character, {wrapped:.3f} with them)."
    )


@torch.no_grad()
def _nats_a_character(stock: StockModel, content: str) -> float:
    ids = torch.tensor(stock.tokenizer(content[: 8 * WINDOWS * WINDOW]).input_ids)[: WINDOWS * WINDOW]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    if not len(windows):
        return float("inf")
    losses = [window_losses(stock, part.to(stock.device)).double().mean() for part in windows.split(4)]
    characters = len(stock.tokenizer.decode(windows.flatten()))
    return float(torch.stack(losses).mean()) * windows.numel() / characters
