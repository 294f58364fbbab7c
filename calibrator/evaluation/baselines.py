"""The honest baselines, which take no scaling: a sliding window, and chunks of a text read one by one.

Sliding: windows of W tokens start every W / 2 tokens from zero state, and each predicts its second half. That
keeps the perplexity flat at any length with no calibration at all. It costs twice the passes, a restart every W /
2 tokens when generating, and it sees nothing beyond its window.

Chunks (OPRM, arXiv:2505.07793) are for questions that need no long memory. Each is read from zero state, the
announcement before it and the question behind it. The answer is that of the chunk after which the prediction of
its first token has the lowest entropy. That takes about as many tokens as one pass, again for every question, and
finds a fact anywhere, but nothing that stands in two chunks. The authors also drop chunks after which an
instructed model says that there is no answer; the models here are not instructed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import Answers, Reader, read_answers
from calibrator.facts import Fact
from calibrator.model import StockModel
from converter.errors import UsageError

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


def choose_window(stock: StockModel, rows: Sequence[Tensor], train_len: int, most: int) -> int:
    """The best of a few windows on text that is not the one to measure on.

    Args:
        rows: token ids of each document.
        most: tokens of the text to measure on, which must hold a window.
    """
    longest = max(rows, key=len)
    even, room = train_len // 2 * 2, min(most, len(longest) // 2)
    widths = [width * even for width in WIDTHS if width * even <= room] or [even]
    count = min(16 * even, len(longest)) // max(widths) * max(widths)
    losses = {width: float(sliding_losses(stock, longest[None, :count], width).mean()) for width in widths}
    return min(losses, key=lambda width: losses[width])


def in_chunks(window: int) -> Reader:
    """Shows a model ``window`` tokens at once: announcement, chunk and question."""

    def read(stock: StockModel, rows: Tensor, prompt: int, facts: Sequence[Fact], opening: int) -> Answers:
        every = (_surest(stock, row, prompt, fact, opening, window) for row, fact in zip(rows, facts, strict=True))
        return Answers(*map(torch.stack, zip(*every, strict=True)))

    return read


def _surest(stock: StockModel, row: Tensor, prompt: int, fact: Fact, opening: int, window: int) -> Answers:
    """The answer of one chunk of one prompt; each entry is a scalar."""
    asked = prompt - len(fact.question)
    start, end = row[:opening], row[asked : prompt + len(fact.answer)]
    room = window - opening - len(fact.question)
    if room < 1:
        raise UsageError(f"Chunks of {window} tokens have no room beside a question.", "Choose longer ones.")
    *even, last = row[opening:asked].split(room)
    batches = torch.stack(even).split(max(1, stock.tokens_at_once // window)) if even else ()
    found = []
    for batch in (*batches, last[None]):
        texts = torch.cat([start.expand(len(batch), -1), batch, end.expand(len(batch), -1)], dim=1)
        found.append(read_answers(stock, texts, texts.shape[1] - len(fact.answer), [fact] * len(batch)))
    answers = Answers(*map(torch.cat, zip(*found, strict=True)))
    return Answers(*(values[answers.entropy.argmin()] for values in answers))
