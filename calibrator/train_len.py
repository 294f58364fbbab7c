"""The length a model was trained at: from a table of published families, or measured."""

from __future__ import annotations

import math
import re

import torch

from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.text import Text, take_span

# Training lengths as the papers, model cards and training configurations of these families state them.
FAMILIES = (
    (r"demo|demo:mamba2?|tiny-mamba2?-256", 256),
    (r"state-spaces/mamba.*slimpj", 2048),
    (r"state-spaces/(mamba2?|transformerpp)-.*", 2048),
    (r"tiiuae/falcon-mamba-.*", 8192),
    (r"Zyphra/Zamba2?-.*", 4096),
    (r"ibm-(ai-platform|fms)/Bamba-.*", 4096),
    (r"mistralai/Mamba-Codestral-.*", 256 * 1024),
    (r"ai21labs/(AI21-)?Jamba-.*", 256 * 1024),
)


def look_up_train_len(name: str) -> int | None:
    """Training length in tokens of a published model by its Hub id (or its converted copy's), else None."""
    name = name.removesuffix("-hf")
    return next((length for pattern, length in FAMILIES if re.fullmatch(pattern, name)), None)


def measure_train_len(stock: StockModel, texts: list[Text]) -> int:
    """The length past which the unscaled model's loss by position stops falling, a power of two.

    The loss is averaged over octaves of the position in windows that start from zero state; each octave's
    predictions fall on other tokens, so a fall of less than one standard error counts as none.

    Raises:
        TextError: less than 16 windows of 1,024 tokens.
    """
    longest = max(len(document) for text in texts for document in text.documents)
    length = 1 << min(14, int(math.log2(max(2, longest // 16))))
    text = max(texts, key=lambda text: text.tokens)
    windows = take_span(text, length, 16)
    with torch.no_grad(), stock.recurrence:
        losses = torch.cat([window_losses(stock, row[None].to(stock.device)).double().cpu() for row in windows])
    train_len, best = 64, float("inf")
    edge = 64
    while edge < length:
        octave = losses[:, edge // 2 : edge].mean(1)
        if float(octave.mean()) < best - float(octave.std()) / math.sqrt(len(octave)):
            train_len, best = edge, float(octave.mean())
        edge *= 2
    return train_len
