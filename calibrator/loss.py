"""Next-token loss in slices, so that the scores of a long window over a large vocabulary never stand in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calibrator.model import StockModel

SLICE_SCORES = 1 << 26


def token_losses(
    stock: StockModel, hidden: Tensor, targets: Tensor, reference: Tensor | None = None, anchor: float = 0.0
) -> Tensor:
    """Loss of every prediction.

    Args:
        hidden: (batch, length, hidden_size) as :meth:`StockModel.hidden_states` returns them.
        targets: (batch, length), the token that follows each position.
        reference: as ``hidden``, of another model; the divergence of the predictions from its predictions,
            KL(reference ‖ model), comes on top ``anchor`` times.

    Returns:
        (batch, length) nats, float32.
    """
    size = max(1, SLICE_SCORES // (stock.vocab_size * hidden.shape[0] * (1 if reference is None else 2)))
    slices = []
    for start in range(0, hidden.shape[1], size):
        part = slice(start, start + size)
        other = None if reference is None else reference[:, part]
        words = (stock, hidden[:, part], targets[:, part], other, anchor)
        if size < hidden.shape[1] and torch.is_grad_enabled() and hidden.requires_grad:
            slices.append(checkpoint(_slice_losses, *words, use_reentrant=False))
        else:
            slices.append(_slice_losses(*words))
    return torch.cat(slices, dim=1)


def _slice_losses(
    stock: StockModel, hidden: Tensor, targets: Tensor, reference: Tensor | None, anchor: float
) -> Tensor:
    log_q = stock.logits(hidden).log_softmax(-1)
    losses = -log_q.gather(-1, targets.to(log_q.device)[..., None]).squeeze(-1)
    if reference is None:
        return losses
    log_p = stock.logits(reference).log_softmax(-1)
    return losses + anchor * (log_p.exp() * (log_p - log_q)).sum(-1)


def window_losses(
    stock: StockModel, windows: Tensor, reference: Tensor | None = None, anchor: float = 0.0
) -> Tensor:
    """Loss of every prediction inside windows that start from zero state.

    Args:
        windows: (batch, length) token ids.
        reference, anchor: see :func:`token_losses`; ``reference`` has all ``length`` positions.

    Returns:
        (batch, length - 1) nats.
    """
    expected = None if reference is None else reference[:, :-1]
    return token_losses(stock, stock.hidden_states(windows)[:, :-1], windows[:, 1:], expected, anchor)
