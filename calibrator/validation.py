"""Judging scales on held-out text: the loss by length against the unscaled model, and the short-context guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrator.distributed import ALONE, Ranks
from calibrator.evaluation.perplexity import resample_means, stream_losses
from calibrator.line_ends import wrapped
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.skills import Drop
from calibrator.text import tiled
from converter.errors import TextError
from converter.scales import ScaleSet

SHORT_PREFIXES = (4, 2, 1)
LEAST_SHORT_WINDOWS, ENOUGH_SHORT_WINDOWS = 8, 64
# Of the standard error that the guard leaves as a margin below the limit.
MARGIN = 1.0
# Halvings of the way back to the unscaled model, where the guard asks for a part of it.
RETREATS = 4
# Nats that a length is worth which the other model cannot read at all.
WON = 10.0
# Weight of answers about far facts beside the prose.
ANSWERS = 1.0


@dataclass(frozen=True, eq=False)
class Losses:
    """Mean losses of one set of factors on the validation windows.

    Attributes:
        short: (windows, prefixes) nats: means over the first quarter, half and whole of windows of the training
            length, from zero state, in the order of the text.
        octaves: upper edge in tokens to the mean loss at positions from half of it up to it, beyond the
            training length.
        answers: mean loss of answers to questions far behind their facts; None for a model without skills.
    """

    short: Tensor
    octaves: dict[int, float]
    answers: float | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """Factors that were judged.

    Attributes:
        step: optimiser steps that led there; 0 is the unscaled model.
        objective: mean change of the loss in nats against the unscaled model, over the training length and every
            octave beyond it, each weighing the same, and ``ANSWERS`` times that of answers about far facts. Below 0
            is better.
        short_change: change of the loss in nats over the prefix of the training length that changes most.
        short_error: standard error of that, from a bootstrap over windows.
        allowed: whether the two together respect the guard.
        share: of the iterate's log s that these factors have.
        drops: what each skill lost; a loss beyond chance refuses the factors. Empty before they are compared.
    """

    step: int
    scales: ScaleSet
    losses: Losses
    objective: float
    short_change: float
    short_error: float
    allowed: bool
    share: float = 1.0
    drops: Sequence[Drop] = ()

    @property
    def risk(self) -> str:
        """The skill that these factors were found to lose most of; "" for none."""
        gone = [drop for drop in self.drops if drop.is_lost]
        worst = max(gone, key=lambda drop: drop.before - drop.after, default=None)
        return f"loses a skill: {worst.sentence()}" if worst else ""

    def record(self) -> dict[str, Any]:
        """The manifest's entry."""
        train_len_loss = float(self.losses.short[:, -1].mean())
        octaves = {f"up to {edge}": round(loss, 5) for edge, loss in self.losses.octaves.items()}
        return {
            "step": self.step,
            "share": self.share,
            "loss": {"training length": round(train_len_loss, 5), **octaves},
            **({} if self.losses.answers is None else {"answers": round(self.losses.answers, 5)}),
            "objective": round(self.objective, 5),
            "short_change": round(self.short_change, 5),
            "short_error": round(self.short_error, 5),
            "allowed": self.allowed,
            **({"risk": self.risk} if self.risk else {}),
        }


class Validation:
    """Judges the factors on a model as they stand, under the dtype that users load.

    Args:
        held_out: token ids of documents, or parts of them, that no method sees.
        settings: of the calibration; A_log is rounded to its ``load_dtype`` while candidates are judged.
        ranks: the first of them measures for all.

    Attributes:
        documents: the held-out documents.

    Raises:
        TextError: too little held-out text to say anything of the training length.
    """

    def __init__(
        self,
        stock: StockModel,
        scaling: Scaling,
        held_out: Sequence[Tensor],
        settings: Settings,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._stock = stock
        self._scaling = scaling
        self._train_len = train_len = settings.train_len
        self._max_short_loss = settings.max_short_loss
        self._load_dtype: torch.dtype = getattr(torch, settings.load_dtype)
        self._attention_window = settings.attention_window or settings.target_len
        self.documents = list(held_out)
        self._short = [row for document in held_out for row in tiled(document, train_len)]
        if len(self._short) < LEAST_SHORT_WINDOWS:
            tokens = sum(map(len, held_out))
            raise TextError(
                f"The {tokens} tokens that may be held out to validate on make {len(self._short)} windows of the "
                f"training length {train_len}; {LEAST_SHORT_WINDOWS} are needed.",
                "Give a longer text with --data.",
            )
        self._short = self._short[:: max(1, len(self._short) // ENOUGH_SHORT_WINDOWS)]
        self._short[1::2] = wrapped(torch.stack(self._short[1::2]), stock)
        self._long = [document for document in held_out if len(document) > 1]
        self._far_answers: Callable[[], float | None] = lambda: None
        self.candidates: list[Candidate] = []

    @property
    def unscaled(self) -> Candidate:
        """The model as it was given."""
        return self.candidates[0]

    @property
    def best(self) -> Candidate:
        """The allowed candidate with the lowest objective; the unscaled model where none is below 0."""
        return min((c for c in self.candidates if c.allowed), key=lambda candidate: candidate.objective)

    @property
    def _unguarded(self) -> Candidate:
        """The candidate with the lowest objective, allowed or not."""
        return min(self.candidates, key=lambda candidate: candidate.objective)

    def begin(self, far_answers: Callable[[], float | None] = lambda: None) -> None:
        """Measure the unscaled model, with which every candidate is compared.

        Args:
            far_answers: the mean loss of answers about far facts, with the factors on the model.
        """
        self._far_answers = far_answers
        losses = self._ranks.from_first(self._measure)
        self.candidates = [Candidate(0, self._scaling.scale_set(), losses, 0.0, 0.0, 0.0, True)]

    def judge(self, step: int, share: float = 1.0) -> Candidate:
        """Measure the factors as they stand."""
        return self._add(step, self._scaling.scale_set(), self._ranks.from_first(self._measure), share)

    def settle(self, compare: Callable[[Candidate], Sequence[Drop]]) -> Candidate:
        """The best candidate that respects the guard and keeps every skill.

        Where that keeps the best of all out, its log-factors are shrunk until it meets the limits.

        Args:
            compare: what each skill loses under a candidate, whose factors are on the model.
        """

        def keeps(candidate: Candidate) -> bool:
            if not candidate.allowed or candidate.step == 0:
                return candidate.allowed
            self._scaling.load(candidate.scales)
            with self._scaling.rounded(self._load_dtype):
                compared = replace(candidate, drops=compare(candidate))
            compared = replace(compared, allowed=not compared.risk)
            self.candidates[self.candidates.index(candidate)] = compared
            return compared.allowed

        better = self._unguarded
        if keeps(better):
            return self.best
        inside, outside = 0.0, 1.0
        kept = self.unscaled
        for _ in range(RETREATS):
            share = (inside + outside) / 2
            log_s = {key: np.float32(share) * values for key, values in better.scales.log_s.items()}
            self._scaling.load(replace(better.scales, log_s=log_s))
            candidate = self.judge(better.step, share)
            if keeps(candidate):
                inside, kept = share, candidate
            else:
                outside = share
        while self.best.objective < kept.objective and not keeps(self.best):
            pass
        return self.best

    def _add(self, step: int, scales: ScaleSet, losses: Losses, share: float = 1.0) -> Candidate:
        base = self.unscaled.losses
        change = losses.short - base.short
        means, errors = change.mean(0), resample_means(change).std(0)
        worst = int((means + MARGIN * errors).argmax())
        short_change, short_error = float(means[worst]), float(errors[worst])
        changes = [float(means[-1])]
        changes += [_change(base.octaves[edge], losses.octaves[edge]) for edge in losses.octaves]
        objective = sum(changes) / len(changes)
        if base.answers is not None and losses.answers is not None:
            objective += ANSWERS * _change(base.answers, losses.answers)
        allowed = short_change + MARGIN * short_error <= math.log1p(self._max_short_loss)
        candidate = Candidate(step, scales, losses, objective, short_change, short_error, allowed, share)
        self.candidates.append(candidate)
        return candidate

    def state(self) -> list[dict[str, Any]]:
        """What the journal keeps of the candidates judged so far: plain values and tensors."""
        return [
            {
                "step": c.step,
                "log_s": {key: torch.from_numpy(value) for key, value in c.scales.log_s.items()},
                "short": c.losses.short,
                "octaves": c.losses.octaves,
                "answers": c.losses.answers,
            }
            for c in self.candidates[1:]
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take up the candidates that :meth:`state` returned in an interrupted run."""
        for saved in state:
            log_s = {key: value.numpy() for key, value in saved["log_s"].items()}
            scales = replace(self.unscaled.scales, log_s=log_s)
            self._add(saved["step"], scales, Losses(saved["short"], saved["octaves"], saved["answers"]))

    def short_sentence(self, candidate: Candidate) -> str:
        """What validation says of the perplexity up to the training length, with its interval."""
        low, high = (math.expm1(candidate.short_change + sign * 1.645 * candidate.short_error) for sign in (-1, 1))
        return (
            f"Up to {self._train_len} tokens the perplexity on validation text changes by "
            f"{math.expm1(candidate.short_change):+.2%} (90 % interval {low:+.2%} to {high:+.2%}, "
            f"{len(self._short)} windows)."
        )

    def guard_sentence(self) -> str:
        """A sentence where the guard kept a better candidate out, else ""."""
        better = self._unguarded
        if better.allowed:
            return ""
        rise = math.expm1(better.short_change + MARGIN * better.short_error)
        why = better.risk or (
            f"may raise the perplexity up to {self._train_len} tokens by {rise:.2%} "
            f"(limit {self._max_short_loss:.2%})"
        )
        best = self.best
        drawn = f" Of log s of step {best.step}, {best.share:.0%} is kept." if best.share < 1 else ""
        return f"The guard decided: step {better.step} was better over all lengths but {why}.{drawn}"

    @torch.no_grad()
    def _measure(self) -> Losses:
        with self._scaling.rounded(self._load_dtype):
            batches = self._stock.batches(torch.stack(self._short))
            short = torch.cat(
                [window_losses(self._stock, batch.to(self._stock.device)).double().cpu() for batch in batches]
            )
            long = [
                stream_losses(self._stock, row[None], self._stock.tokens_at_once, self._attention_window)[0]
                for row in self._long
            ]
            answers = self._far_answers()
        prefixes = torch.stack([short[:, : max(1, short.shape[1] // part)].mean(1) for part in SHORT_PREFIXES], 1)
        octaves = {}
        start, longest = self._train_len, max(map(len, long))
        while start < longest:
            octaves[min(2 * start, longest + 1)] = float(torch.cat([row[start : 2 * start] for row in long]).mean())
            start *= 2
        return Losses(prefixes, octaves, answers)


def _change(before: float, after: float) -> float:
    """The change of a loss in nats; a length that only one of two models can read is won by that one."""
    if math.isfinite(before) and math.isfinite(after):
        return after - before
    return WON * (math.isfinite(before) - math.isfinite(after))
