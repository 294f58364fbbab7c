"""What the unscaled model recalls within its training length, and whether scaled factors keep it.

A kind of fact is a skill of the model where it finds half of the answers' tokens or more near by. The
skills decide what is planted in the calibration text, and each of them is held at every distance: answers to the
same prompts are compared before and after, one-sided, with the error rate shared among all skills and distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from calibrator.distributed import ALONE, Ranks
from calibrator.evaluation.recall import Cell, measure_recall
from calibrator.facts import FactSource
from calibrator.model import StockModel
from converter.lengths import format_length
from converter.reporting import SILENT, Reporter

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


@dataclass
class Skills:
    """The skills of one unscaled model.

    Attributes:
        stock: its recurrence is open while skills are measured.
        source: of a text that no method is fitted to.
        ranks: the first of them measures for all.
        cells: what was found of each skill at each distance; None before :meth:`begin`.
    """

    stock: StockModel
    source: FactSource
    train_len: int
    target_len: int
    reporter: Reporter
    ranks: Ranks = ALONE
    cells: list[Cell] | None = field(default=None, init=False)

    def begin(self) -> None:
        """Find the skills, once, with the unscaled model."""
        if self.cells is None:
            kinds = [kind for kind in LEARNT if kind in self.source.kinds]
            cells = self._measure_within(kinds)
            near = min(near_and_far(self.train_len))
            found = {c.kind for c in cells if c.distance == near and float(c.right.mean()) >= LEAST_SHARE}
            self.cells = [cell for cell in cells if cell.kind in found]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of facts that the model recalls."""
        return tuple(dict.fromkeys(cell.kind for cell in self.cells or ()))

    @property
    def planted(self) -> tuple[str, ...]:
        """What to plant: the skills, and slices of the text where random spans are one.

        Slices alone say little: some of a text's words come again anyhow.
        """
        return self.kinds + (("slice",) if "random span" in self.kinds else ())

    def sentence(self) -> str:
        """What the unscaled model recalls."""
        if not self.cells:
            return f"The unscaled model recalls nothing of what is asked for within its {self.train_len} tokens."
        parts = [
            f"{cell.kind} {float(cell.right.mean()):.0%} at {format_length(cell.distance)}" for cell in self.cells
        ]
        return f"Within {self.train_len} tokens the unscaled model recalls: {'; '.join(parts)} tokens."

    def compare(self) -> list[Drop]:
        """Each skill at each distance with the factors that are on the model now."""
        if not self.cells:
            return []
        after = self._measure_within(self.kinds)
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
        places = {self.target_len: [share * self.train_len - LONGEST_FACT for share in FAR_TRAIN_LENS]}
        # Part of a validation, which shows its own progress.
        asked = self.kinds, places, self._prompts // FAR_SHARE, 0, SILENT, "the model"
        cells = measure_recall(self.stock, self.source, *asked)
        return sum(float(cell.nats.mean()) for cell in cells) / len(cells) if cells else None

    @property
    def _prompts(self) -> int:
        return PROMPTS_ON_CPU if self.stock.device.type == "cpu" else PROMPTS_ON_GPU

    def _measure_within(self, kinds: Sequence[str]) -> list[Cell]:
        """What is found of each kind within the training length."""
        asked = kinds, {self.train_len: near_and_far(self.train_len)}, self._prompts, 0, self.reporter, "the model"
        return self.ranks.from_first(lambda: measure_recall(self.stock, self.source, *asked))
