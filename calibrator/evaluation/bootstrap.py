"""How far a mean over windows of a text could lie from the mean over all such text: a bootstrap over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 2000


def resample_means(values: Tensor, seed: int = 0, draws: int = DRAWS) -> Tensor:
    """Means of resampled windows, drawn in blocks of neighbours since neighbours in a text are alike.

    The circular block bootstrap (Politis and Romano, 1992), with blocks of n^(1/3) windows, the order of length
    that its authors show to be best for a mean.

    Args:
        values: (windows,) in the order of the text; or (windows, measures), every measure drawn alike.

    Returns:
        (draws,) or (draws, measures), float64.
    """
    count = len(values)
    size = max(1, round(count ** (1 / 3)))
    starts = torch.randint(count, (draws, -(-count // size)), generator=torch.Generator().manual_seed(seed))
    chosen = (starts[..., None] + torch.arange(size)).flatten(1)[:, :count] % count
    return values.double()[chosen].mean(1)
