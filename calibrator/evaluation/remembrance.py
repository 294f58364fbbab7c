"""Remembrance: how much a prediction changes when all but the last tokens before it are dropped.

Recall shows what a model finds when asked; this shows what it uses without being asked. A large change far
beyond the training length is either memory or a state that diverged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from calibrator.evaluation.recall import carry
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
    whole = carry(stock, tokens[None], keep=PLACES * APART)[1][0].flip(0)[::APART]
    expected = stock.logits(whole[:, None])[:, 0].log_softmax(-1)
    changes = {}
    for distance in fitting:
        windows = torch.stack([tokens[end - distance : end] for end in ends.tolist()])
        hidden = torch.cat([carry(stock, part, keep=1)[1] for part in stock.batches(windows)])
        found = stock.logits(hidden)[:, 0].log_softmax(-1)
        changes[distance] = float((expected.exp() * (expected - found)).sum(-1).mean())
    return changes
