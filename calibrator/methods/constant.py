"""One factor for every eigenvalue (Mamba Modulation, section 5.1): given, or searched for on validation text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrator.settings import Settings
from converter.errors import UsageError
from converter.scales import ScaleSet

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.validation import Candidate

# In eighths of an octave: factors of 2, then of its roots down to 1.09, around the best so far.
STRIDES = (8, 4, 2, 1)
EIGHTH = math.log(2) / 8
FARTHEST = 32


def scales_without_data(A_log: Iterable[tuple[str, NDArray[np.float64]]], settings: Settings) -> ScaleSet | None:
    """The factor that was given, for every layer; see :func:`calibrator.methods.scales_without_data`."""
    if settings.factor is None:
        return None
    if not 0 < settings.factor < math.inf:
        raise UsageError(f"--factor is {settings.factor}.", "Give a number above 0, such as 1.5.")
    shapes = {name: values.shape for name, values in A_log}
    ones = ScaleSet.ones(shapes, settings.granularity, settings.form)
    return _filled(ones, math.log(settings.factor))


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """Walk from 1 to the better neighbour with strides that become smaller; see :mod:`calibrator.methods`."""
    validation = problem.validation
    problem.resume()
    # The walk is the same at every run, so a resumed one finds its first candidates judged already.
    judged = dict(enumerate(validation.candidates))
    best, place, step = validation.unscaled, 0, 0
    tried = {place}

    with problem.reporter.task("Searching for the factor", len(STRIDES)) as task:
        for stride in STRIDES:
            start = None
            while start != place:
                start = place
                for neighbour in (start + stride, start - stride):
                    if neighbour in tried or abs(neighbour) > FARTHEST:
                        continue
                    tried.add(neighbour)
                    step += 1
                    problem.scaling.load(_filled(validation.unscaled.scales, neighbour * EIGHTH))
                    candidate = judged.get(step) or validation.judge(step)
                    problem.save(step)
                    problem.reporter.detail(
                        f"factor {math.exp(neighbour * EIGHTH):.3f}: {candidate.objective:+.4f} nats a token"
                    )
                    if candidate.allowed and candidate.objective < best.objective:
                        best, place = candidate, neighbour
            task.advance()
    return best, step


def _filled(ones: ScaleSet, log_s: float) -> ScaleSet:
    filled = {name: np.full_like(values, log_s) for name, values in ones.log_s.items()}
    return ScaleSet(ones.form, ones.granularity, filled)
