"""A spectral floor: no eigenvalue of A slower than the training length, with hardly any text and no training.

An eigenvalue forgets over 1 / (|A| Δ) tokens. One that takes far longer than the training length has never settled
while the model was trained, and what it adds up beyond that length drowns the rest. The floor multiplies it by
just what brings its time down to τ tokens: log s = max(0, log(1 / (τ |A| Δ̄))), Δ̄ the channel's mean step on a few
windows of text. Eigenvalues that are fast enough keep s = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibrator.text import tiled
from converter.errors import UsageError
from converter.scales import ScaleSet, factor_shape

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.model import StockModel
    from calibrator.scaling import Scaling
    from calibrator.validation import Candidate
    from converter.reporting import Reporter

WINDOWS = 16
# Of the training length; the best on validation text is kept. A calibration starts higher, with room to move.
TAUS = (1.0, 0.5, 2.0)
START_TAU = 2.0
# Of log s: a channel that never steps has no time constant to bring down.
MOST = 20.0


def floor_scales(stock: StockModel, scaling: Scaling, steps: dict[str, Tensor], tau: float) -> ScaleSet:
    """The floor at ``tau`` tokens.

    Args:
        steps: mean Δ of each layer, as :func:`mean_steps` returns them. Layers without one keep s = 1.

    Returns:
        A set of the scaling's form (linear) and granularity; where several eigenvalues share a factor it is the
        largest that one of them needs.
    """
    log_s = {}
    for key, A_log in stock.A_log.items():
        need = torch.zeros(A_log.shape, dtype=torch.float64)
        if key in steps:
            A = A_log.double().exp().cpu()
            need = -(tau * A * beside(steps[key], A)).log().clamp(-MOST, 0)
        shape = factor_shape(tuple(need.shape), scaling.granularity)
        shared = [axis for axis, size in enumerate(shape) if size == 1 and need.shape[axis] != 1]
        log_s[key] = (need.amax(shared, keepdim=True) if shared else need).float().numpy()
    return ScaleSet("linear", scaling.granularity, log_s)


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """Judge the floor at ``--tau``, or a few around the training length; see :mod:`calibrator.methods`."""
    settings = problem.settings
    if settings.form != "linear":
        raise UsageError("The floor multiplies A, which is the linear form.", "Leave out --form.")
    taus = [settings.tau] if settings.tau else [share * settings.train_len for share in TAUS]
    steps = text_steps(problem)
    for number, tau in enumerate(taus, 1):
        problem.scaling.load(floor_scales(problem.stock, problem.scaling, steps, tau))
        problem.validation.judge(number)
    return problem.validation.best, len(taus)


def start_floor(problem: Problem) -> ScaleSet | None:
    """The floor at twice the training length for a calibration to start from; None if it changes nothing."""
    settings = problem.settings
    if settings.form != "linear":
        return None
    scales = floor_scales(problem.stock, problem.scaling, text_steps(problem), START_TAU * settings.train_len)
    return scales if any(values.any() for values in scales.log_s.values()) else None


def text_steps(problem: Problem) -> dict[str, Tensor]:
    """Mean Δ of each layer on windows of the calibration text, with the unscaled model."""
    settings = problem.settings
    windows = torch.stack(tiled(problem.sampler.longest, settings.train_len)[:WINDOWS])

    def measure() -> dict[str, Tensor]:
        with problem.scaling.off():
            return mean_steps(problem.stock, windows, problem.reporter, "the text")

    # Of the first process for all, so that they start from the same factors to the last bit.
    return problem.ranks.from_first(measure)


@torch.no_grad()
def mean_steps(stock: StockModel, windows: Tensor, reporter: Reporter, what: str) -> dict[str, Tensor]:
    """Mean Δ of every layer over the tokens of windows.

    Returns:
        The A_log's name to (heads or channels,) float64 on the CPU, in the order in which A_log has them.
    """
    totals: dict[str, Tensor] = {}
    # A layer may scan its heads one after the other, in several calls a pass: these are put side by side.
    seen: dict[str, list[Tensor]] = {}

    def see(key: str, delta: Tensor) -> Tensor:
        seen.setdefault(key, []).append(delta.double().mean((0, 1)).cpu())
        return delta

    with reporter.task(f"Steps of {what}", windows.numel()) as task:
        for row in windows:
            seen.clear()
            with stock.recurrence.stepping(see):
                stock.hidden_states(row[None].to(stock.device))
            for key, calls in seen.items():
                totals[key] = totals.get(key, torch.zeros(1)) + torch.cat(calls) / len(windows)
            task.advance(len(row))
    return totals


def beside(step: Tensor, A: Tensor) -> Tensor:
    """Steps in a shape that broadcasts against A: (heads,), (channels, states) or (heads, channels, states)."""
    shape = A.shape if A.numel() == step.numel() else (*A.shape[:-1], 1)
    return step.reshape(shape)
