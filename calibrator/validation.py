"""Judging scales on held-out text: the loss by length against the unscaled model, and the short-context guard."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibrator.distributed import ALONE, Ranks
from calibrator.evaluation.perplexity import BATCH_TOKENS, stream_losses
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from converter.scales import ScaleSet

SHORT_PREFIXES = (4, 2, 1)


@dataclass(frozen=True)
class Losses:
    """Mean losses of one set of factors on the validation windows.

    Attributes:
        short: (prefixes, windows) nats: means over the first quarter, half and whole of windows of the training
            length, from zero state.
        octaves: upper edge in tokens to the mean loss at positions from half of it up to it, beyond the
            training length.
    """

    short: Tensor
    octaves: dict[int, float]


@dataclass(frozen=True)
class Candidate:
    """Factors that were judged.

    Attributes:
        step: optimiser steps that led there; 0 is the unscaled model.
        objective: mean change of the loss in nats against the unscaled model, over the training length and every
            octave beyond it, each weighing the same. Below 0 is better.
        short_change: the largest of the prefixes' mean changes plus one standard error, in nats.
        allowed: whether that respects the guard.
    """

    step: int
    scales: ScaleSet
    losses: Losses
    objective: float
    short_change: float
    allowed: bool

    def record(self) -> dict[str, Any]:
        """The manifest's entry."""
        train_len_loss = float(self.losses.short[-1].mean())
        octaves = {f"up to {edge}": round(loss, 5) for edge, loss in self.losses.octaves.items()}
        return {
            "step": self.step,
            "loss": {"training length": round(train_len_loss, 5), **octaves},
            "objective": round(self.objective, 5),
            "short_change": round(self.short_change, 5),
            "allowed": self.allowed,
        }


class Validation:
    """Judges the factors on a model as they stand, under the dtype that users load.

    Args:
        held_out: (windows, length) token ids that no method sees.
        max_short_loss: allowed rise of the perplexity up to the training length, as a fraction.
        load_dtype: A_log is rounded to it while candidates are judged.
        ranks: the first of them measures for all.
    """

    def __init__(
        self,
        stock: StockModel,
        scaling: Scaling,
        held_out: Tensor,
        *,
        train_len: int,
        target_len: int,
        max_short_loss: float,
        load_dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._stock = stock
        self._scaling = scaling
        self._train_len = train_len
        self._max_short_loss = max_short_loss
        self._load_dtype = load_dtype
        self._short = _tile(held_out, train_len)
        self._long = held_out if stock.can_carry else _tile(held_out, min(target_len, held_out.shape[1]))
        self._base = self._measure()
        self.candidates = [Candidate(0, scaling.scale_set(), self._base, 0.0, 0.0, True)]

    @property
    def tokens(self) -> int:
        """Tokens that one judgement runs."""
        return self._short.numel() + self._long.numel()

    @property
    def best(self) -> Candidate:
        """The allowed candidate with the lowest objective; the unscaled model where none is below 0."""
        return min((c for c in self.candidates if c.allowed), key=lambda candidate: candidate.objective)

    def judge(self, step: int) -> Candidate:
        """Measure the factors as they stand."""
        return self._add(step, self._scaling.scale_set(), self._measure())

    def _add(self, step: int, scales: ScaleSet, losses: Losses) -> Candidate:
        change = losses.short - self._base.short
        error = change.std(1) / math.sqrt(change.shape[1])
        short_change = float((change.mean(1) + error).max())
        changes = [float(change[-1].mean())]
        changes += [losses.octaves[edge] - self._base.octaves[edge] for edge in losses.octaves]
        candidate = Candidate(
            step,
            scales,
            losses,
            sum(changes) / len(changes),
            short_change,
            short_change <= math.log1p(self._max_short_loss),
        )
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
            }
            for c in self.candidates[1:]
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take up the candidates that :meth:`state` returned in an interrupted run."""
        unscaled = self.candidates[0].scales
        for saved in state:
            log_s = {key: value.numpy() for key, value in saved["log_s"].items()}
            scales = dataclasses.replace(unscaled, log_s=log_s)
            self._add(saved["step"], scales, Losses(saved["short"], saved["octaves"]))

    def guard_sentence(self) -> str:
        """A sentence where the guard kept a better candidate out, else ""."""
        better = min(self.candidates, key=lambda candidate: candidate.objective)
        if better.allowed:
            return ""
        return (
            f"The short-context guard decided: step {better.step} was better over all lengths but might raise the "
            f"perplexity up to {self._train_len} tokens by {math.expm1(better.short_change):.2%} "
            f"(limit {self._max_short_loss:.2%})."
        )

    def _measure(self) -> Losses:
        return self._ranks.from_first(self._measure_here)

    @torch.no_grad()
    def _measure_here(self) -> Losses:
        with self._scaling.rounded(self._load_dtype):
            batches = self._short.split(max(1, BATCH_TOKENS // self._train_len))
            short = torch.cat(
                [window_losses(self._stock, batch.to(self._stock.device)).double().cpu() for batch in batches]
            )
            long = self._measure_long()
        prefixes = torch.stack([short[:, : max(1, short.shape[1] // part)].mean(1) for part in SHORT_PREFIXES])
        octaves = {}
        start = self._train_len
        while start < long.shape[1]:
            octaves[min(2 * start, long.shape[1] + 1)] = float(long[:, start : 2 * start].mean())
            start *= 2
        return Losses(prefixes, octaves)

    def _measure_long(self) -> Tensor:
        if self._stock.can_carry:
            return stream_losses(self._stock, self._long)
        rows = [window_losses(self._stock, row[None].to(self._stock.device)) for row in self._long]
        return torch.cat(rows).double().cpu()


def _tile(windows: Tensor, length: int) -> Tensor:
    count = windows.shape[1] // length
    return windows[:, : count * length].reshape(-1, length)
