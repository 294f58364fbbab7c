"""What the unscaled model recalls within its training length, and whether scaled factors keep it.

A kind of fact is a skill of the model where it finds half of the answers' tokens or more near by. The
skills decide what is planted in the calibration text, and each of them is held at every distance: answers to the
same prompts are compared before and after, one-sided, with the error rate shared among all skills and distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from calibrator.evaluation.recall import Cell, measure_recall
from calibrator.facts import FactSource
from calibrator.model import StockModel
from converter.lengths import format_length
from converter.reporting import Reporter

# Kinds that are looked for and planted; the other ones of KINDS are measured only.
LEARNT = ("random span", "pass key", "1 pair")
# Share of the answers' tokens that a skill finds near by; a guess finds hardly any.
LEAST_SHARE = 0.5
ERROR_RATE = 0.05
# A smaller loss of a skill is not worth a refusal, however sure it is.
LEAST_DROP = 0.02
PROMPTS_ON_CPU, PROMPTS_ON_GPU = 24, 64
LONGEST_FACT = 64
# Far facts are asked for at these distances, with so much fewer prompts each.
FAR_TRAIN_LENS, FAR_SHARE = (1, 2, 4), 3


def near_and_far(length: int) -> tuple[int, ...]:
    """Distances at which facts are asked within a length."""
    return tuple(sorted({max(1, length // 8), max(1, length - LONGEST_FACT)}))


@dataclass(frozen=True)
class Drop:
    """A skill at one distance, before and after.

    Attributes:
        before, after: share of the answers' tokens found.
        bound: the most that ``before - after`` may be by chance.
    """

    kind: str
    distance: int
    before: float
    after: float
    bound: float

    @property
    def is_lost(self) -> bool:
        """Whether the drop is more than chance."""
        return self.before - self.after > max(self.bound, LEAST_DROP)

    def sentence(self) -> str:
        """The drop in words."""
        return (
            f"{self.kind} at {format_length(self.distance)} tokens falls from {self.before:.0%} to {self.after:.0%}"
        )


class Skills:
    """The skills of one unscaled model.

    Args:
        stock: its recurrence is open while skills are measured.
        source: of a text that no method is fitted to.
    """

    def __init__(
        self, stock: StockModel, source: FactSource, train_len: int, target_len: int, reporter: Reporter
    ) -> None:
        self._stock = stock
        self._source = source
        self._train_len = train_len
        self._target_len = target_len
        self._reporter = reporter
        self._prompts = PROMPTS_ON_CPU if stock.device.type == "cpu" else PROMPTS_ON_GPU
        self.cells: list[Cell] = []
        self._has_begun = False

    def begin(self) -> tuple[tuple[str, ...], str]:
        """Find the skills, once, with the unscaled model; returns :attr:`planted` and :meth:`sentence`."""
        if not self._has_begun:
            self._has_begun = True
            kinds = [kind for kind in LEARNT if kind in self._source.kinds]
            cells = self._measure(kinds, {self._train_len: near_and_far(self._train_len)}, self._prompts)
            near = min(near_and_far(self._train_len))
            found = {c.kind for c in cells if c.distance == near and float(c.right.mean()) >= LEAST_SHARE}
            self.cells = [cell for cell in cells if cell.kind in found]
        return self.planted, self.sentence()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of facts that the model recalls."""
        return tuple(dict.fromkeys(cell.kind for cell in self.cells))

    @property
    def planted(self) -> tuple[str, ...]:
        """What to plant: the skills, and slices of the text where random spans are one.

        Slices alone say little: some of a text's words come again anyhow.
        """
        return self.kinds + (("slice",) if "random span" in self.kinds else ())

    def sentence(self) -> str:
        """What the unscaled model recalls."""
        if not self.cells:
            return f"The unscaled model recalls nothing of what is asked for within its {self._train_len} tokens."
        parts = [
            f"{cell.kind} {float(cell.right.mean()):.0%} at {format_length(cell.distance)}" for cell in self.cells
        ]
        return f"Within {self._train_len} tokens the unscaled model recalls: {'; '.join(parts)} tokens."

    def compare(self) -> list[Drop]:
        """Each skill at each distance with the factors that are on the model now."""
        if not self.cells:
            return []
        after = self._measure(self.kinds, {self._train_len: near_and_far(self._train_len)}, self._prompts)
        z = NormalDist().inv_cdf(1 - ERROR_RATE / len(self.cells))
        drops = []
        for old, new in zip(self.cells, after, strict=True):
            change = old.right - new.right
            bound = z * float(change.std()) / math.sqrt(len(change))
            drops.append(Drop(old.kind, old.distance, float(old.right.mean()), float(new.right.mean()), bound))
        return drops

    def far_nats(self) -> float | None:
        """Mean loss of answers in texts of the target length, from a training length or so back and farther.

        In nats a token, with the factors that are on the model now; None without skills.
        """
        distances = [share * self._train_len - LONGEST_FACT for share in FAR_TRAIN_LENS]
        prompts = self._prompts // FAR_SHARE
        # Part of a validation, which shows its own progress.
        cells = self._measure(self.kinds, {self._target_len: distances}, prompts, Reporter())
        return sum(float(cell.nats.mean()) for cell in cells) / len(cells) if cells else None

    @torch.no_grad()
    def _measure(
        self,
        kinds: Sequence[str],
        places: Mapping[int, Sequence[int]],
        prompts: int,
        reporter: Reporter | None = None,
    ) -> list[Cell]:
        reporter = reporter or self._reporter
        return measure_recall(self._stock, self._source, kinds, places, prompts, 0, reporter, "the model")
