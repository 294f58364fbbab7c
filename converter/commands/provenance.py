"""What a manifest records of the source and of package versions, and the card that is kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

from calibrator.hub_kernels import LOADED
from converter import __version__
from converter.errors import OutputError
from converter.layouts import Checkpoint
from converter.manifest import Manifest, SourceRecord
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
    return versions | {package.replace("_", "-"): origin for package, origin in LOADED.items()}


def read_card(snapshot: Snapshot) -> str | None:
    """The source's README.md, or None if it has none."""
    return snapshot.read("README.md").decode("utf-8", "replace") if "README.md" in snapshot.carried else None


def replaced_card(output: Path, source: SourceRecord) -> str | None:
    """The card of the conversion that will be replaced, if it has text added by hand.

    Raises:
        OutputError: what was written is about another model.
    """
    from hub_cards.card import CARD_NAME, has_own_text
    from hub_cards.card import read_card as read_text

    card, earlier = read_text(output), Manifest.read(output) if output.is_dir() else None
    if card is None or earlier is None or not has_own_text(card):
        return None
    if earlier.source.name != source.name:
        raise OutputError(
            f"What was written by hand into {output / CARD_NAME} is about {earlier.source.name}.",
            "Move that elsewhere, or choose another name.",
        )
    return card
