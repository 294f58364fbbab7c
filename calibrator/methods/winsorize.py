"""Winsorized spectra: each layer's A clipped to its own quantiles, from the checkpoint's A_log alone.

No text, no model and no GPU: the slowest eigenvalues, whose states never settle, are moved to a quantile of their
layer, and so are the fastest. Every eigenvalue has its own factor, 1 for those between the quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from calibrator.settings import Settings
from converter.errors import UsageError
from converter.scales import ScaleSet, offered_granularities


def scales_without_data(A_log: Iterable[tuple[str, NDArray[np.float64]]], settings: Settings) -> ScaleSet:
    """Factors that clip each layer's A to its quantiles; see :func:`calibrator.methods.scales_without_data`."""
    if not 0 < settings.quantile < 0.5:
        raise UsageError(
            f"--quantile is {settings.quantile}.", "Give a number above 0 and below 0.5, such as 0.25."
        )
    if settings.form != "linear":
        raise UsageError("Winsorizing sets each eigenvalue, for which there is only one form.", "Leave out --form.")
    log_s = {}
    for name, values in A_log:
        finest = offered_granularities(values.shape)[-1]
        if settings.granularity != finest:
            raise UsageError(
                f"Winsorizing has one factor for each eigenvalue, which for {name} is granularity {finest}.",
                "Leave out --granularity.",
            )
        low, high = np.log(np.quantile(np.exp(values), [settings.quantile, 1 - settings.quantile]))
        log_s[name] = (values.clip(low, high) - values).astype(np.float32)
    return ScaleSet("linear", settings.granularity, log_s)
