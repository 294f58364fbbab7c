"""Tuning the scales on the answers of a task (Mamba Modulation, section 6.2): the loss on a key's digits alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibrator.evaluation.passkey import Filler, Sample, make_sample
from calibrator.journal import Journal
from calibrator.loss import token_losses
from calibrator.memory import checkpointed
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.settings import require_rate
from converter.reporting import Reporter
from converter.scales import Form, Granularity, ScaleSet

VALIDATIONS = 4
MOST_HELD_OUT = 20


@dataclass(frozen=True)
class AnswerSettings:
    """What is asked for. The paper trains on 6,144 samples of 4,096 tokens, 32 a batch, for 10 epochs.

    Attributes:
        granularity, form: see :class:`converter.scales.ScaleSet`.
        length: tokens a sample.
        samples: different questions, each at a depth of its own. epochs: how often each is seen.
        batch: questions a step.
        learning_rate: of AdamW on log s, which falls to 0 along a cosine; its weight decay pulls s towards 1.
        seed: of every random draw.

    Raises:
        UsageError: a learning rate that no optimiser takes.
    """

    granularity: Granularity
    form: Form
    length: int = 4096
    samples: int = 512
    epochs: int = 2
    batch: int = 8
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        require_rate(self.learning_rate)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.epochs * self.samples // self.batch)

    @property
    def held_out(self) -> int:
        """Further questions, at even depths, that decide which step is kept."""
        return min(MOST_HELD_OUT, max(4, self.samples // 8))


@dataclass(frozen=True)
class AnswerOutcome:
    """What the tuning found.

    Attributes:
        scales: those with the lowest loss on held-out questions; all ones where none beat the unscaled model.
        kept_step: the step they come from, 0 for the unscaled model.
        history: a held-out loss in nats a digit token for each step that was judged.
        seconds: wall time.
        journal: to be removed once the scales are safe.
    """

    scales: ScaleSet
    kept_step: int
    seconds: float
    journal: Journal
    history: list[dict[str, float]] = field(default_factory=list)


def calibrate_on_passkeys(
    stock: StockModel, filler: Filler, settings: AnswerSettings, source_revision: str, reporter: Reporter
) -> AnswerOutcome:
    """Find the scales under which a frozen model answers pass key questions best.

    Args:
        stock: its recurrence is open.
        source_revision: of the checkpoint; the journal of another is not taken up.

    Raises:
        TextError: the filler's sentences do not fit.
    """
    started = time.monotonic()
    generator = random.Random(f"held out {settings.seed}")
    depths = (number / (settings.held_out - 1) for number in range(settings.held_out))
    held_out = [make_sample(filler, settings.length, depth, generator) for depth in depths]
    scaling = Scaling(stock.mixers, stock.A_log, settings.granularity, settings.form)
    with scaling:
        unscaled = _judge(stock, scaling, held_out)
        judged: list[tuple[int, float, ScaleSet]] = [(0, unscaled, scaling.scale_set())]
        key = {
            "verb": "calibrate --task passkey",
            "source": source_revision,
            "texts": [asdict(filler.text.record("filler"))],
            "settings": asdict(settings),
            "device": stock.device.type,
        }
        journal = Journal(key, reporter)
        optimizer = torch.optim.AdamW(scaling.parameters(), lr=settings.learning_rate)
        start = 0
        if saved := journal.resume():
            start, judged = _restore(scaling, optimizer, judged[0], saved)
        with reporter.task("Tuning on pass keys", settings.steps) as task:
            task.advance(start)
            for step in range(start, settings.steps):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
                optimizer.zero_grad()
                loss = _backward(stock, _batch(filler, settings, step))
                optimizer.step()
                reporter.detail(f"step {step + 1}: {loss:.4f} nats a token of the key")
                if (step + 1) * VALIDATIONS // settings.steps > step * VALIDATIONS // settings.steps:
                    judged.append((step + 1, _judge(stock, scaling, held_out), scaling.scale_set()))
                    task.describe(f"Tuning on pass keys ({judged[-1][1]:.3f} nats held out, {unscaled:.3f} before)")
                task.advance()
                done = step + 1
                last = done == settings.steps
                journal.save(lambda: _state(scaling, optimizer, done, judged), last=last)  # noqa: B023
    kept_step, _, scales = min(judged, key=lambda row: row[1])
    history = [{"step": step, "loss": round(loss, 5)} for step, loss, _ in judged]
    return AnswerOutcome(scales, kept_step, time.monotonic() - started, journal, history)


def answer_loss(stock: StockModel, sample: Sample) -> Tensor:
    """Mean loss in nats of the key's tokens after the question; nothing else of the prompt counts."""
    tokens = torch.cat([sample.tokens, sample.answer])[None].to(stock.device)
    size = len(sample.answer)
    hidden = stock.hidden_states(tokens)[:, -size - 1 : -1]
    return token_losses(stock, hidden, tokens[:, -size:]).mean()


def _batch(filler: Filler, settings: AnswerSettings, step: int) -> list[Sample]:
    numbers = (number % settings.samples for number in range(step * settings.batch, (step + 1) * settings.batch))
    generators = (random.Random(f"{settings.seed} {number}") for number in numbers)
    return [make_sample(filler, settings.length, generator.random(), generator) for generator in generators]


def _backward(stock: StockModel, batch: Sequence[Sample]) -> float:
    total = 0.0
    with checkpointed(stock):
        for sample in batch:
            loss = answer_loss(stock, sample) / len(batch)
            loss.backward()
            total += float(loss.detach())
    return total


@torch.no_grad()
def _judge(stock: StockModel, scaling: Scaling, held_out: Sequence[Sample]) -> float:
    """Mean loss on held-out questions, under A_log rounded as users load it."""
    with scaling.rounded(stock.load_dtype):
        return sum(float(answer_loss(stock, sample)) for sample in held_out) / len(held_out)


def _state(
    scaling: Scaling, optimizer: torch.optim.Optimizer, step: int, judged: Sequence[tuple[int, float, ScaleSet]]
) -> dict[str, Any]:
    return {
        "step": step,
        "log_s": [parameter.detach() for parameter in scaling.parameters()],
        "optimizer": optimizer.state_dict(),
        "judged": [
            (number, loss, {key: torch.from_numpy(value) for key, value in scales.log_s.items()})
            for number, loss, scales in judged
        ],
    }


def _restore(
    scaling: Scaling, optimizer: torch.optim.Optimizer, unscaled: tuple[int, float, ScaleSet], saved: dict[str, Any]
) -> tuple[int, list[tuple[int, float, ScaleSet]]]:
    with torch.no_grad():
        for parameter, value in zip(scaling.parameters(), saved["log_s"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    form, granularity = unscaled[2].form, unscaled[2].granularity
    judged = [
        (number, loss, ScaleSet(form, granularity, {key: value.numpy() for key, value in log_s.items()}))
        for number, loss, log_s in saved["judged"]
    ]
    return saved["step"], judged
