"""Converted folders made by the file side alone, with scales drawn at random, for tests of cards and pushes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from converter.baking import bake
from converter.digests import sealed
from converter.layouts import read_checkpoint
from converter.manifest import (
    CalibrationRecord,
    Manifest,
    MemoryCell,
    MemoryTable,
    PerplexityTable,
    SourceRecord,
    TextRecord,
)
from converter.scales import Form, Granularity, auto_granularity
from converter.scales_file import save_scales
from converter.served_length import raised_lengths
from converter.source import resolve
from tests.small_checkpoints import random_scales

CALIBRATION_TEXT = TextRecord("Persuasion", "calibration", 4096, "a" * 64)
HELD_OUT_TEXT = TextRecord("Northanger Abbey", "held-out", 8192, "b" * 64)
CALIBRATION = CalibrationRecord(
    method="gradient",
    settings={"learning_rate": 0.05, "lengths": [256, 8192]},
    train_len=256,
    train_len_origin="measured",
    target_len=8192,
    seed=7,
    steps=14,
    kept_step=12,
    guard="",
    seconds=12.3,
    device="cpu",
)
PERPLEXITY = PerplexityTable(
    text=HELD_OUT_TEXT,
    span_tokens=65536,
    dtype="float32",
    base={"256": 43.66, "8192": 44.56, "32768": 152.49},
    converted={"256": 43.80, "8192": 41.30, "32768": 41.97},
    standard_error={"256": 0.002, "8192": 0.004},
)

MEMORY = MemoryTable(
    text=HELD_OUT_TEXT,
    skills="Within 256 tokens the unscaled model recalls: pass key 100% at 32 tokens.",
    kept="Within the training length no skill drops beyond chance.",
    window=128,
    cells=[
        MemoryCell("pass key", 256, 192, 16, base=0.5, sliding=0.5, converted=0.5, error=0.2),
        MemoryCell("pass key", 8192, 192, 16, base=0.25, sliding=0.0, converted=0.9375, error=0.1),
        MemoryCell("pass key", 8192, 32, 16, base=0.5, sliding=1.0, converted=1.0, error=0.05),
        MemoryCell("pass key", 8192, 4096, 16, base=0.0, sliding=0.0, converted=0.125, error=0.1),
        MemoryCell("random span", 8192, 192, 16, base=0.875, sliding=0.0, converted=0.75, error=0.1),
    ],
)
"""Of a model that keeps a key for a while; what it was not asked at 256 tokens is left out."""


def convert(
    model: str,
    folder: Path,
    *,
    granularity: Granularity | None = None,
    form: Form = "linear",
    seed: int = 0,
    **record: Any,
) -> Manifest:
    """Convert ``model`` into ``folder``, card not included, and return the manifest that was written.

    Args:
        record: fields of the manifest that are to differ from the usual ones.
    """
    snapshot = resolve(model)
    checkpoint = read_checkpoint(snapshot)
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    chosen = granularity or auto_granularity(next(iter(shapes.values())))
    scales = random_scales(shapes, chosen, form, seed)
    folder.mkdir()
    entries = raised_lengths(checkpoint, 8192)
    report = bake(dataclasses.replace(checkpoint, target_len=8192, entries=entries), folder, scales=scales)
    save_scales(folder, scales, checkpoint.A_log)
    source = SourceRecord(snapshot.name, snapshot.kind, snapshot.revision, checkpoint.layout, checkpoint.model_type)
    fields: dict[str, Any] = {
        "source": source,
        "form": form,
        "granularity": chosen,
        "load_dtype": checkpoint.load_dtype,
        "changed": report.changed,
        "identical_tensors": report.identical,
        "texts": [CALIBRATION_TEXT, HELD_OUT_TEXT],
        "calibration": CALIBRATION,
        "perplexity": PERPLEXITY,
        "versions": {"mmod-convert": "0.1.0", "torch": "2.13.0"},
        "entries": entries,
        "command": f"mmod-convert {snapshot.name} --target-len 8k --seed 7",
        **record,
    }
    manifest = sealed(Manifest(**fields), folder)
    manifest.write(folder)
    return manifest
