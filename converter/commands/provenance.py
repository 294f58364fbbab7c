"""What a manifest records of where things come from: the source, and the versions of what ran."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable

from converter import __version__
from converter.layouts import Checkpoint
from converter.manifest import SourceRecord
from converter.source import Snapshot

VERSIONS_OF = ("torch", "transformers", "numpy", "safetensors", "mamba-ssm", "causal-conv1d", "numba")


def source_record(snapshot: Snapshot, checkpoint: Checkpoint) -> SourceRecord:
    """The manifest's entry for a source."""
    composed = dataclasses.asdict(snapshot.manifest) if snapshot.manifest else None
    return SourceRecord(
        name=snapshot.name,
        kind=snapshot.kind,
        revision=snapshot.revision,
        layout=checkpoint.layout,
        model_type=checkpoint.model_type,
        composed_from=composed,
        quantisation=checkpoint.quantisation,
    )


def read_versions(also: Iterable[str] = ()) -> dict[str, str]:
    """Versions of this tool, Python and the packages that a result depends on; those that are installed."""
    versions = {"python": platform.python_version(), "mmod-convert": __version__}
    for package in (*VERSIONS_OF, *also):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_card(snapshot: Snapshot) -> str | None:
    """The source's README.md, or None where it has none."""
    return snapshot.read("README.md").decode("utf-8", "replace") if "README.md" in snapshot.carried else None
