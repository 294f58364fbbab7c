"""Gradient calibration (Mamba Modulation, algorithm 2): Adam on log s through the frozen model.

Each step sees a piece of a long stream of text and a handful of windows of the training length. The stream is many
times the target length and runs in pieces: a piece starts from the state that the text before it left, and the
state's trace brings the gradient of its own past (real-time recurrent learning, exact within a layer). So a step
costs a short window and sees the state of a very long one. Attention keeps its keys from piece to piece, no more
than it sees in the end; through them no gradient flows.

Prose alone hardly ever asks for anything far back, so factors fitted to it forget: the perplexity improves while
recall is lost. Therefore facts are planted in the stream and in half of the short windows, at distances from a few
tokens to several training lengths, and the loss of their answers counts beside the prose. The prose is held to what
the unscaled model predicts from its last training length of text: there it is right, whatever the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibrator.carried_state import State
from calibrator.facts import plant
from calibrator.line_ends import wrapped
from calibrator.loss import losses_and_divergences
from calibrator.methods.floor import start_floor

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.validation import Candidate
    from converter.reporting import Task


@dataclass(frozen=True)
class Schedule:
    """How long and how fast factors are tuned: few of them settle sooner."""

    steps: int
    rate: float


COARSE, FINE = Schedule(50, 0.2), Schedule(160, 0.1)
# Of two starts.
STEPS_OF_EACH = 40
WARMUP_STEPS = 5
BETAS = (0.9, 0.99)


# Of the divergence from the unscaled model, beside the loss of prose in the short windows. Where facts are planted
# the stream is held to that model too; without facts its prose is all there is to learn from.
HELD_BESIDE_FACTS, HELD_WITHOUT_FACTS = 1.0, 2.0
# One fact in so many tokens, and its question so many training lengths behind it at most.
PLANT_EVERY, FARTHEST_TRAIN_LENS = 250, 4
SHORT_WEIGHT, SHORT_ANSWERS = 2.0, 3.0
STREAM_TARGETS = 8
PIECE_TRAIN_LENS = 8


@dataclass(frozen=True)
class Stream:
    """A long window on its way through the model.

    Attributes:
        tokens: (streams of this process, length + 1) token ids.
        answers: as ``tokens``, whether a token answers a planted question.
        position: tokens done.
        state: of every layer at ``position``; None at the start.
    """

    tokens: Tensor
    answers: Tensor
    position: int = 0
    state: State | None = None


@dataclass
class Run:
    """What changes from step to step, beside the factors.

    Attributes:
        stream: None before the first step.
        short_weight: of the windows of the training length; it grows when a candidate fails there.
    """

    optimizer: torch.optim.Optimizer
    stream: Stream | None = None
    short_weight: float = SHORT_WEIGHT


def schedule(granularity: str) -> Schedule:
    """The default schedule of a granularity."""
    return COARSE if granularity in ("layer", "head") else FINE


def calibrate(problem: Problem) -> tuple[Candidate, int]:
    """Tune the factors from each start; see the module."""
    settings, scaling = problem.settings, problem.scaling
    usual = schedule(settings.granularity)
    rate = settings.lr or usual.rate

    def begin() -> Run:
        return Run(torch.optim.Adam(scaling.parameters(), lr=rate, betas=BETAS))

    saved = problem.resume()
    starts = saved["starts"] if saved else _start(problem)
    each = settings.steps or (usual.steps if starts == 1 else STEPS_OF_EACH)
    run = begin()
    if saved:
        _restore(problem, run, saved)

    def take_step(step: int, task: Task) -> None:
        nonlocal run
        within = step % each
        if step and within == 0:
            scaling.load(problem.validation.unscaled.scales)
            run = begin()
        for group in run.optimizer.param_groups:
            warmup = min(1.0, (within + 1) / WARMUP_STEPS)
            group["lr"] = rate * warmup * 0.5 * (1 + math.cos(math.pi * within / each))
        run.optimizer.zero_grad()
        long_loss, run.stream = _stream_step(problem, run.stream)
        short_loss = _short_step(problem, run.short_weight)
        problem.ranks.sum_gradients(scaling.parameters())
        run.optimizer.step()
        if problem.reporter.verbose:
            # Reading the losses waits for the GPU, which otherwise never runs out of work.
            problem.reporter.detail(f"step {step + 1}: loss {long_loss:.4f} in the stream, {short_loss:.4f} short")
        if (within + 1) * settings.validations // each > within * settings.validations // each:
            task.describe("Validating")
            candidate = problem.validation.judge(step + 1)
            if not candidate.allowed:
                run.short_weight *= 2
            task.describe(f"Calibrating (validation {candidate.objective:+.3f} nats a token)")

    problem.run_steps(starts * each, saved, take_step, lambda: {"starts": starts, **_state(problem, run)})
    return problem.validation.best, starts * each


def _start(problem: Problem) -> int:
    """Set the factors to the spectral floor where validation prefers it to s = 1; returns how many starts to try.

    From s = 1 gradients do not find the way out of states that have never settled. From the floor a few heads do
    not always find the way back to what lies far behind. So where there are skills to keep and few factors to tune,
    s = 1 is the second start, and validation decides.
    """
    scales = start_floor(problem)
    if scales is None:
        return 1
    problem.scaling.load(scales)
    # It is judged under the number of the step that starts from it.
    if not problem.validation.judge(1).objective < 0:
        problem.scaling.load(problem.validation.unscaled.scales)
        return 1
    return 2 if problem.skills.kinds and schedule(problem.settings.granularity) is COARSE else 1


def _stream_step(problem: Problem, stream: Stream | None) -> tuple[Tensor, Stream]:
    """Backward through the next piece of the stream; draws a new stream where one ends."""
    stock, settings, ranks = problem.stock, problem.settings, problem.ranks
    length, piece, keep = stream_and_piece(problem)
    if stream is None or stream.position >= length:
        drawn = problem.sampler.draw(length + 1, settings.streams)
        tokens, answers = _planted(problem, drawn, FARTHEST_TRAIN_LENS * settings.train_len)
        stream = Stream(stock.place(ranks.rows(tokens)), stock.place(ranks.rows(answers)))
    start, end = stream.position, stream.position + piece
    tokens, answers = stream.tokens[:, start : end + 1], stream.answers[:, start + 1 : end + 1]
    # What lies within the training length is the short windows' part.
    first = max(0, settings.train_len - start)
    first = 0 if first >= piece else first
    teacher = _teacher(problem, stream.tokens, start + first, end) if problem.skills.kinds else None

    def loss() -> Tensor:
        hidden = stock.hidden_states(tokens[:, :-1])[:, first:]
        targets, asked = tokens[:, first + 1 :], answers[:, first:]
        losses, divergences = losses_and_divergences(stock, hidden, targets, teacher)
        prose = losses + HELD_BESIDE_FACTS * divergences
        return (_mean(prose, ~asked) + _mean(losses, asked)) / ranks.size

    carried = partial(stock.recurrence.carried, stream.state, keep)
    value, after = problem.activations.backward(tokens[:, 1:].numel(), loss, carried)
    return value * ranks.size, Stream(stream.tokens, stream.answers, end, after)


def _planted(problem: Problem, windows: Tensor, farthest: int) -> tuple[Tensor, Tensor]:
    """Windows with facts in them, and which of their tokens are answers: two of (count, length)."""
    if not problem.skills.kinds:
        return windows, torch.zeros_like(windows, dtype=torch.bool)
    place = partial(
        plant,
        source=problem.facts,
        kinds=problem.skills.planted,
        generator=problem.sampler.generator,
        every=PLANT_EVERY,
        nearest=problem.settings.train_len // 8,
        farthest=farthest,
    )
    rows = [place(row) for row in windows]
    return torch.stack([row for row, _ in rows]), torch.stack([answers for _, answers in rows])


@torch.no_grad()
def _teacher(problem: Problem, tokens: Tensor, start: int, end: int) -> Tensor:
    """What the unscaled model makes of positions ``start`` to ``end``, each from half a training length or more.

    Args:
        tokens: (streams, length) token ids.

    Returns:
        (streams, end - start, hidden_size) hidden states.
    """
    train_len = problem.settings.train_len
    half = train_len // 2
    if start < half:
        # Nothing lies before: one window from zero state, as the model itself reads it.
        with problem.scaling.off():
            return problem.stock.hidden_states(tokens[:, :end])[:, start:]
    count = -(-(end - start) // half)
    read = tokens[:, start - half : start + count * half]
    missing = (count + 1) * half - read.shape[1]
    windows = torch.nn.functional.pad(read, (0, missing)).unfold(1, 2 * half, half)
    rows = problem.stock.batches(windows.reshape(-1, 2 * half))
    with problem.scaling.off():
        hidden = torch.cat([problem.stock.hidden_states(part)[:, half:] for part in rows])
    return hidden.view(len(tokens), count * half, -1)[:, : end - start]


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen places, 0 where there are none."""
    return _sum(values, chosen) / chosen.to(values.device).float().sum().clamp(min=1)


def _sum(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen.to(values.device).float()).sum()


def stream_and_piece(problem: Problem) -> tuple[int, int, int | None]:
    """Length of a stream and of a piece, and how many keys attention keeps, in tokens."""
    settings, recurrence = problem.settings, problem.stock.recurrence
    piece = min(settings.target_len, PIECE_TRAIN_LENS * settings.train_len, recurrence.longest_pass)
    piece, keep = recurrence.piece_and_keys(piece, settings.attention_window or settings.target_len)
    room = len(problem.sampler.longest) - 1
    return min(STREAM_TARGETS * settings.target_len, room) // piece * piece, piece, keep


def _short_step(problem: Problem, weight: float) -> Tensor:
    """Backward through windows of the training length, held to the unscaled model.

    Half of them have facts, the others hard line ends: text in either layout is to be predicted as before.
    """
    settings = problem.settings
    windows = problem.sampler.draw(settings.train_len, settings.short_windows)
    answers = torch.zeros_like(windows, dtype=torch.bool)
    windows[::2], answers[::2] = _planted(problem, windows[::2], settings.train_len)
    windows[1::2] = wrapped(windows[1::2], problem.stock)
    # Means over the windows of all processes, which share the facts unevenly.
    asked = int(answers[:, 1:].sum())
    told = answers[:, 1:].numel() - asked
    windows, answers = (problem.stock.place(problem.ranks.rows(rows)) for rows in (windows, answers))
    with torch.no_grad(), problem.scaling.off():
        teacher = problem.stock.hidden_states(windows)[:, :-1]

    held = HELD_BESIDE_FACTS if problem.skills.kinds else HELD_WITHOUT_FACTS

    def loss() -> Tensor:
        hidden = problem.stock.hidden_states(windows)[:, :-1]
        losses, divergences = losses_and_divergences(problem.stock, hidden, windows[:, 1:], teacher)
        prose = losses + held * divergences
        # An answer counts by how far it is from the unscaled model's, as all that lies within its reach.
        due = _sum(prose, ~answers[:, 1:]) / told
        return weight * (due + SHORT_ANSWERS * _sum(divergences, answers[:, 1:]) / max(1, asked))

    value, _ = problem.activations.backward(windows.numel(), loss)
    return value / weight


def _state(problem: Problem, run: Run) -> dict[str, Any]:
    assert run.stream is not None
    return {
        "short_weight": run.short_weight,
        "log_s": [parameter.detach() for parameter in problem.scaling.parameters()],
        "optimizer": run.optimizer.state_dict(),
        "stream": vars(run.stream),
    }


def _restore(problem: Problem, run: Run, saved: dict[str, Any]) -> None:
    """Take up what :func:`_state` returned in an interrupted run."""
    with torch.no_grad():
        for parameter, value in zip(problem.scaling.parameters(), saved["log_s"], strict=True):
            parameter.copy_(value)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.short_weight = saved["short_weight"]
    run.stream = Stream(**saved["stream"])
