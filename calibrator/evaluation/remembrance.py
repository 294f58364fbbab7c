"""Remembrance: how much a prediction changes when all but the last tokens before it are dropped.

Recall shows what a model finds when asked; this shows what it uses without being asked. A large change far
beyond the training length is either memory or a state that diverged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from calibrator.evaluation.recall import hidden_at_end
from calibrator.model import StockModel

PLACES, APART = 16, 64


@torch.no_grad()
def measure_remembrance(stock: StockModel, tokens: Tensor, distances: Iterable[int]) -> dict[int, float]:
    """Mean divergence in nats of the prediction from the last ``distance`` tokens alone, from that after all.

    Args:
        stock: its recurrence is open.
        tokens: (length,) token ids; predictions at the last places, some tokens apart, are compared.
        distances: those that leave nothing out are skipped.
    """
    fitting = [distance for distance in distances if distance <= len(tokens) - PLACES * APART]
    if not fitting:
        return {}
    ends = torch.arange(len(tokens), len(tokens) - PLACES * APART, -APART)
    whole = hidden_at_end(stock, tokens[None], PLACES * APART)[0].flip(0)[::APART]
    expected = stock.logits(whole[:, None])[:, 0].log_softmax(-1)
    changes = {}
    for distance in fitting:
        windows = torch.stack([tokens[end - distance : end] for end in ends.tolist()])
        size = max(1, stock.tokens_at_once // distance)
        hidden = torch.cat([hidden_at_end(stock, part, 1) for part in windows.split(size)])
        found = stock.logits(hidden)[:, 0].log_softmax(-1)
        changes[distance] = float((expected.exp() * (expected - found)).sum(-1).mean())
    return changes
