"""Gradient calibration (Mamba Modulation, algorithm 2): Adam on log s through the frozen model.

Each step sees a piece of a long stream of text and a handful of windows of the training length. Where the model
can carry its state, the stream is many times the target length and runs in pieces: a piece starts from the state
that the text before it left, and the state's trace brings the gradient of its own past (real-time recurrent
learning, exact within a layer). So a step costs a short window and sees the state of a very long one.

On the windows of the training length the loss has a second part, the divergence of the predictions from the
unscaled model's. There the unscaled model is right, whatever the text; without it the factors would adapt to the
style of the calibration text, and lose on others what they gain on that.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibrator.loss import token_losses, window_losses
from calibrator.recurrence import CarriedState, State
from calibrator.work import Work

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.validation import Candidate

LEARNING_RATE = 0.2
STEPS = {"layer": 50, "head": 50}
STEPS_OF_FINE_FACTORS = 160
WARMUP_STEPS = 5
SHORT_WEIGHT = 2.0
ANCHOR = 2.0
BETAS = (0.9, 0.99)
STREAM_TARGETS = 8
PIECE_TRAIN_LENS = 8


@dataclass(frozen=True)
class Stream:
    """A long window on its way through the model.

    Attributes:
        tokens: (streams of this process, length + 1) token ids.
        position: tokens done.
        state: of every layer at ``position``; None at the start.
    """

    tokens: Tensor
    position: int = 0
    state: State | None = None


def default_steps(granularity: str) -> int:
    """Steps that suffice: few factors settle sooner."""
    return STEPS.get(granularity, STEPS_OF_FINE_FACTORS)


def work(problem: Problem) -> Work:
    """A piece of the stream and the short windows, forward and backward, at each step."""
    settings = problem.settings
    _, piece = stream_and_piece(problem)
    short = settings.short_windows * settings.train_len
    steps = settings.steps or default_steps(settings.granularity)
    return Work(
        judgements=settings.validations,
        forward=steps * short,
        backward=steps * (settings.streams * piece + short),
        together=max(settings.streams * piece, short),
        checkpointed=not problem.stock.can_carry,
    )


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """Tune the factors; see the module."""
    settings, scaling = problem.settings, problem.scaling
    steps = settings.steps or default_steps(settings.granularity)
    rate = settings.lr or LEARNING_RATE
    optimizer = torch.optim.Adam(scaling.parameters(), lr=rate, betas=BETAS)
    stream: Stream | None = None
    short_weight = SHORT_WEIGHT
    start = 0
    if saved := problem.journal.resume():
        start, short_weight, stream = _restore(problem, optimizer, saved)
    with problem.reporter.task("Calibrating", steps) as task:
        task.advance(start)
        for step in range(start, steps):
            for group in optimizer.param_groups:
                warmup = min(1.0, (step + 1) / WARMUP_STEPS)
                group["lr"] = rate * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            long_loss, stream = _stream_step(problem, stream)
            short_loss = _short_step(problem, short_weight)
            problem.ranks.sum_gradients(scaling.parameters())
            optimizer.step()
            if problem.reporter.verbose:
                # Reading the losses waits for the GPU, which otherwise never runs out of work.
                problem.reporter.detail(
                    f"step {step + 1}: loss {long_loss:.4f} in the stream, {short_loss:.4f} short"
                )
            if (step + 1) * settings.validations // steps > step * settings.validations // steps:
                task.describe("Validating")
                candidate = problem.validation.judge(step + 1)
                if not candidate.allowed:
                    short_weight *= 2
                task.describe(f"Calibrating (validation {candidate.objective:+.3f} nats a token)")
            task.advance()
            done = step + 1
            now = stream
            last = done == steps
            problem.journal.save(lambda: _save(problem, optimizer, done, short_weight, now), last=last)  # noqa: B023
    return problem.validation.best, steps


def _stream_step(problem: Problem, stream: Stream | None) -> tuple[Tensor, Stream]:
    """Backward through the next piece of the stream; draws a new stream where one ends."""
    stock, settings, ranks = problem.stock, problem.settings, problem.ranks
    length, piece = stream_and_piece(problem)
    if stream is None or stream.position >= length:
        stream = Stream(stock.place(ranks.rows(problem.sampler.draw(length + 1, settings.streams))))
    tokens = stream.tokens[:, stream.position : stream.position + piece + 1]
    # What lies within the training length is the short windows' part.
    first = max(0, settings.train_len - stream.position)
    first = 0 if first >= piece else first

    def loss() -> Tensor:
        losses = token_losses(stock, stock.hidden_states(tokens[:, :-1]), tokens[:, 1:])
        return losses[:, first:].mean() / ranks.size

    carried = partial(stock.recurrence.carried, stream.state) if stock.can_carry else nullcontext
    value, after = problem.activations.backward(tokens[:, 1:].numel(), loss, carried)
    return value * ranks.size, Stream(stream.tokens, stream.position + piece, after)


def stream_and_piece(problem: Problem) -> tuple[int, int]:
    """Length of a stream and of a piece, in tokens: one whole window where the model cannot carry its state."""
    settings = problem.settings
    if not problem.stock.can_carry:
        return settings.target_len, settings.target_len
    piece = min(settings.target_len, PIECE_TRAIN_LENS * settings.train_len)
    room = problem.sampler.longest() - 1
    return min(STREAM_TARGETS * settings.target_len, room) // piece * piece, piece


def _short_step(problem: Problem, weight: float) -> Tensor:
    """Backward through windows of the training length, held to what the unscaled model predicts there."""
    settings = problem.settings
    windows = problem.sampler.draw(settings.train_len, settings.short_windows)
    windows = problem.stock.place(problem.ranks.rows(windows))
    share = weight * len(windows) / settings.short_windows
    with torch.no_grad(), problem.scaling.off():
        unscaled = problem.stock.hidden_states(windows)
    value, _ = problem.activations.backward(
        windows.numel(), lambda: share * window_losses(problem.stock, windows, unscaled, ANCHOR).mean()
    )
    return value / share


def _save(
    problem: Problem, optimizer: torch.optim.Optimizer, step: int, short_weight: float, stream: Stream
) -> dict[str, Any]:
    state = {key: vars(value) for key, value in (stream.state or {}).items()}
    return {
        "step": step,
        "short_weight": short_weight,
        "log_s": [parameter.detach() for parameter in problem.scaling.parameters()],
        "optimizer": optimizer.state_dict(),
        "generator": problem.sampler.generator.get_state(),
        "stream": {"tokens": stream.tokens, "position": stream.position, "state": state},
        "validation": problem.validation.state(),
    }


def _restore(
    problem: Problem, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> tuple[int, float, Stream]:
    with torch.no_grad():
        for parameter, value in zip(problem.scaling.parameters(), saved["log_s"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    problem.sampler.generator.set_state(saved["generator"])
    problem.validation.restore(saved["validation"])
    stream = saved["stream"]
    state = {key: CarriedState(**value) for key, value in stream["state"].items()} or None
    return saved["step"], saved["short_weight"], Stream(stream["tokens"], stream["position"], state)
