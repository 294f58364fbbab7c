"""One conversion from top to bottom: source, checkpoint, scales, bake, proof, card."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrator.distributed import ALONE, Ranks, process_group
from calibrator.methods import METHODS, find_method, scales_without_data
from calibrator.settings import Settings
from converter.baking import BakeReport, bake, plan_changes
from converter.checkpoint_files import in_short
from converter.command_line import name_of, repeating_line
from converter.commands.opening import (
    CALIBRATION_NOVEL,
    HELD_OUT_NOVEL,
    add_tokenizer,
    is_loadable,
    load_stock,
    refuse_gguf,
    require_tokenizer,
    write_working_copy,
)
from converter.commands.provenance import read_versions, source_record
from converter.commands.rehearsal import check_loading, rehearsed
from converter.commands.requests import ConvertRequest
from converter.digests import sealed
from converter.disk import full_disk_named, require_space
from converter.errors import OutputError, UsageError, boundary
from converter.layouts import Checkpoint, read_checkpoint
from converter.manifest import ORIGINS, CalibrationRecord, Manifest, TextRecord
from converter.output import check_output, converted_name, staged
from converter.proof import verify
from converter.reporting import Reporter
from converter.rope import rope_choices
from converter.scales import Granularity, ScaleSet
from converter.scales_file import save_scales
from converter.served_length import length_note, raised_lengths
from converter.source import DEMOS, Snapshot, resolve
from converter.temporary import temporary_folder
from hub_cards.card import card_of, make_card, replaced_card, write_card

if TYPE_CHECKING:
    from calibrator.calibration import Problem
    from calibrator.chosen_texts import ChosenTexts
    from calibrator.comparison import Baseline, Measured, Span
    from calibrator.model import StockModel
    from calibrator.text import Text
    from hub_cards.publish import Destination

PG19_TRAIN, PG19_TEST = "emozilla/pg19:train", "emozilla/pg19:test"
DEFAULT_TARGET, DEMO_TARGET = 32 << 10, 8 << 10
TEXT_TARGETS = 64


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything slow or visible.

    Attributes:
        given: the scales of a method that needs neither text nor model, else None.
        supposed: those, or made-up ones of the kind that calibration finds.
        changing: names of the tensors that can differ from the source's.
        repo_id: where the result will be pushed, else None.
        extensions: those of the rotary positions that are left to choose from, with their entries of config.json.
        ranks: the processes that share the calibration.
    """

    request: ConvertRequest
    snapshot: Snapshot
    checkpoint: Checkpoint
    output: Path
    target_len: int
    settings: Settings
    given: ScaleSet | None
    supposed: ScaleSet
    changing: frozenset[str]
    repo_id: str | None
    extensions: Mapping[str, dict[str, Any]]
    ranks: Ranks

    @property
    def rope(self) -> dict[str, Any]:
        """The entry of config.json that extends rotary positions, as far as may be; empty if they stay."""
        return list(self.extensions.values())[-1] if self.extensions else {}

    @property
    def served_len(self) -> int | None:
        """The length in tokens that is stated for servers."""
        return self.target_len if self.request.target_len or not self.given else None

    @property
    def runs_model(self) -> bool:
        """Whether the model is loaded: to find scales, or to measure given ones for the demo or a held-out text."""
        is_wanted = self.request.held_out is not None or self.snapshot.kind == "demo"
        return self.given is None or (is_wanted and self.request.windows > 0)

    @property
    def copies(self) -> int:
        """How many copies of the weights take room on the disk at once.

        A model on the CPU maps its working copy into memory, whose blocks on the disk stay taken until it is freed.
        """
        return 1 + (self.runs_model and not is_loadable(self.checkpoint))


@dataclass(frozen=True)
class Found:
    """The scales, and how they were found.

    Attributes:
        baseline: what the baked folder is compared with; None where no model was run.
    """

    scales: ScaleSet
    calibration: CalibrationRecord
    texts: Sequence[TextRecord] = ()
    notes: Sequence[str] = ()
    baseline: Baseline | None = None


@dataclass(frozen=True)
class Conversion:
    """The result of a run.

    Attributes:
        manifest: None after a dry run.
        written: False in a process that only took its share of the calibration.
    """

    plan: Plan
    manifest: Manifest | None = None
    written: bool = True


def convert(request: ConvertRequest, reporter: Reporter, destination: Destination | None = None) -> Conversion:
    """Calibrate a checkpoint and write its scaled copy.

    Raises:
        MmodError: whatever keeps the conversion from being complete; nothing is left behind then.
    """
    with process_group(request.device) as ranks:
        if ranks.size > 1:
            request = for_processes(request, ranks)
        if not ranks.is_first:
            return assist(request, ranks)
        plan = prepare(request, reporter, destination, ranks)
        if request.dry_run:
            foresee(plan, reporter)
            return Conversion(plan)
        with (
            ExitStack() as journals,
            staged(plan.output, request.overwrite, plan.snapshot.folder, reporter) as folder,
        ):
            rehearse(plan, folder, reporter)
            plan, found = find_scales(plan, folder, journals, reporter)
            plan = dataclasses.replace(plan, target_len=found.calibration.target_len or plan.target_len)
            plan = with_length(plan, found.scales)
            report = bake_into(plan, folder, found.scales, reporter)
            measured = found.baseline.compare(folder, reporter) if found.baseline else (None, None)
            manifest = sealed(describe(plan, found, report, measured), folder, report.digests)
            manifest.write(folder)
            converted = resolve(str(folder), compose=True)
            proof = verify(converted, plan.checkpoint, reporter=reporter)
            write_card(folder, manifest, plan.snapshot, plan.output, reporter, repo_id=plan.repo_id)
    reporter.line(
        f"{proof.identical} tensors are the source's bit for bit, {proof.changed} equal the formula. "
        f"The model is in {plan.output}."
    )
    if manifest.scales_nothing:
        reporter.warn("Every factor is 1, so this is the source again; nothing was gained.")
    if manifest.is_worse:
        reporter.warn("The perplexity is higher than the source's at every length that was measured.")
    return Conversion(plan, manifest)


def for_processes(request: ConvertRequest, ranks: Ranks) -> ConvertRequest:
    """The request as several processes carry it out, so that the same command line repeats it in one.

    Raises:
        UsageError: the method does not go with several processes.
    """
    if request.method != "gradient":
        raise UsageError(f"--method {request.method} runs in one process.", "Start it without torchrun.")
    return dataclasses.replace(request, streams=request.streams or ranks.size)


def assist(request: ConvertRequest, ranks: Ranks) -> Conversion:
    """Run this process's share of the calibration; the first process writes the result."""
    silent = Reporter()
    plan = prepare(request, silent, None, ranks)
    if not request.dry_run:
        from calibrator.calibration import calibrate

        with temporary_folder() as folder:
            calibrate(set_up(plan, open_stock(plan, folder, silent), (), None, silent)[1])
    return Conversion(plan, written=False)


def prepare(
    request: ConvertRequest,
    reporter: Reporter,
    destination: Destination | None,
    ranks: Ranks = ALONE,
    *,
    weights: bool = True,
) -> Plan:
    """Resolve the source, the output and the destination; everything that can fail early fails here.

    Args:
        weights: fetch those of a Hub id. Without, nothing is meant to be written on this machine.
    """
    method = find_method(request.method, request.method_options())
    is_auto = request.target_len == "auto"
    default = DEMO_TARGET if request.model in DEMOS else DEFAULT_TARGET
    target_len = request.target_len if isinstance(request.target_len, int) else default
    if is_auto and destination is not None and destination.repo_id is None:
        raise UsageError("With --target-len auto the default name is not known yet.", "Give --repo-id.")
    if request.data or request.held_out:
        from calibrator.text import TextSource, require_texts

        held_out = [TextSource(request.held_out)] if request.held_out else []
        require_texts([*map(TextSource.parse, request.data), *held_out])
    snapshot = resolve(request.model, revision=request.revision, compose=request.compose, weights=weights)
    checkpoint = read_checkpoint(snapshot, trust_a_log=request.trust_a_log)
    refuse_gguf(checkpoint)
    checkpoint = add_tokenizer(checkpoint, request.tokenizer, reporter)
    reporter.line(
        f"{snapshot.name} ({checkpoint.model_type}, {checkpoint.layout} layout, {snapshot.revision[:19]}): "
        f"{len(checkpoint.A_log)} A_log tensors of {len(checkpoint.tensors)}."
    )
    if snapshot.left_out:
        reporter.line(f"Not copied, since no loader reads it: {in_short(snapshot.left_out)}")
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    granularity: Granularity = (
        method.granularity(next(iter(shapes.values()))) if request.granularity == "auto" else request.granularity
    )
    settings = Settings(
        method=request.method,
        granularity=granularity,
        form=request.form,
        train_len=check_lengths(request.train_len or 0, target_len),
        target_len=target_len,
        seed=request.seed,
        max_short_loss=request.max_short_loss,
        load_dtype=checkpoint.load_dtype,
        join_documents=request.join_documents,
        attention_window=request.attention_window,
        **request.method_options(),
    )
    ones = ScaleSet.ones(shapes, granularity, request.form)
    given = scales_without_data(((name, tensor.read()) for name, tensor in checkpoint.A_log.items()), settings)
    # Scales that are not known yet may be other than 1 everywhere.
    supposed = given or dataclasses.replace(ones, log_s={name: factors + 1 for name, factors in ones.log_s.items()})
    changes = plan_changes(checkpoint, supposed, request.a_log_dtype)
    if is_auto and given:
        raise UsageError(f"--method {request.method} is for no length.", "Give --target-len as a length.")
    # Scales that a method gives without a text are for no length, and one that is to be found is not known yet.
    named_len = None if given or is_auto else target_len
    output = request.output or Path(converted_name(snapshot.name, named_len))
    check_output(output, request.overwrite, snapshot.folder)
    replaced_card(output, source_record(checkpoint))
    plan = Plan(
        *(request, snapshot, checkpoint, output, target_len, settings, given, supposed, frozenset(changes)),
        *(None, rope_choices(checkpoint, request.rope, target_len), ranks),
    )
    if given and len(plan.extensions) > 1:
        raise UsageError(
            f"--method {request.method} reads no text to choose the factor of --rope {request.rope} on.",
            f"Give one: --rope {request.rope}:4.",
        )
    if destination is not None:
        from hub_cards.publish import check_push

        known, card = describe_beforehand(plan), card_of(snapshot)
        repo_id = check_push(destination, known, source_card=card, target_len=named_len, reporter=reporter)
        plan = dataclasses.replace(plan, repo_id=repo_id)
    if weights:
        require_space(output.absolute().parent, plan.copies * checkpoint.total_bytes())
    return plan


def rehearse(plan: Plan, folder: Path, reporter: Reporter) -> None:
    """Write the copy without its weights, and load what can be loaded of it."""
    from calibrator.model import load_tokenizer

    checkpoint = with_length(plan, plan.supposed).checkpoint
    for note in length_note(checkpoint, plan.target_len, checkpoint.entries, plan.request.rope):
        reporter.warn(note)
    with rehearsed(checkpoint, folder) as trial:
        check_loading(checkpoint, trial, reporter, runs_model=plan.runs_model)
        manifest = describe_beforehand(plan)
        failure = boundary("The manifest or the card cannot be written", OutputError, "Rename what is named.")
        with failure, full_disk_named(trial):
            manifest.write(trial)
            make_card(trial, manifest, source_card=card_of(plan.snapshot), draw=False).write(trial)
        if plan.runs_model:
            require_tokenizer(checkpoint)
            load_tokenizer(trial)


def foresee(plan: Plan, reporter: Reporter) -> None:
    """Show what a conversion would do, and write nothing; in one process of all."""
    plan = dataclasses.replace(plan, ranks=ALONE)
    settings, checkpoint = plan.settings, plan.checkpoint
    reporter.line(
        f"Would scale {len(checkpoint.A_log)} A_log tensors by {settings.method} ({settings.granularity}, "
        f"{settings.form}) and write {checkpoint.total_bytes() / 1e9:.1f} GB to {plan.output}."
        + (f" Would push that to {plan.repo_id}." if plan.repo_id else "")
    )
    if not plan.runs_model:
        reporter.line("No text is read and no model is run.")
        return
    with temporary_folder() as folder:
        rehearse(plan, folder, reporter)
        stock = open_stock(plan, folder, reporter)
        texts = read_texts(plan, stock, reporter)
        settings, _, _ = settle_lengths(plan, stock, texts, reporter)
        if plan.given is None:
            reach_note(prepare_problem(plan, stock, texts.calibration, settings, reporter), reporter)


def find_scales(plan: Plan, folder: Path, journals: ExitStack, reporter: Reporter) -> tuple[Plan, Found]:
    """Take the scales of a method that needs no model, or calibrate the model that the checkpoint holds.

    Args:
        journals: takes that of the calibration.

    Returns:
        The plan with what it left to choose, and the scales.
    """
    from calibrator.calibration import calibrate
    from calibrator.comparison import measure_baseline
    from calibrator.evaluation.memory import judged_kind, measure_reach

    if not plan.runs_model and plan.given:
        origin = "option" if plan.request.train_len else "unknown"
        note = f"The factors come from {plan.settings.method} alone: no text was read and no model was run."
        return plan, Found(plan.given, given_record(plan.settings, origin), notes=[note])
    stock = open_stock(plan, folder, reporter)
    texts = read_texts(plan, stock, reporter)
    settings, origin, span = settle_lengths(plan, stock, texts, reporter)
    if plan.given:
        baseline = measure_baseline(stock, span, plan.given, settings.load_dtype, None, reporter)
        return plan, Found(plan.given, given_record(settings, origin), notes=texts.notes, baseline=baseline)
    plan, problem, said = set_up(plan, stock, texts.calibration, settings, reporter)
    notes = [*texts.notes, *reach_note(problem, reporter), *said]
    is_auto = plan.request.target_len == "auto"
    if is_auto:
        with stock.recurrence:
            problem.skills.begin()
        judged_kind(problem.skills)
    journals.enter_context(problem.journal)
    outcome = calibrate(problem, origin)
    for sentence in outcome.sentences():
        reporter.line(sentence)
    record = outcome.record
    if is_auto:
        reach = measure_reach(stock, outcome.scales, span.text, problem.skills, settings, reporter)
        record = dataclasses.replace(record, target_len=max(reach.lengths), reach=reach)
    records = [text.record("calibration") for text in texts.calibration]
    baseline = measure_baseline(stock, span, outcome.scales, settings.load_dtype, (problem, outcome), reporter)
    return plan, Found(outcome.scales, record, records, notes, baseline)


def set_up(
    plan: Plan, stock: StockModel, texts: Sequence[Text], settings: Settings | None, reporter: Reporter
) -> tuple[Plan, Problem, list[str]]:
    """Choose an extension of the positions if there is a choice, and set up the calibration with it."""
    problem = prepare_problem(plan, stock, texts, settings, reporter)
    if len(plan.extensions) < 2:
        return plan, problem, []
    from calibrator.positions import choose_extension

    chosen, sentence = choose_extension(problem, plan.extensions)
    reporter.line(sentence)
    request = dataclasses.replace(plan.request, rope=chosen)
    extensions = {chosen: plan.extensions[chosen]} if chosen else {}
    plan = dataclasses.replace(plan, request=request, extensions=extensions)
    return plan, prepare_problem(plan, stock, texts, settings, reporter), [sentence]


def prepare_problem(
    plan: Plan, stock: StockModel, texts: Sequence[Text], settings: Settings | None, reporter: Reporter
) -> Problem:
    """The calibration's problem; a process that only takes its share has no settings and texts of its own."""
    from calibrator.calibration import prepare_calibration

    # The staging directory beside the output shows that this folder can be written to.
    beside, memory = plan.output.absolute().parent, plan.request.memory
    given = stock, texts, settings, reporter, plan.snapshot.revision
    return prepare_calibration(*given, memory=memory, ranks=plan.ranks, elsewhere=beside)


def reach_note(problem: Problem, reporter: Reporter) -> list[str]:
    """Say how far factors are judged where the text is too short for the target."""
    reach, target_len = max(map(len, problem.validation.documents)), problem.settings.target_len
    if reach >= target_len:
        return []
    note = f"Factors for {target_len:,} tokens are judged on {reach:,} only: no more is set aside."
    reporter.warn(f"{note} A longer text, --data, is judged farther.")
    return [note]


def open_stock(plan: Plan, folder: Path, reporter: Reporter) -> StockModel:
    """Load the model that the checkpoint holds, by way of a working copy where stock code cannot read it."""
    checkpoint = plan.checkpoint
    base_folder = plan.ranks.from_first(lambda: write_working_copy(checkpoint, folder, reporter))
    if not base_folder.is_dir():
        # The first process writes its copy on another host.
        base_folder = write_working_copy(checkpoint, folder, reporter)
    stock = load_stock(checkpoint, base_folder, plan.request, reporter, memory=plan.request.memory)
    if len(plan.extensions) == 1:
        stock.extend_positions(plan.rope)
    plan.ranks.gather(0)
    if base_folder.is_relative_to(folder):
        shutil.rmtree(base_folder)
    return stock


def read_texts(plan: Plan, stock: StockModel, reporter: Reporter) -> ChosenTexts:
    """Read what to calibrate on and what to measure on."""
    from calibrator.chosen_texts import TextChoice, read_chosen
    from calibrator.text import TextSource

    request = plan.request
    novel, other_novel = TextSource(CALIBRATION_NOVEL), TextSource(HELD_OUT_NOVEL)
    if plan.snapshot.kind == "demo":
        data, held_out = TextChoice(novel), TextChoice(other_novel)
    else:
        data = TextChoice(TextSource(PG19_TRAIN), novel)
        # Without a table it only probes that both models say the same.
        held_out = TextChoice(TextSource(PG19_TEST), other_novel) if request.windows else TextChoice(other_novel)
    chosen = [TextChoice(TextSource.parse(text)) for text in request.data] or [data]
    if request.held_out:
        held_out = TextChoice(TextSource(request.held_out))
    limit = TEXT_TARGETS * plan.target_len
    return read_chosen(stock, [] if plan.given else chosen, held_out, limit, request.join_documents, reporter)


def settle_lengths(
    plan: Plan, stock: StockModel, texts: ChosenTexts, reporter: Reporter
) -> tuple[Settings, str, Span]:
    """The settings with the training length, where it is from, and what the table is measured on."""
    from calibrator.comparison import check_predictions, choose_span
    from calibrator.train_len import find_train_len

    check_predictions(stock, texts.held_out)
    train_len, origin = plan.request.train_len, "option"
    if train_len is None:
        known_by = plan.snapshot.name, plan.snapshot.kind
        train_len, origin = find_train_len(stock, *known_by, texts.calibration or (texts.held_out,), reporter)
    reporter.line(f"Training length {train_len:,} tokens ({ORIGINS[origin]}), target length {plan.target_len:,}.")
    settings = dataclasses.replace(plan.settings, train_len=check_lengths(train_len, plan.target_len))
    span = choose_span(stock, texts.held_out, settings.train_len, settings.target_len, plan.request.windows)
    return settings, origin, span


def check_lengths(train_len: int, target_len: int) -> int:
    """The training length, which the target must reach. Raises UsageError."""
    if target_len < train_len:
        raise UsageError(
            f"The model was trained at {train_len} tokens, more than the {target_len} to calibrate for.",
            "Choose a longer --target-len, or give another --train-len.",
        )
    return train_len


def given_record(settings: Settings, train_len_origin: str) -> CalibrationRecord:
    """The manifest's entry for scales that a method gave without text or model."""
    own = ("method", "granularity", "form", *sorted(METHODS[settings.method].options))
    return CalibrationRecord(
        method=settings.method,
        settings={name: getattr(settings, name) for name in own},
        train_len=settings.train_len or None,
        train_len_origin=train_len_origin,
        target_len=None,
        seed=settings.seed,
        steps=0,
        kept_step=0,
        guard="",
        seconds=0.0,
        device="cpu",
    )


def with_length(plan: Plan, scales: ScaleSet) -> Plan:
    """The plan with what the copy will say of its length; no more than the source does if nothing is scaled."""
    lengths: dict[str, int] = {}
    if plan.rope or any(log_s.any() for log_s in scales.log_s.values()):
        raise_limit = bool(plan.request.raise_position_limit or plan.rope)
        lengths = raised_lengths(plan.checkpoint, plan.served_len, raise_limit=raise_limit)
    target_len = max(lengths.values(), default=None) if plan.given else plan.target_len
    checkpoint = dataclasses.replace(plan.checkpoint, target_len=target_len, entries={**lengths, **plan.rope})
    return dataclasses.replace(plan, checkpoint=checkpoint)


def bake_into(plan: Plan, folder: Path, scales: ScaleSet, reporter: Reporter) -> BakeReport:
    """Write the scaled copy and its scale set."""
    dtype = plan.request.a_log_dtype
    report = bake(plan.checkpoint, folder, scales=scales, a_log_dtype=dtype, reporter=reporter)
    save_scales(folder, scales, plan.checkpoint.A_log)
    return report


def describe(plan: Plan, found: Found, report: BakeReport, measured: Measured) -> Manifest:
    """The manifest of a conversion."""
    checkpoint, (table, memory) = plan.checkpoint, measured
    return Manifest(
        source=source_record(checkpoint),
        form=found.scales.form,
        granularity=found.scales.granularity,
        load_dtype=checkpoint.load_dtype,
        changed=report.changed,
        identical_tensors=report.identical,
        texts=[*found.texts, *([table.text] if table else [])],
        calibration=found.calibration,
        perplexity=table,
        versions=read_versions(),
        command=repeating_line("mmod-convert", [name_of(plan.request.model)], plan.request, plan.snapshot),
        notes=[*found.notes, *length_note(checkpoint, plan.served_len, checkpoint.entries, plan.request.rope)],
        entries={key: value for key, value in checkpoint.entries.items() if key not in plan.rope},
        rope=plan.request.rope,
        memory=memory,
        tokenizer=checkpoint.tokenizer.record if checkpoint.tokenizer else None,
    )


def describe_beforehand(plan: Plan) -> Manifest:
    """What is known of the manifest before anything slow."""
    found = Found(plan.supposed, given_record(plan.settings, "unknown"))
    return describe(with_length(plan, plan.supposed), found, BakeReport([], 0), (None, None))
