"""LongPPL (arXiv:2410.23771): the perplexity of those tokens alone that a long context helps to predict.

Most tokens of a text follow from the few before them, so its perplexity says little of memory. A teacher tells the
others: it reads each token after a long and after a short context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibrator.evaluation.perplexity import prediction_losses
from calibrator.model import StockModel

LEAST_GAIN, MOST_LOSS = 2.0, 2.0
"""The paper's alpha and -beta, in nats."""
# A short context serves a quarter of its tokens, as in the authors' code.
SHARED = 4


@torch.no_grad()
def find_key_tokens(teacher: StockModel, windows: Tensor, short: int) -> Tensor:
    """The tokens that lose less than 2 nats after all of their window, and over 2 nats more after a short context.

    Args:
        teacher: its recurrence is open. Windows of its training length show what it knows.
        windows: (windows, length) token ids, each read from zero state.
        short: least tokens of the short context; those that share one have up to a quarter more.

    Returns:
        (windows, length) bool; the first ``short`` tokens of a window are never key.
    """
    step = max(1, short // SHARED)
    keys = torch.zeros(windows.shape, dtype=torch.bool)
    for row, is_key in zip(windows, keys, strict=True):
        after_short = prediction_losses(teacher, row.unfold(0, short + step, step))[:, -step:].flatten()
        after_long = prediction_losses(teacher, row[None])[0, short - 1 :][: len(after_short)]
        found = (after_short - after_long > LEAST_GAIN) & (after_long < MOST_LOSS)
        is_key[short : short + len(found)] = found
    return keys


def long_perplexity(losses: Tensor, keys: Tensor) -> float:
    """exp of the mean loss of the key tokens; NaN where there are none.

    Args:
        losses: (windows, length - 1) nats of a model's predictions, in windows of any length.
        keys: as :func:`find_key_tokens` gives them of the same text, in windows of any length.
    """
    return math.exp(losses[keys.reshape(len(losses), -1)[:, 1:]].mean())
