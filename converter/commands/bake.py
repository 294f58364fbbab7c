"""``mmod bake``: writes scales that exist already into a copy of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from converter.baking import BakeReport, bake
from converter.command_line import name_of, repeating_line
from converter.commands.opening import add_tokenizer, refuse_gguf
from converter.commands.provenance import read_card, read_versions, replaced_card, source_record
from converter.commands.rehearsal import check_loading, rehearsed
from converter.commands.requests import BakeRequest
from converter.digests import sealed
from converter.errors import UsageError
from converter.fit import Fit, fit_scales
from converter.layouts import Checkpoint, Tensor, read_checkpoint
from converter.manifest import Manifest
from converter.output import check_output, staged
from converter.proof import verify
from converter.reporting import Reporter
from converter.rope import rope_entries
from converter.scales import ScaleSet
from converter.scales_file import StoredScales, load_stored_scales, save_scales
from converter.served_length import length_note, raised_lengths
from converter.source import Snapshot, resolve


@dataclass(frozen=True)
class Baked:
    """What ``mmod bake`` wrote, and of what."""

    snapshot: Snapshot
    report: BakeReport


def bake_scales(request: BakeRequest, reporter: Reporter, scales: ScaleSet | None = None) -> Baked:
    """Write scales that exist already into a copy of a checkpoint.

    Args:
        scales: in place of what ``request.scales`` names.

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
    found_with = stored.manifest.rope if stored.manifest else None
    if found_with not in (None, request.rope) and not request.anyway:
        raise UsageError(f"These scales were found with --rope {found_with}.", "Add it, or --anyway.")
    rope = rope_entries(checkpoint, request.rope)
    raised = raised_lengths(checkpoint, target_len, raise_limit=request.raise_position_limit or bool(rope))
    entries, notes = {**raised, **rope}, length_note(checkpoint, target_len, raised, request.rope)
    with staged(request.output, request.overwrite, snapshot.location, reporter) as folder:
        with rehearsed(checkpoint, folder, target_len=target_len, entries=entries) as trial:
            report = bake(
                checkpoint,
                folder,
                scales=fit.scales,
                a_log_dtype=request.a_log_dtype,
                target_len=target_len,
                entries=entries,
                read_back=request.proof,
                beside=partial(check_loading, checkpoint, trial, reporter),
                reporter=reporter,
            )
        save_scales(folder, stored.scales, stored.base or _own_A_log(checkpoint, stored))
        known = _describe(request, checkpoint, stored, report, raised, fit, notes)
        manifest = sealed(known, folder, report.digests)
        manifest.write(folder)
        if request.proof:
            converted = resolve(str(folder), compose=True)
            verify(converted, checkpoint, read_back=report.read_back, is_new=True, reporter=reporter)
        if request.check_load:
            check_load(folder, checkpoint)
        _write_card(folder, manifest, snapshot, request.output, reporter)
    return Baked(snapshot, report)


def _own_A_log(checkpoint: Checkpoint, stored: StoredScales) -> Mapping[str, Tensor]:
    """The A_log for scales of an earlier version, if they were found on this checkpoint."""
    earlier, snapshot = stored.manifest, checkpoint.snapshot
    is_base = earlier is not None and earlier.source.revision == snapshot.revision
    return checkpoint.A_log if is_base else {}


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
    source = source_record(checkpoint.snapshot, checkpoint)
    added = checkpoint.tokenizer.record if checkpoint.tokenizer else None
    earlier = stored.manifest
    if (
        earlier is not None
        and earlier.source == source
        # A run that failed after its calibration left its scales and no changed tensor.
        and earlier.changed in ([], report.changed)
        and earlier.tokenizer in (None, added)
        and earlier.rope == request.rope
    ):
        return dataclasses.replace(
            earlier,
            changed=report.changed,
            identical_tensors=report.identical,
            scales_only=False,
            tokenizer=added,
            entries=entries,
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
        notes=[" ".join(filter(None, [note, fit.agreement])), *notes],
        entries=entries,
        rope=request.rope,
        scales_of=found_on if found_on != source else None,
        tokenizer=added,
    )


def _write_card(folder: Path, manifest: Manifest, snapshot: Snapshot, output: Path, reporter: Reporter) -> None:
    """The card's text; its pictures, slower than a small model's copy, come with `mmod card` or a push."""
    from hub_cards.card import make_card

    present = replaced_card(output, manifest.source)
    card = make_card(folder, manifest, source_card=read_card(snapshot), present=present, draw=False)
    card.write(folder, reporter)


def check_load(folder: Path, checkpoint: Checkpoint) -> None:
    """Load a folder with stock transformers. Raises CalibrationError or LayoutError where that fails."""
    refuse_gguf(checkpoint)
    import torch

    from calibrator.model import load_model

    load_model(
        folder,
        checkpoint.A_log,
        device=torch.device("cpu"),
        dtype=getattr(torch, checkpoint.load_dtype),
        allow_slow=True,
    )
