"""What a conversion does to memory: facts found in long text as trained, on a sliding window, and converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calibrator.evaluation.baselines import at_end
from calibrator.evaluation.recall import Cell, Reader, measure_recall
from calibrator.facts import KINDS, FactSource
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.skills import Skills, near_and_far
from calibrator.text import Text
from converter.errors import CalibrationError
from converter.lengths import format_length
from converter.manifest import MemoryCell, MemoryTable, Reach
from converter.reporting import Reporter
from converter.scales import ScaleSet

PROMPTS_ON_CPU, PROMPTS_ON_GPU = 16, 32
# What the model recalls of these is asked for at the training length; in long text the first one on CPU, where that
# is slow, and the first two elsewhere.
PREFERRED = ("pass key", "random span", "1 pair")
Places = tuple[tuple[str, ...], dict[int, tuple[int, ...]]]
"""Kinds of facts, and the distances at which they are asked for by length of the text."""
# Facts count as found at a length where the lower end of the interval of the share found is so high.
LEAST_FOUND = 0.5


@dataclass(frozen=True)
class MemoryBefore:
    """What the unscaled model finds, to be compared with the converted one.

    Attributes:
        window: tokens of the sliding window.
        base: as it is, on all of a prompt. sliding: on the last ``window`` tokens of it.
        ask: puts the same questions to another model, which is named in the progress line.
    """

    text: Text
    window: int
    base: list[Cell]
    sliding: list[Cell]
    ask: Callable[[StockModel, str], list[Cell]]

    def table(self, converted: StockModel, skills: str, kept: str, reporter: Reporter) -> MemoryTable:
        """Ask the converted model the same, and show the comparison.

        Args:
            converted: its recurrence is open.
            skills, kept: see :class:`converter.manifest.MemoryTable`.
        """
        after = self.ask(converted, "the converted model")
        near = {(cell.kind, cell.distance): cell for cell in self.sliding}
        cells = [
            MemoryCell(
                kind=old.kind,
                length=old.length,
                distance=old.distance,
                samples=len(old.right),
                base=round(share_found(old), 4),
                sliding=round(
                    share_found(near.get((old.kind, old.distance), old) if old.length > self.window else old), 4
                ),
                converted=round(share_found(new), 4),
                error=round(half_interval(new), 4),
            )
            for old, new in zip(self.base, after, strict=True)
        ]
        if cells:
            reporter.table(
                f"Facts found in {self.text.name} ({cells[0].samples} prompts; sliding window of {self.window} "
                "tokens)",
                ("fact", "text", "tokens back", "as trained", "sliding", "converted"),
                [
                    (
                        *(cell.kind, format_length(cell.length), format_length(cell.distance)),
                        *(f"{value:.0%}" for value in (cell.base, cell.sliding, cell.converted)),
                    )
                    for cell in cells
                ],
            )
        return MemoryTable(self.text.record("held-out"), skills, kept, self.window, cells)


def half_interval(cell: Cell) -> float:
    """Half of the 95 % interval of :func:`share_found`."""
    if KINDS[cell.kind].is_span:
        return 1.96 * float(cell.right.std()) / len(cell.right) ** 0.5
    low, high = cell.interval()
    return (high - low) / 2


def share_found(cell: Cell) -> float:
    """Of copied spans the share of tokens found, of other facts that of whole answers."""
    return float(cell.right.mean()) if KINDS[cell.kind].is_span else cell.rate


def measure_before(
    stock: StockModel, text: Text, skills: Skills, settings: Settings, window: int, reporter: Reporter
) -> MemoryBefore:
    """Ask the unscaled model for the kinds of facts that it recalls.

    Args:
        stock: its recurrence is open.
        window: tokens of the sliding window.
        reporter: told of these measurements and of those that :attr:`MemoryBefore.ask` makes.
    """
    train_len, target_len = settings.train_len, settings.target_len
    is_slow = stock.device.type == "cpu"
    has_attention = stock.recurrence.has_attention
    kinds = tuple(kind for kind in PREFERRED if kind in skills.kinds)
    near = near_and_far(train_len)
    far = {2 * train_len}
    if not is_slow:
        # Attention can find what lies anywhere, a state what is a few training lengths back.
        far.add(target_len // 2 if has_attention else 4 * train_len)
    lengths = sorted({train_len, target_len, *(() if has_attention else (4 * target_len,))})
    count = 1 if is_slow else 2
    long: Places = kinds[:count], {n: tuple(d for d in (*near, *sorted(far)) if d < n) for n in lengths}
    short: Places = kinds[count:], {train_len: near}
    longest = (kinds[:count], {max(lengths): long[1][max(lengths)]})
    source = FactSource(text.documents, stock.tokenizer)
    prompts = PROMPTS_ON_CPU if is_slow else PROMPTS_ON_GPU

    def ask(model: StockModel, what: str, *places: Places, reader: Reader | None = None) -> list[Cell]:
        found: list[Cell] = []
        for asked, distances in places:
            found += measure_recall(model, source, asked, distances, prompts, settings.seed, reporter, what, reader)
        return found

    base = ask(stock, "the source", long, short)
    sliding = ask(stock, "the sliding window", longest, reader=at_end(window))
    return MemoryBefore(text, window, base, sliding, lambda model, what: ask(model, what, long, short))


def judged_kind(skills: Skills) -> str:
    """The kind of facts by which a reach is judged. Raises CalibrationError without one."""
    kind = next((kind for kind in PREFERRED if kind in skills.kinds), None)
    if kind is None:
        raise CalibrationError(f"Recall could not be judged. {skills.sentence()}", "Give a length as --target-len.")
    return kind


def measure_reach(
    stock: StockModel, scales: ScaleSet, text: Text, skills: Skills, settings: Settings, reporter: Reporter
) -> Reach:
    """Double the text as long as facts a training length back are found.

    Args:
        stock: unscaled.
        text: filler that the scales were not fitted to.
        settings: of the calibration; texts are as long as in the tables before and after.

    Raises:
        CalibrationError: such facts are not found in two training lengths.
    """
    kind, distance = judged_kind(skills), settings.train_len
    prompts = PROMPTS_ON_CPU if stock.device.type == "cpu" else PROMPTS_ON_GPU
    source = FactSource(text.documents, stock.tokenizer)
    longest = settings.target_len * (1 if stock.recurrence.has_attention else 4)
    reached: list[Cell] = []
    scaling = Scaling(stock.mixers, stock.A_log, scales.granularity, scales.form)
    with scaling, stock.recurrence:
        scaling.load(scales)
        length = 2 * distance
        while length <= longest:
            asked = source, (kind,), {length: (distance,)}, prompts, settings.seed
            [cell] = measure_recall(stock, *asked, reporter, "the scaled model")
            if lowest(cell) < LEAST_FOUND:
                break
            reached.append(cell)
            length *= 2
    if not reached:
        raise CalibrationError(
            f"In {2 * distance:,} tokens facts {distance:,} back are not found, so no length can be stated.",
            "Give one as --target-len.",
        )
    lengths, found = zip(*((cell.length, int(cell.found.sum())) for cell in reached), strict=True)
    return Reach(kind, distance, list(lengths), prompts, list(found), round(lowest(reached[-1]), 4))


def lowest(cell: Cell) -> float:
    """Lower end of the one-sided 95 % interval of the share of facts found."""
    return cell.interval(z=1.645)[0]
