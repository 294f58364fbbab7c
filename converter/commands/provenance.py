"""What a manifest records of the source and of package versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable

from calibrator.kernels import LOADED
from converter import __version__
from converter.layouts import Checkpoint
from converter.manifest import SourceRecord

VERSIONS_OF = ("torch", "transformers", "numpy", "safetensors", "mamba-ssm", "causal-conv1d", "numba")


def source_record(checkpoint: Checkpoint) -> SourceRecord:
    """The manifest's entry for a source."""
    snapshot = checkpoint.snapshot
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
    return versions | {package.replace("_", "-"): origin for package, origin in LOADED.items()}
