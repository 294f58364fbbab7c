"""SPSA (Mamba Modulation, algorithm 3): gradients guessed from the loss under random perturbations alone.

Each probe perturbs all factors at once by ±c and takes the difference of two losses for the slope along that sign
pattern. Without a preset it walks in log s from s = 1 under Adam, with several probes on the same windows a step
and mixed lengths, and validation chooses the iterate. The preset ``paper`` is the setting of the paper's perplexity
figures, and keeps its last iterate: 30 steps in s from a random start in (0.75, 1), one probe, c = 0.1 / (1+k)^0.1
and a rate of 0.001 cos(kπ / 198), s at least 0.01, perplexity of 20 windows of the target length as the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from calibrator.evaluation.perplexity import prediction_losses

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.validation import Candidate
    from converter.reporting import Task

STEPS, PROBES, RATE, SPREAD = 40, 4, 0.05, 0.1
BETAS = (0.8, 0.95)
SPREAD_DECAY = 0.1
# The paper's setting. The rate falls to 0 over HORIZON steps, with more steps over all of them.
START, FLOOR, WINDOWS = (0.75, 1.0), 0.01, 20
PAPER_STEPS, PAPER_RATE, HORIZON = 30, 0.001, 99


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """Walk with or without the preset; see the module."""
    with torch.no_grad():
        return _free_walk(problem) if problem.settings.preset is None else _paper_walk(problem)


def _free_walk(problem: Problem) -> tuple[Candidate, int]:
    settings, validation = problem.settings, problem.validation
    steps, rate = settings.steps or STEPS, settings.lr or RATE
    # What lies within the training length is the short windows' part, unless there is nothing beyond it.
    first = settings.train_len - 1 if settings.train_len < settings.target_len else 0
    log_s = parameters_to_vector(problem.scaling.parameters()).double().cpu()
    optimizer = torch.optim.Adam([log_s], lr=rate, betas=BETAS)
    if saved := problem.resume():
        log_s.copy_(saved["log_s"])
        optimizer.load_state_dict(saved["optimizer"])

    def take_step(step: int, task: Task) -> None:
        long = problem.sampler.draw(settings.target_len, 1)
        short = problem.sampler.draw(settings.train_len, settings.short_windows)

        def loss(point: Tensor) -> float:
            _move(problem, point)
            beyond = prediction_losses(problem.stock, long)[:, first:]
            return float(beyond.mean() + prediction_losses(problem.stock, short).mean())

        spread = SPREAD / (1 + step) ** SPREAD_DECAY
        log_s.grad = _slopes(loss, log_s, spread, settings.probes or PROBES, problem.sampler.generator)
        optimizer.param_groups[0]["lr"] = rate * math.cos(0.5 * math.pi * step / steps)
        optimizer.step()
        if (step + 1) * settings.validations // steps > step * settings.validations // steps:
            _move(problem, log_s)
            candidate = validation.judge(step + 1)
            task.describe(f"Calibrating (validation {candidate.objective:+.3f} nats a token)")

    problem.run_steps(steps, saved, take_step, lambda: {"log_s": log_s, "optimizer": optimizer.state_dict()})
    return validation.best, steps


def _paper_walk(problem: Problem) -> tuple[Candidate, int]:
    settings, generator = problem.settings, problem.sampler.generator
    windows = problem.sampler.draw(settings.target_len, WINDOWS)
    # Not used: with it a seed gives the factors that stand in the results.
    problem.sampler.draw(settings.target_len, 1)
    log_s = parameters_to_vector(problem.scaling.parameters()).double().cpu()
    s = torch.empty_like(log_s).uniform_(*START, generator=generator)
    steps = settings.steps or PAPER_STEPS
    if saved := problem.resume():
        s.copy_(saved["s"])

    def perplexity(point: Tensor) -> float:
        _move(problem, point.clamp(min=FLOOR).log())
        losses = [prediction_losses(problem.stock, window[None]).mean() for window in windows]
        return math.exp(torch.stack(losses).mean())

    def take_step(step: int, _task: Task) -> None:
        spread = 0.1 / (1 + step) ** SPREAD_DECAY
        slopes = _slopes(perplexity, s, spread, settings.probes or 1, generator)
        rate = (settings.lr or PAPER_RATE) * math.cos(0.5 * math.pi * step / max(HORIZON, steps))
        s.sub_(rate * slopes).clamp_(min=FLOOR)

    problem.run_steps(steps, saved, take_step, lambda: {"s": s})
    _move(problem, s.log())
    candidate = problem.validation.judge(steps)
    if candidate.objective > 0:
        problem.reporter.warn(
            f"The preset paper keeps its last factors, although on validation text they are worse than "
            f"none by {candidate.objective:.3f} nats a token."
        )
    return candidate, steps


def _slopes(
    loss: Callable[[Tensor], float], point: Tensor, spread: float, probes: int, generator: torch.Generator
) -> Tensor:
    """Guess the gradient at ``point`` from pairs of losses at ±``spread`` along random signs."""
    gradient = torch.zeros_like(point)
    for _ in range(probes):
        signs = torch.randint(2, point.shape, generator=generator, dtype=point.dtype) * 2 - 1
        difference = loss(point + spread * signs) - loss(point - spread * signs)
        gradient += difference / (2 * spread * probes) * signs
    return gradient


def _move(problem: Problem, log_s: Tensor) -> None:
    """Put the factors of one vector onto the model."""
    parameters = problem.scaling.parameters()
    parts = log_s.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view(parameter.shape))
