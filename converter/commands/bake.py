"""``mmod bake``: writes scales that exist already into a copy of a checkpoint."""

from __future__ import annotations

import dataclasses
from functools import partial

from converter.baking import BakeReport, bake
from converter.command_line import name_of, repeating_line
from converter.commands.opening import add_tokenizer
from converter.commands.provenance import read_versions, source_record
from converter.commands.rehearsal import check_loading, rehearsed
from converter.commands.requests import BakeRequest
from converter.digests import sealed
from converter.errors import UsageError
from converter.fit import Fit, fit_scales
from converter.layouts import Checkpoint, read_checkpoint
from converter.manifest import Manifest
from converter.output import check_output, staged
from converter.proof import verify
from converter.reporting import Reporter
from converter.rope import rope_entries
from converter.scales import ScaleSet
from converter.scales_file import StoredScales, load_stored_scales, save_scales
from converter.served_length import length_note, raised_lengths
from converter.source import Snapshot, resolve
from hub_cards.card import write_card


def bake_scales(
    request: BakeRequest, reporter: Reporter, scales: ScaleSet | None = None
) -> tuple[Snapshot, BakeReport]:
    """Write scales that exist already into a copy of a checkpoint.

    Args:
        scales: in place of what ``request.scales`` names.

    Returns:
        What was scaled, and what was written.

    Raises:
        MmodError: whatever keeps the copy from being complete; nothing is left behind then.
    """
    snapshot = resolve(request.model, revision=request.revision, compose=request.compose)
    check_output(request.output, request.overwrite, snapshot.location)
    checkpoint = read_checkpoint(snapshot, trust_a_log=request.trust_a_log)
    stored = (
        load_stored_scales(request.scales)
        if scales is None
        else StoredScales(scales, checkpoint.A_log, None, request.scales)
    )
    fit = fit_scales(checkpoint, stored.scales, stored.base_values(), anyway=request.anyway)
    recorded = stored.manifest.tokenizer if stored.manifest else None
    checkpoint = add_tokenizer(checkpoint, request.tokenizer, reporter, recorded)
    target_len = stored.manifest.length if stored.manifest else None
    if request.raise_position_limit and target_len is None:
        raise UsageError("These scales do not tell for what length they are.", "Leave out --raise-position-limit.")
    found_with = stored.manifest.rope if stored.manifest else None
    if found_with not in (None, request.rope) and not request.anyway:
        raise UsageError(f"These scales were found with --rope {found_with}.", "Add it, or --anyway.")
    rope = rope_entries(checkpoint, request.rope)
    raised = raised_lengths(checkpoint, target_len, raise_limit=request.raise_position_limit or bool(rope))
    notes = length_note(checkpoint, target_len, raised, request.rope)
    checkpoint = dataclasses.replace(checkpoint, target_len=target_len, entries={**raised, **rope})
    with staged(request.output, request.overwrite, snapshot.location, reporter) as folder:
        with rehearsed(checkpoint, folder) as trial:
            report = bake(
                checkpoint,
                folder,
                scales=fit.scales,
                a_log_dtype=request.a_log_dtype,
                read_back=request.proof,
                beside=partial(check_loading, checkpoint, trial, reporter),
                reporter=reporter,
            )
        save_scales(folder, stored.scales, stored.base)
        known = _describe(request, checkpoint, stored, report, raised, fit, notes)
        manifest = sealed(known, folder, report.digests)
        manifest.write(folder)
        if request.proof:
            converted = resolve(str(folder), compose=True)
            verify(converted, checkpoint, read_back=report.read_back, reporter=reporter)
        # Its pictures, slower than a small model's copy, come with `mmod card` or a push.
        write_card(folder, manifest, snapshot, request.output, reporter, draw=False)
    return snapshot, report


def _describe(
    request: BakeRequest,
    checkpoint: Checkpoint,
    stored: StoredScales,
    report: BakeReport,
    entries: dict[str, int],
    fit: Fit,
    notes: list[str],
) -> Manifest:
    """The manifest that came with the scales if this is the same conversion again, else a new one."""
    source = source_record(checkpoint)
    added = checkpoint.tokenizer.record if checkpoint.tokenizer else None
    earlier = stored.manifest
    if (
        earlier is not None
        and earlier.source == source
        and earlier.changed == report.changed
        and earlier.tokenizer in (None, added)
        and earlier.rope == request.rope
    ):
        told = length_note(checkpoint, earlier.length, earlier.entries, earlier.rope)
        return dataclasses.replace(
            earlier,
            changed=report.changed,
            identical_tensors=report.identical,
            scales_only=False,
            tokenizer=added,
            entries=entries,
            # What the earlier entries alone told, these may not.
            target_len=None if earlier.calibration and earlier.calibration.target_len else earlier.length,
            notes=[*(note for note in earlier.notes if note not in told), *notes],
        )
    found_on = (earlier.scales_of or earlier.source) if earlier else None
    origin = found_on.name if found_on else name_of(request.scales)
    note = f"The factors were given, found for {origin}; nothing was calibrated or measured on this model."
    arguments = [name_of(request.model), request.output.name]
    request = dataclasses.replace(request, scales=stored.location)
    return Manifest(
        source=source,
        form=stored.scales.form,
        granularity=stored.scales.granularity,
        load_dtype=checkpoint.load_dtype,
        changed=report.changed,
        identical_tensors=report.identical,
        texts=[],
        calibration=None,
        perplexity=None,
        versions=read_versions(),
        command=repeating_line("mmod bake", arguments, request, checkpoint.snapshot),
        notes=[f"{note} {fit.agreement}", *notes],
        entries=entries,
        rope=request.rope,
        scales_of=found_on if found_on != source else None,
        tokenizer=added,
        target_len=earlier.length if earlier else None,
    )
