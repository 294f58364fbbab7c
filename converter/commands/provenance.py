"""What a manifest records of the source and of package versions, and the card that is kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

from calibrator.kernels import LOADED
from converter import __version__
from converter.errors import OutputError
from converter.layouts import Checkpoint
from converter.manifest import Manifest, SourceRecord
from converter.reporting import Reporter
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
    from hub_cards.card import CARD_NAME, card_text

    return card_text(snapshot.read(CARD_NAME)) if CARD_NAME in snapshot.carried else None


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


def write_card(
    folder: Path,
    manifest: Manifest,
    snapshot: Snapshot,
    output: Path,
    reporter: Reporter,
    *,
    repo_id: str | None = None,
    draw: bool = True,
) -> None:
    """Write a conversion's card, with the text that a person added to the one that it replaces.

    Args:
        output: where ``folder`` will be put, in place of what is there now.
    """
    from hub_cards.card import make_card

    source_card, present = read_card(snapshot), replaced_card(output, manifest.source)
    card = make_card(folder, manifest, source_card=source_card, repo_id=repo_id, present=present, draw=draw)
    card.write(folder, reporter)
