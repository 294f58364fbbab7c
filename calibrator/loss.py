"""Next-token loss in slices, so that the scores of a long window over a large vocabulary never stand in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from calibrator.model import StockModel

SLICE_SCORES = 1 << 26


def token_losses(stock: StockModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of every prediction.

    Args:
        hidden: (batch, length, hidden_size) as :meth:`StockModel.hidden_states` returns them.
        targets: (batch, length), the token that follows each position.

    Returns:
        (batch, length) nats, float32.
    """
    size = max(1, SLICE_SCORES // (stock.vocab_size * hidden.shape[0]))
    slices = []
    for start in range(0, hidden.shape[1], size):
        part, wanted = hidden[:, start : start + size], targets[:, start : start + size]
        if torch.is_grad_enabled() and hidden.requires_grad:
            slices.append(checkpoint(_slice_losses, stock, part, wanted, use_reentrant=False))
        else:
            slices.append(_slice_losses(stock, part, wanted))
    return torch.cat(slices, dim=1)


def _slice_losses(stock: StockModel, hidden: Tensor, targets: Tensor) -> Tensor:
    scores = stock.logits(hidden)
    targets = targets.to(scores.device)
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def window_losses(stock: StockModel, windows: Tensor) -> Tensor:
    """Loss of every prediction inside windows that start from zero state.

    Args:
        windows: (batch, length) token ids.

    Returns:
        (batch, length - 1) nats.
    """
    return token_losses(stock, stock.hidden_states(windows)[:, :-1], windows[:, 1:])
