"""From texts to tokens: files, folders, JSONL and Hub data sets, and windows that never join documents."""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from converter.checkpoint_files import in_short
from converter.errors import TextError, UsageError, boundary, proxy_advice
from converter.hub import hub_errors
from converter.manifest import TextRecord
from converter.reporting import SILENT, Reporter
from converter.safetensors_file import LFS_ADVICE, is_lfs_pointer

TEXT_FIELDS = ("text", "content", "document", "article")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", *JSON_SUFFIXES)
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
ANSWER_SECONDS = 5

MOST_CHARACTERS = 64
"""Characters of a text that are read for a token that is wanted; more are never needed."""
MOST_UNKNOWN = 0.5
"""Share of a text's tokens that stand for what the tokenizer does not know."""
PIECE = 64
"""Tokens of a piece by which shared text is recognised. Different texts share pieces only where one quotes."""


@dataclass(frozen=True)
class TextSource:
    """A text as the user names it.

    Attributes:
        location: a file of text or of JSON rows, a folder of them, or ``org/dataset[:split]`` on the Hub.
        weight: how often windows are drawn from it, relative to the other texts.
    """

    location: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TextSource:
        """Parse ``LOCATION`` or ``LOCATION=WEIGHT``; the name of an existing path has no weight."""
        location, equals, weight = text.rpartition("=")
        if not equals or os.path.exists(os.path.expanduser(text)):
            return cls(text)
        try:
            value = float(weight)
        except ValueError:
            return cls(text)
        if not 0 < value < float("inf"):
            raise UsageError(f"The weight of {location} is {weight}.", "Give a number above 0.")
        return cls(location, value)


@dataclass(frozen=True)
class Text:
    """A tokenised text.

    Attributes:
        name: file name or Hub id, never a path; it says where hard line ends were taken out.
        documents: token ids of each document, int64, one axis.
        weight: see :class:`TextSource`.
    """

    name: str
    documents: tuple[Tensor, ...]
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(document) for document in self.documents)

    def share_of(self, other: Text) -> float:
        """The share of another text's pieces that occur anywhere in this one, from 0 to 1."""
        pieces = torch.cat([_fingerprints(document)[::PIECE] for document in other.documents])
        if not len(pieces):
            return 0.0
        own = torch.cat([_fingerprints(document) for document in self.documents])
        return float(torch.isin(pieces, own).double().mean())

    def record(self, role: str) -> TextRecord:
        """The text's entry in the manifest."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.to(torch.int32).numpy().astype("<i4").tobytes())
        return TextRecord(self.name, role, self.tokens, digest.hexdigest(), len(self.documents))


def read_text(
    source: TextSource,
    tokenizer: Any,
    *,
    limit: int,
    join: bool = False,
    rows: int | None = None,
    arrange: Callable[[str], Callable[[str], str]] | None = None,
    reporter: Reporter = SILENT,
) -> Text:
    """Read and tokenise documents until ``limit`` tokens are there.

    Each document starts with the tokens that the tokenizer puts before a text, as the model was trained with.

    Args:
        tokenizer: a transformers tokenizer.
        limit: tokens after which reading stops; the last document is cut there.
        join: make one document of all, with the end-of-text token between them where the tokenizer starts none
            with a token of its own.
        rows: of the model's embedding, which no token may lie beyond.
        arrange: called with the first document; what it returns is applied to each.
        reporter: told which files of a folder are not read.

    Raises:
        TextError: nothing can be read, the tokenizer does not know it, or a token lies beyond the embedding.
    """
    name, contents = _open(source.location, reporter)
    # The tokenizer may mark the start of each document itself.
    is_parted = join and not tokenizer("").input_ids and tokenizer.eos_token_id is not None
    separator = [tokenizer.eos_token_id] if is_parted else []
    documents: list[Tensor] = []
    room = limit
    arranged: Callable[[str], str] = str
    for number, content in enumerate(contents, 1):
        # A file of a gigabyte would take minutes in the tokenizer, for tokens that are cut off again.
        content = content[: MOST_CHARACTERS * room]
        if number == 1 and arrange is not None:
            arranged = arrange(content)
            name += "" if arranged is str else " (unwrapped)"
        content = arranged(content)
        with boundary(f"The tokenizer fails on document {number} of {name}", TextError, "Leave that one out."):
            tokens = tokenizer(content).input_ids
        ids = torch.tensor((separator if documents else []) + tokens, dtype=torch.int64)
        ids = ids[:room]
        if len(ids):
            check_ids(ids, rows, tokenizer, f"{name}, document {number}")
            documents.append(ids)
            room -= len(ids)
        if room <= 0:
            break
    if not documents:
        raise _holds_none(source)
    whole = torch.cat(documents)
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = 0.0 if unknown is None else float((whole == unknown).double().mean())
    if share > MOST_UNKNOWN:
        raise TextError(
            f"The tokenizer knows too little of {name}: {share:.0%} of the tokens are {tokenizer.unk_token!r}.",
            "It belongs to another model, or the text is in another script: give the model's own, or another text.",
        )
    return Text(name, (whole,) if join else tuple(documents), source.weight)


def _holds_none(source: TextSource) -> TextError:
    return TextError(f"{source.location} holds no text.", "Give a file with text in it.")


def check_ids(ids: Tensor, rows: int | None, tokenizer: Any, where: str) -> None:
    """Raise TextError for the first token without a row in the embedding, on which a forward pass fails."""
    if rows is None or not len(ids) or int(ids.max()) < rows:
        return
    place = int((ids >= rows).nonzero()[0])
    token = int(ids[place])
    raise TextError(
        f"{where}: token {place + 1} is {tokenizer.decode([token])!r} with the id {token}, and the model's "
        f"embedding has {rows} rows.",
        "The tokenizer has tokens that the model does not know. Take them out of the text, or use the model's own.",
    )


def require_texts(sources: Iterable[TextSource]) -> None:
    """Refuse a text that is not there or cannot be read, before anything slow.

    Raises:
        TextError: no such file, it holds no document or its first is none, or the Hub has no such data set or does
            not answer.
    """
    for source in sources:
        _, contents = _open(source.location, Reporter())
        is_here = os.path.exists(os.path.expanduser(source.location))
        is_read = is_here or not _is_on_hub(source.location.partition(":")[0])
        if is_read and next(contents, None) is None:
            raise _holds_none(source)


def require_unweighted(sources: Iterable[TextSource]) -> None:
    """Refuse weights for texts that are read one after another. Raises UsageError."""
    for source in sources:
        if source.weight != 1:
            raise UsageError(
                f"{source.location} has the weight {source.weight:g}, and these texts are read one after another.",
                "Leave out the weight.",
            )


def _open(location: str, reporter: Reporter) -> tuple[str, Iterator[str]]:
    path = Path(os.path.expanduser(location))
    # An empty name would be the current folder.
    if location and path.is_dir():
        files, others = _files_of(path)
        kinds = ", ".join(TEXT_SUFFIXES)
        if not files:
            raise TextError(f"The folder {path} holds no {kinds} file.", "Give such files.")
        if others:
            reporter.warn(f"Of the folder {path.name}, {in_short(others)} are not read: empty, or no {kinds}.")
        return path.resolve().name, (content for file in files for content in _read_file(file))
    if path.is_file() or path.is_fifo():
        return path.name, _read_file(path)
    is_named = path.suffix.lower() in TEXT_SUFFIXES
    if is_named or location.count("/") != 1 or location.startswith((".", "/", "~")):
        raise TextError(f"There is no text {location}.", "Give a text file, a folder, or a Hub data set org/name.")
    return location, _stream_dataset(location)


def _files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """The texts of a folder, and the names of all else that lies in it and is not hidden."""
    files, others = [], []

    def refuse(error: OSError) -> NoReturn:
        raise TextError(f"{error.filename} cannot be read: {error.strerror}.", "See to its rights.") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link to a folder is not followed.
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for file in (Path(parent, name) for name in [*names, *linked] if not name.startswith(".")):
            if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES and file.stat().st_size:
                files.append(file)
            else:
                others.append(str(file.relative_to(folder)))
    return sorted(files), others


def _read_file(path: Path) -> Iterator[str]:
    """The documents of a file: its rows if it holds JSON, whatever its name is, else all of it as one."""
    with boundary(
        f"{path} cannot be read", TextError, "Texts are UTF-8 and not packed; JSONL has one object a line."
    ):
        try:
            file = io.BytesIO(_drained(path)) if path.is_fifo() else path.open("rb")
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}.", "See to its rights.") from error
        with file:
            start = file.read(512)
            file.seek(0)
            if is_lfs_pointer(start):
                raise TextError(f"{path} is a git-lfs pointer, not the text itself.", LFS_ADVICE)
            if path.suffix.lower() in TABLE_SUFFIXES:
                raise TextError(
                    f"{path} is a table, not a text.", "Write its text column as JSONL, one object a line."
                )
            # Only with a byte order mark is a file surely UTF-16.
            is_wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            yield from _documents(io.TextIOWrapper(file, "utf-16" if is_wide else "utf-8-sig"), path)


@functools.cache
def _drained(pipe: Path) -> bytes:
    """All that comes out of a pipe, which can be read once, and texts are read twice."""
    return pipe.read_bytes()


def _documents(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    is_json = path.suffix.lower() in JSON_SUFFIXES
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if isinstance(_parse(first, None), dict):
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield _text_of(_parse(line, where), where)
        return
    content = file.read()
    if "\0" in content:
        raise TextError(f"{path} is no text in UTF-8: it holds zero bytes.", "Save it as UTF-8.")
    may_be_json = is_json or first.lstrip()[:1] in ("{", "[")
    whole = _parse(content, path.name if is_json else None) if may_be_json else None
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            yield _text_of(row, f"{path.name}, row {number}")
    elif is_json or whole is not None:
        yield _text_of(whole, path.name)
    elif content.strip():
        yield content


def _parse(text: str, where: str | None) -> Any:
    """Parse JSON. Other text gives None, or a TextError if ``where`` names its place."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if where is None:
            return None
        raise TextError(f"{where} is no JSON: {error}.", "JSONL has one object a line.") from error


def _text_of(row: Any, where: str) -> str:
    fields = [row[field] for field in TEXT_FIELDS if field in row] if isinstance(row, dict) else [row]
    text = next((value for value in fields if isinstance(value, str)), None)
    if text is None:
        raise TextError(f"{where} has no text field.", f"It needs one of: {', '.join(TEXT_FIELDS)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise TextError(
            f"{where} holds half a character, {half!r}, as character {error.start + 1}.",
            "Such halves come from cutting between two escapes. Write the character whole, or take it out.",
        ) from error
    return text


def _stream_dataset(location: str) -> Iterator[str]:
    """Read a Hub data set row by row, without downloading it whole."""
    name, _, split = location.partition(":")
    with boundary(f"The data set {name} cannot be read", TextError, f"Check its name. {proxy_advice()}"):
        from datasets import load_dataset

        _is_on_hub(name)
        for row in load_dataset(name, split=split or "train", streaming=True):
            yield _text_of(row, name)


def _is_on_hub(name: str) -> bool:
    """Ask once for a data set's entry; load_dataset would retry for half a minute if the Hub is out of reach.

    Returns:
        False where the Hub refuses, or is not to be asked: load_dataset says what that means for the data set.

    Raises:
        TextError: no answer at all, or no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    with hub_errors(name, TextError, "Or give a file.", "data set"):
        try:
            HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
            return True
        except RepositoryNotFoundError:
            raise
        except (HfHubHTTPError, OfflineModeIsEnabled):
            return False


def _fingerprints(tokens: Tensor) -> Tensor:
    """A number for each run of ``PIECE`` tokens in a document; equal runs have equal numbers."""
    count = max(0, len(tokens) - PIECE + 1)
    found = torch.zeros(count, dtype=torch.int64)
    for place in range(PIECE):
        found = found * 6364136223846793005 + tokens[place : place + count] + 1
    return found


def tiled(document: Tensor, length: int) -> list[Tensor]:
    """The windows of ``length`` tokens that stand one behind the other in a document."""
    return [window for window in document.split(length) if len(window) == length]


def take_span(text: Text, length: int, windows: int) -> Tensor:
    """Cut windows from the start of a text, each within one document.

    Args:
        length: tokens a window.
        windows: how many.

    Returns:
        (windows, length) token ids.

    Raises:
        TextError: the text is too short.
    """
    cut = [window for document in text.documents for window in tiled(document, length)]
    if len(cut) < windows:
        raise TextError(
            f"{text.name} has room for {len(cut)} windows of {length} tokens; {windows} are needed "
            f"(it has {text.tokens} tokens in {len(text.documents)} documents).",
            "Give a longer text, fewer windows or shorter lengths.",
        )
    return torch.stack(cut[:windows])


def hold_out(texts: Iterable[Text], tokens: int, at_least: int) -> tuple[list[Text], list[Tensor]]:
    """Set parts of the texts aside to validate on, from each text in proportion to its weight.

    A text loses whole documents, its longest ones but one, and then the end of the longest; never more than a
    quarter of its tokens, nor of its longest document.

    Args:
        tokens: how many to set aside.
        at_least: tokens that the longest document left for calibration must have.

    Returns:
        The texts without those parts, and the parts, each of one document.

    Raises:
        TextError: the texts are too short.
    """
    texts = list(texts)
    weights = sum(text.weight for text in texts)
    kept, held_out = [], []
    for text in texts:
        longest, *others = sorted(text.documents, key=len, reverse=True)
        room = min(round(tokens * text.weight / weights), text.tokens // 4)
        left = []
        for document in [*others, longest]:
            size = min(room, len(document) if document is not longest else len(document) // 4)
            room -= size
            if size:
                held_out.append(document[-size:])
            if size < len(document):
                left.append(document[: len(document) - size])
        kept.append(Text(text.name, tuple(left), text.weight))
    found = max(len(document) for text in kept for document in text.documents)
    if found < at_least or not held_out:
        names = ", ".join(text.name for text in texts)
        tokens, documents = sum(text.tokens for text in texts), sum(len(text.documents) for text in texts)
        raise TextError(
            f"{names}: found {tokens} tokens in {documents} documents. Once a part is set aside to validate on, "
            f"the longest document has {found} tokens; {at_least} are needed.",
            "Give a longer text with --data, a smaller --target-len, or --join-documents.",
        )
    return kept, held_out


class WindowSampler:
    """Draws windows at random places of the texts, with a seed.

    Args:
        texts: at least one document must hold a window of the lengths that are drawn.

    Attributes:
        longest: token ids of the longest document.
    """

    def __init__(self, texts: Iterable[Text], seed: int) -> None:
        self._texts = list(texts)
        self.generator = torch.Generator().manual_seed(seed)
        self.longest = max((document for text in self._texts for document in text.documents), key=len)

    def draw(self, length: int, count: int) -> Tensor:
        """Draw windows of ``length`` tokens, each place within a text as likely as any other.

        Returns:
            (count, length) token ids.
        """
        documents: list[Tensor] = []
        odds: list[float] = []
        for text in self._texts:
            fitting = [document for document in text.documents if len(document) >= length]
            rooms = [len(document) - length + 1 for document in fitting]
            documents += fitting
            odds += [text.weight * room / sum(rooms) for room in rooms]
        weights = torch.tensor(odds, dtype=torch.float64)
        chosen = torch.multinomial(weights, count, replacement=True, generator=self.generator)
        windows = []
        for index in chosen.tolist():
            document = documents[index]
            start = int(torch.randint(len(document) - length + 1, (), generator=self.generator))
            windows.append(document[start : start + length])
        return torch.stack(windows)
