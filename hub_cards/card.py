"""The model card: what was done to a model, what it gained and lost, how to use, repeat and check it.

The card has a part that is written again each time, between marks, and keeps everything outside of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from converter.disk import write_whole
from converter.errors import MmodError, OutputError, redacted_message
from converter.manifest import Manifest, SourceRecord
from converter.output import converted_name
from converter.reporting import SILENT, Reporter
from converter.source import Snapshot
from hub_cards.drawing import Picture
from hub_cards.metadata import FrontMatter, card_metadata, front_matter_block, merged, split_card
from hub_cards.plots import draw_pictures
from hub_cards.sections import write_sections

CARD_NAME = "README.md"
BEGIN = (
    "<!-- mmod:begin (written by `mmod card`; edit outside of these marks, what is between them is replaced) -->"
)
END = "<!-- mmod:end -->"
REPO_MARK = "<!-- mmod:repo {} -->"
GENERATED_PART = re.compile(r"<!-- mmod:begin\b.*?-->.*?<!-- mmod:end -->", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """A card and its pictures, not yet written.

    Attributes:
        warnings: sentences for the person who makes the card.
    """

    text: str
    pictures: tuple[Picture, ...]
    warnings: tuple[str, ...]

    def write(self, folder: Path, reporter: Reporter = SILENT) -> Path:
        """Put the card and its pictures into ``folder``, each whole or not at all, and return the card's path.

        Raises:
            OutputError: the disk refuses.
        """
        for warning in self.warnings:
            reporter.warn(warning)
        for picture in self.pictures:
            write_whole(folder / picture.path, picture.png)
        return write_whole(folder / CARD_NAME, self.text.encode())


@dataclass(frozen=True)
class _Parts:
    """A card that exists, or an empty one: its front matter, the repository it names, and the text that is kept."""

    front: FrontMatter
    repo_id: str | None
    before: str
    after: str


def make_card(
    folder: Path,
    manifest: Manifest,
    *,
    source_card: str | None,
    repo_id: str | None = None,
    present: str | None = None,
    draw: bool = True,
) -> Card:
    """The card of a converted folder, with the text that its present card keeps.

    Args:
        source_card: the source's README.md at the commit that was converted, whose metadata is inherited; None
            keeps the metadata that the folder's card has.
        repo_id: where the model will be, for the lines that load it; None for what the folder's card says.
        present: the card whose own text is kept; None for the folder's.
        draw: without, the card has no pictures.

    Raises:
        OutputError: the present card has broken marks.
        CorruptCheckpointError: the folder's factors or weights cannot be read.
    """
    present = read_card(folder) if present is None else present
    # A conversion that copies all files of its source copies the card as well; that one is no work of the user's.
    parts = _take_apart(present if present and present != source_card else "")
    repo_id = repo_id or parts.repo_id
    source = split_card(source_card or "")
    target_len = manifest.calibration.target_len if manifest.calibration else None
    name = repo_id or converted_name(manifest.source.name, target_len, manifest.name_ending)
    name = name.split("/")[-1]
    metadata = merged(card_metadata(manifest, source.metadata, name), parts.front.metadata)
    block = parts.front.block if metadata == parts.front.metadata else front_matter_block(metadata)
    pictures, warnings = _drawn(folder, manifest) if draw else ((), [])
    begin = f"{BEGIN}\n{REPO_MARK.format(repo_id)}" if repo_id else BEGIN
    body = f"{begin}\n\n{write_sections(folder, manifest, pictures, name, repo_id)}\n\n{END}"
    text = "\n\n".join(filter(None, [block.strip(), parts.before, body, parts.after]))
    if source.problem:
        warnings.append(f"The source's card is used without its metadata: {source.problem}.")
    if "license" not in metadata:
        why = "" if source_card is None else ", since the source's card names none"
        warnings.append(f"The card names no license{why}. Add one to {CARD_NAME} before you publish.")
    return Card(text + "\n", pictures, tuple(warnings))


def _drawn(folder: Path, manifest: Manifest) -> tuple[tuple[Picture, ...], list[str]]:
    """The pictures, or none and why: a card without them is still a card."""
    try:
        return draw_pictures(folder, manifest), []
    except MmodError:
        raise
    except Exception as error:
        return (), [f"The card has no pictures, since matplotlib cannot draw them: {redacted_message(error)}"]


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
    inherited, present = card_of(snapshot), replaced_card(output, manifest.source)
    card = make_card(folder, manifest, source_card=inherited, repo_id=repo_id, present=present, draw=draw)
    card.write(folder, reporter)


# What a card that exists keeps


def read_card(folder: Path) -> str | None:
    """The folder's card, or None if there is none."""
    path = folder / CARD_NAME
    return card_text(path.read_bytes()) if path.is_file() else None


def card_of(snapshot: Snapshot) -> str | None:
    """A source's card, or None if it has none."""
    return card_text(snapshot.read(CARD_NAME)) if CARD_NAME in snapshot.carried else None


def replaced_card(output: Path, source: SourceRecord) -> str | None:
    """The card of the conversion that will be replaced, if it has text added by hand.

    Raises:
        OutputError: what was written is about another model.
    """
    card, earlier = read_card(output), Manifest.read(output) if output.is_dir() else None
    if card is None or earlier is None or not has_own_text(card):
        return None
    if earlier.source.name != source.name:
        raise OutputError(
            f"What was written by hand into {output / CARD_NAME} is about {earlier.source.name}.",
            "Move that elsewhere, or choose another name.",
        )
    return card


def card_text(content: bytes) -> str:
    """A card's text with plain newlines: UTF-8, UTF-16 or UTF-32 as its first bytes tell, else of old Windows."""
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _take_apart(card: str) -> _Parts:
    front = split_card(card)
    # What a person wrote before this tool wrote a card follows what the tool says.
    before, generated, after = "", "", front.body
    if match := GENERATED_PART.search(front.body):
        before, generated, after = front.body[: match.start()], match[0], front.body[match.end() :]
    if "<!-- mmod:" in before + after:
        raise OutputError(
            f"{CARD_NAME} has a mark of this tool without its counterpart.",
            f"Restore the lines '{BEGIN}' and '{END}' around the generated part, or delete {CARD_NAME}.",
        )
    named = re.search(REPO_MARK.format(r"(\S+)"), generated)
    return _Parts(front, named[1] if named else None, before.strip(), after.strip())


def has_own_text(card: str) -> bool:
    """Whether a card that this tool wrote holds text that a person added."""
    parts = _take_apart(card)
    return bool(parts.before or parts.after)
