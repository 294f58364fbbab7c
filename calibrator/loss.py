"""Next-token loss in slices, so that the logits of a long window never exist in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
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
    return _in_slices(partial(_losses, stock), stock.vocab_size, hidden, targets)[..., 0]


def losses_and_divergences(
    stock: StockModel, hidden: Tensor, targets: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of every prediction, and its divergence KL(reference || model) from another model's prediction.

    Args:
        hidden, targets: see :func:`token_losses`.
        reference: as ``hidden``, of the other model; None for divergences of zero.

    Returns:
        Two of (batch, length) nats, float32.
    """
    if reference is None:
        losses = token_losses(stock, hidden, targets)
        return losses, torch.zeros_like(losses)
    both = _in_slices(partial(_losses, stock), 2 * stock.vocab_size, hidden, targets, reference)
    losses, divergences = both.unbind(-1)
    return losses, divergences


def _in_slices(compute: Callable[..., Tensor], vocab_size: int, hidden: Tensor, *others: Tensor) -> Tensor:
    """Compute along (batch, length, ...) in slices of the length, each computed again in the backward pass."""
    size = max(1, SLICE_SCORES // (vocab_size * hidden.shape[0]))
    slices = []
    for start in range(0, hidden.shape[1], size):
        parts = [values[:, start : start + size] for values in (hidden, *others)]
        if size < hidden.shape[1] and torch.is_grad_enabled() and hidden.requires_grad:
            slices.append(checkpoint(compute, *parts, use_reentrant=False))
        else:
            slices.append(compute(*parts))
    return torch.cat(slices, dim=1)


def _losses(stock: StockModel, hidden: Tensor, targets: Tensor, reference: Tensor | None = None) -> Tensor:
    """The losses, and with a reference the divergences beside them: (batch, length, 1 or 2)."""
    log_q = stock.logits(hidden).log_softmax(-1)
    losses = -log_q.gather(-1, targets.to(log_q.device)[..., None])
    if reference is None:
        return losses
    log_p = stock.logits(reference).log_softmax(-1)
    return torch.cat([losses, (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)], dim=-1)


def window_losses(stock: StockModel, windows: Tensor) -> Tensor:
    """Loss of every prediction inside windows that start from zero state.

    Args:
        windows: (batch, length) token ids.

    Returns:
        (batch, length - 1) nats.
    """
    return token_losses(stock, stock.hidden_states(windows)[:, :-1], windows[:, 1:])
