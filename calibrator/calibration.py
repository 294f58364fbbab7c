"""One calibration from start to end: what a method gets to work with, and what comes out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from calibrator.activations import Activations
from calibrator.distributed import ALONE, Ranks
from calibrator.facts import FactSource
from calibrator.journal import Journal
from calibrator.model import StockModel, device_name
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.skills import Drop, Skills
from calibrator.text import Text, WindowSampler, hold_out
from calibrator.validation import Validation
from calibrator.weight_stream import MemoryMode
from converter.lengths import format_length
from converter.manifest import CalibrationRecord
from converter.reporting import Reporter, Task
from converter.scales import ScaleSet

VALIDATION_TARGETS, VALIDATION_TRAIN_LENS = 4, 64


@dataclass(frozen=True)
class Problem:
    """What a method works with.

    Attributes:
        stock: the frozen model.
        scaling: the factors; a method moves them. Scaling and recurrences are open while a method runs.
        sampler: windows of the calibration text.
        validation: judges the factors as they stand and remembers them.
        journal: survives a killed run.
        activations: runs backward passes in the memory there is.
        facts: what is planted in the text.
        skills: what the unscaled model recalls, which says what kinds of facts; known once :func:`calibrate` runs.
        ranks: the processes that share the work.
    """

    stock: StockModel
    scaling: Scaling
    sampler: WindowSampler
    validation: Validation
    settings: Settings
    journal: Journal
    reporter: Reporter
    activations: Activations
    facts: FactSource
    skills: Skills
    ranks: Ranks = ALONE

    def resume(self) -> dict[str, Any] | None:
        """What an interrupted run saved, or None; the sampler and the validation go on from there."""
        if saved := self.journal.resume():
            self.sampler.generator.set_state(saved["generator"])
            self.validation.restore(saved["validation"])
        return saved

    def save(self, step: int, state: Callable[[], Mapping[str, Any]] = dict, last: bool = False) -> None:
        """Keep what a killed run goes on from after ``step``; what ``state`` returns is the method's own."""
        generator, validation = self.sampler.generator, self.validation
        self.journal.save(
            lambda: {
                "step": step,
                "generator": generator.get_state(),
                "validation": validation.state(),
                **state(),
            },
            last=last,
        )

    def run_steps(
        self,
        steps: int,
        saved: Mapping[str, Any] | None,
        take_step: Callable[[int, Task], None],
        state: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Take the steps that ``saved`` has not behind it, with progress, and save after each; see :meth:`save`."""
        start = saved["step"] if saved else 0
        with self.reporter.task("Calibrating", steps) as task:
            task.advance(start)
            for step in range(start, steps):
                take_step(step, task)
                task.advance()
                self.save(step + 1, state, last=step + 1 == steps)


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    Attributes:
        scales: of the candidate that the method keeps; all ones where none beats the unscaled model.
        record: the manifest's entry.
        skills: what the unscaled model recalls within its training length, in words.
        kept_skills: what the scaled one keeps of that; "" for the unscaled model or one without skills.
        short: what validation says of the perplexity up to the training length; "" for the unscaled model.
    """

    scales: ScaleSet
    record: CalibrationRecord
    skills: str
    kept_skills: str
    short: str

    def sentences(self) -> list[str]:
        """The outcome in words."""
        guard = self.record.guard
        if self.record.kept_step == 0:
            said = [guard, "No factors beat the unscaled model over all lengths, so every factor stays 1."]
        else:
            said = [guard, self.short, self.kept_skills]
        return [sentence for sentence in said if sentence]


def prepare_calibration(
    stock: StockModel,
    texts: Iterable[Text],
    settings: Settings | None,
    reporter: Reporter,
    source_revision: str,
    *,
    memory: MemoryMode = "auto",
    ranks: Ranks = ALONE,
    elsewhere: Path | None = None,
) -> Problem:
    """Set up a calibration; nothing slow happens yet.

    Args:
        texts: what to calibrate on; parts of them are held out to validate.
        settings: with ``texts`` those of the first process are taken by all; None in the others.
        source_revision: of the checkpoint; a journal of another is not taken up.
        memory: how activations are kept; see :class:`calibrator.activations.Activations`.
        ranks: the processes that share the work. As ``memory``, they change results by rounding only.
        elsewhere: for the journal; see :class:`calibrator.journal.Journal`.

    Raises:
        TextError: the texts are too short for the target length.
    """
    texts, settings = ranks.from_first(lambda: (list(texts), settings and settings.split_over(ranks)))
    assert settings is not None
    key = {
        "verb": "convert",
        "source": source_revision,
        "texts": [dataclasses.asdict(text.record("calibration")) | {"weight": text.weight} for text in texts],
        "settings": dataclasses.asdict(settings),
        "positions": stock.rope,
        "device": stock.device.type,
    }
    tokens = max(VALIDATION_TARGETS * settings.target_len, VALIDATION_TRAIN_LENS * settings.train_len)
    texts, held_out = hold_out(texts, tokens, settings.target_len + 1)
    scaling = Scaling(stock.mixers, stock.A_log, settings.granularity, settings.form)
    validation = Validation(stock, scaling, held_out, settings, ranks)
    sampler = WindowSampler(texts, settings.seed)
    journal = Journal(key, reporter, ranks, elsewhere)
    activations = Activations(stock, scaling.parameters(), memory, reporter)
    facts = FactSource([document for text in texts for document in text.documents], stock.tokenizer)
    source = FactSource(held_out, stock.tokenizer)
    skills = Skills(stock, source, settings.train_len, settings.target_len, reporter, ranks)
    return Problem(
        stock, scaling, sampler, validation, settings, journal, reporter, activations, facts, skills, ranks
    )


def calibrate(problem: Problem, train_len_origin: str = "unknown") -> Outcome:
    """Find the scales of a frozen model. The journal stays until its ``remove`` is called."""
    started = time.monotonic()
    validation, skills, settings = problem.validation, problem.skills, problem.settings
    with problem.scaling, problem.stock.recurrence:
        problem.activations.warm_up(with_gradients=settings.method == "gradient")
        skills.begin()
        problem.reporter.line(skills.sentence())
        validation.begin(skills.far_nats)
        kept, steps = import_module(f"calibrator.methods.{settings.method}").calibrate(problem)
        # The preset of SPSA keeps its last iterate, whatever validation says.
        if kept is validation.best:
            kept = validation.settle(lambda _: skills.compare())
    record = CalibrationRecord(
        method=settings.method,
        settings=dataclasses.asdict(settings),
        train_len=settings.train_len,
        train_len_origin=train_len_origin,
        target_len=settings.target_len,
        seed=settings.seed,
        steps=steps,
        kept_step=kept.step,
        guard=validation.guard_sentence() if kept is validation.best else "",
        seconds=round(time.monotonic() - started, 1),
        device=device_name(problem.stock),
        history=[candidate.record() for candidate in validation.candidates],
    )
    short = validation.short_sentence(kept) if kept.step else ""
    return Outcome(kept.scales, record, skills.sentence(), _kept_sentence(kept.drops), short)


def _kept_sentence(drops: Sequence[Drop]) -> str:
    """What was compared when the factors were accepted."""
    if not drops:
        return ""
    parts = [
        f"{drop.kind} {drop.before:.0%} and {drop.after:.0%} at {format_length(drop.distance)}" for drop in drops
    ]
    return (
        "Within the training length no skill drops beyond chance. Share of the answers' tokens before and after: "
        f"{'; '.join(parts)} tokens back."
    )
