"""Complete conversions made by the file side alone, with their manifest and scales, for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from converter.baking import BakeReport, bake
from converter.digests import sealed
from converter.layouts import Checkpoint, read_checkpoint
from converter.manifest import Manifest, SourceRecord
from converter.output import staged
from converter.proof import Proof, verify
from converter.scales import ScaleSet
from converter.scales_file import save_scales
from converter.source import Snapshot
from tests.converted_folder import CALIBRATION
from tests.small_checkpoints import random_scales, source


def write_records(folder: Path, checkpoint: Checkpoint, scales: ScaleSet, **bake_options: Any) -> BakeReport:
    """Bake into ``folder`` and add scales and manifest."""
    said = {name: bake_options.pop(name) for name in ("target_len", "entries") if name in bake_options}
    report = bake(dataclasses.replace(checkpoint, **said), folder, scales=scales, **bake_options)
    save_scales(folder, scales, checkpoint.A_log)
    snapshot = checkpoint.snapshot
    manifest = Manifest(
        source=SourceRecord(
            snapshot.name, snapshot.kind, snapshot.revision, checkpoint.layout, checkpoint.model_type
        ),
        form=scales.form,
        granularity=scales.granularity,
        load_dtype=checkpoint.load_dtype,
        changed=report.changed,
        identical_tensors=report.identical,
        texts=[],
        calibration=dataclasses.replace(CALIBRATION, target_len=said.get("target_len")),
        perplexity=None,
        versions={},
        command="",
    )
    sealed(manifest, folder).write(folder)
    return report


def convert(
    snapshot: Snapshot, output: Path, scales: ScaleSet | None = None, *, overwrite: bool = False, **options: Any
) -> Proof:
    """Bake, verify and put in place; random factors by layer unless given."""
    checkpoint = read_checkpoint(snapshot)
    scales = scales or random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()})
    with staged(output, overwrite, snapshot.folder) as folder:
        write_records(folder, checkpoint, scales, **options)
        return verify(source(folder), checkpoint)
