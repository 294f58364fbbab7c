"""MambaExtend: the time step Δ is scaled in place of A, and folded into stock weights.

Its authors find the factors by backward passes or by SPSA, and so does this: by gradient, or with a ``--preset``
or ``--probes`` by SPSA. Since Δ enters as Δ·A and Δ·B, a scaled Δ is a scaled A together with D / s and, where no
gated norm divides the factor out again, out_proj · s; that is how the factors are run here and how they are
written. The fold is exact except for a gated norm's eps and the number format of the folded weights, and
:func:`scaled_steps` runs the model with Δ truly scaled to measure both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibrator.methods import gradient, spsa
from converter.scales import ScaleSet

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.model import StockModel
    from calibrator.validation import Candidate


def _is_by_spsa(problem: Problem) -> bool:
    return problem.settings.preset is not None or problem.settings.probes is not None


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """See the module and :mod:`calibrator.methods`."""
    return spsa.calibrate(problem) if _is_by_spsa(problem) else gradient.calibrate(problem)


@contextmanager
def scaled_steps(stock: StockModel, scales: ScaleSet) -> Iterator[None]:
    """While open, the model as it was given runs with Δ truly scaled: the time step itself, no folded weights.

    Args:
        scales: with target ``delta``; one factor a layer, head or channel.
    """
    factors = {}
    for key, log_s in scales.log_s.items():
        values = torch.from_numpy(log_s).to(stock.device).exp()
        factors[key] = values if len(stock.A_log[key].shape) == 1 else values[..., 0]
    calls: Counter[str] = Counter()

    def step(key: str, delta: Tensor) -> Tensor:
        factor = factors[key]
        if factor.dim() == 2:
            # Zamba scans its heads one after the other.
            factor = factor[calls[key] % len(factor)]
            calls[key] += 1
        return delta * factor

    with stock.recurrence.stepping(step):
        yield
