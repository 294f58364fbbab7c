"""Resolves a Hub id, local folder or bundled demo to a snapshot of its files.

A snapshot lists every file that the conversion may read, so that a change during the run is noticed. Nothing is
ever written to a source.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from converter.checkpoint_files import LEFT_OUT_FOLDERS, TOKENIZER_FILES, Choice, choose, is_tokenizer_core
from converter.errors import CorruptCheckpointError, SourceError, UsageError, system_errors
from converter.gguf_file import parts_of, read_gguf_header
from converter.hub import hub_errors
from converter.manifest import MANIFEST_NAME, Manifest, TokenizerRecord
from converter.safetensors_file import LFS_ADVICE, Header, is_lfs_pointer, read_header
from converter.shards import opening

Kind = Literal["hub", "folder", "demo"]

DEMOS = {
    "demo": "tiny-mamba2-256",
    "demo:mamba2": "tiny-mamba2-256",
    "demo:mamba": "tiny-mamba-256",
    "demo:recall": "copy-mamba2-512",
}

_END_BYTES = 4096
_HEADER_PIECE, _REMOTE_PIECE, _KEPT_BYTES = 1 << 16, 1 << 23, 1 << 19
_LFS_POINTER_BYTES = 1024
_RIGHTS = "See to its rights, and to the disk that it lies on."
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class SourceFile:
    """One file of a snapshot.

    Attributes:
        path: relative to the snapshot's folder, with forward slashes.
        size: bytes.
        mtime_ns: time of the last change; None for a file that stayed on the Hub.
        sha256: of the content, where the Hub tells it, as it does of large files, else None.
    """

    path: str
    size: int
    mtime_ns: int | None
    sha256: str | None = None


@dataclass(frozen=True)
class Snapshot(Choice):
    """A checkpoint's files as they were when it was resolved.

    Attributes:
        name: Hub id, demo name, or the last part of the folder's path.
        revision: commit of a Hub source, else ``sha256:…`` over config.json and parts of the weight files that
            every training changes, see :func:`_fingerprint`.
        folder: where the files lie; of a Hub model whose weights were not asked for, most are not there yet.
        manifest: of a checkpoint that this tool converted, else None.
    """

    name: str
    kind: Kind
    revision: str
    folder: Path
    files: tuple[SourceFile, ...]
    manifest: Manifest | None

    @property
    def location(self) -> Path:
        """The folder, or the file if a single file was named."""
        return self.folder / self.name if self.name in self.weights else self.folder

    def file(self, path: str) -> SourceFile:
        """The record of one file."""
        return next(file for file in self.files if file.path == path)

    def is_here(self, path: str) -> bool:
        """Whether a file lies on this machine."""
        return (self.folder / path).is_file()

    def open(self, path: str, start: int = 0, count: int | None = None) -> BinaryIO:
        """Open a file for reading from ``start`` on; one that was not downloaded is read by ranges.

        Args:
            count: no more than so many bytes will be read; None if that is not known.
        """
        if self.kind != "hub" or self.is_here(path):
            return opening(self.fetch(path))(start)
        end = self.file(path).size if count is None else start + count
        ahead = _HEADER_PIECE if count is None else min(max(count, 1), _REMOTE_PIECE)
        return io.BufferedReader(_RemoteFile(self.name, self.revision, path, start, end), ahead)

    def fetch(self, path: str) -> Path:
        """Where a file lies on this machine; one that stayed on the Hub is downloaded."""
        if self.is_here(path):
            return self.folder / path
        if self.kind != "hub":
            raise SourceError(f"{self.name} has no {path}.", "Give the folder of a whole checkpoint.")
        from huggingface_hub import hf_hub_download

        with hub_errors(self.name, SourceError):
            return Path(hf_hub_download(self.name, path, revision=self.revision))

    def read(self, path: str) -> bytes:
        """The content of a small file. Raises SourceError."""
        with system_errors(f"{path} of {self.name} cannot be read", SourceError, _RIGHTS):
            return self.fetch(path).read_bytes()

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        return any(is_tokenizer_core(path) for path in self.carried)

    def check_unchanged(self) -> None:
        """Compare size and time of every file with what they were.

        Raises:
            SourceError: a file changed or is gone.
        """
        for file in self.files:
            if file.mtime_ns is None:
                continue
            with system_errors(f"{file.path} of {self.name} cannot be read any more", SourceError, _RIGHTS):
                now = (self.folder / file.path).stat()
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                raise SourceError(
                    f"{file.path} of {self.name} changed while it was being read.",
                    "Start again when nothing writes to the source.",
                )


def resolve(model: str, *, revision: str | None = None, compose: bool = False, weights: bool = True) -> Snapshot:
    """Find a checkpoint and fix which one it is.

    Args:
        model: Hub id, path of a local folder or GGUF file, or a name in ``DEMOS``.
        revision: branch, tag or commit of a Hub id.
        compose: accept a checkpoint that this tool converted already.
        weights: download all files of a Hub id at once. Without, small ones are fetched and weights are read by
            ranges when they are needed.

    Raises:
        SourceError: it does not exist, cannot be reached or read, or was converted already.
    """
    folder = Path(os.path.expanduser(model))
    if model in DEMOS:
        snapshot = _resolve_folder(_demo_folder(DEMOS[model]), model, "demo", revision)
    elif folder.is_dir():
        snapshot = _resolve_folder(folder, folder.resolve().name, "folder", revision)
    elif folder.is_file() and folder.suffix == ".gguf":
        snapshot = _resolve_gguf(folder, revision)
    elif folder.exists():
        raise SourceError(
            f"{model} is a file.",
            "Name the folder that holds config.json and the weights, or a GGUF file whose name ends in .gguf.",
        )
    elif folder.suffix.lower() == ".gguf" and folder.parent.is_dir():
        raise SourceError(f"There is no file {model}.", "Check its name, or give a folder or a Hub id.")
    elif HUB_ID.fullmatch(model):
        return _resolve_hub(model, revision, compose, weights)
    else:
        raise SourceError(f"There is no folder {model}.", "Give a folder, a Hub id such as org/name, or demo.")
    _refuse_converted(snapshot.name, snapshot.manifest, compose)
    return snapshot


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's files, and which one it is."""

    files: tuple[Path, ...]
    record: TokenizerRecord


def resolve_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a local folder or Hub id, for a checkpoint that has none beside it.

    Args:
        revision: commit of a Hub id; None for the newest, or with HF_HUB_OFFLINE=1 the one in the local cache.

    Raises:
        SourceError: not found, or no tokenizer there.
    """
    folder = Path(os.path.expanduser(name))
    is_local = revision is None and folder.is_dir()
    if not is_local:
        if folder.is_file():
            raise SourceError(f"{name} is a file.", "Name the folder that holds the tokenizer.")
        if not HUB_ID.fullmatch(name):
            raise SourceError(
                f"There is no folder {name} to take a tokenizer from.", "Give a folder, or a Hub id: org/name."
            )
        from huggingface_hub import constants, snapshot_download

        with hub_errors(name, SourceError):
            # Asks for the newest commit first and downloads that one; the folder has the commit's name.
            folder = (
                _cached_folder(name, revision)
                if constants.HF_HUB_OFFLINE
                else Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
            )
    files = sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file())
    if not any(is_tokenizer_core(path.name) for path in files):
        raise SourceError(f"{name} has no tokenizer.", "Name another with --tokenizer.")
    if not is_local:
        return Tokenizer(tuple(files), TokenizerRecord(name, "hub", folder.name))
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return Tokenizer(tuple(files), TokenizerRecord(folder.resolve().name, "folder", f"sha256:{digest.hexdigest()}"))


def _refuse_converted(name: str, manifest: Manifest | None, compose: bool) -> None:
    if manifest is not None and not compose:
        raise SourceError(
            f"{name} was already converted, from {manifest.source.name} at {manifest.source.revision}.",
            f"Convert {manifest.source.name} itself, or add --compose to scale the scaled model again.",
        )


# Local folders


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"{name} is no Hub id, so it has no --revision.", "Leave the option out.")


def _demo_folder(name: str) -> Path:
    """The folder of a demo. Raises SourceError for one that this installation lacks."""
    folder = Path(__file__).parent / "demo" / "models" / name
    if not folder.is_dir():
        raise SourceError(f"{name} is not in this installation.", "A clone of the project has this demo in it.")
    return folder


def _resolve_gguf(path: Path, revision: str | None) -> Snapshot:
    """A GGUF file with the other parts of its model; nothing else beside it belongs to it."""
    _refuse_revision(path.name, revision)
    folder, names = path.parent.resolve(), parts_of(path.name)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CorruptCheckpointError(
            f"{path.name} is one of {len(names)} parts, and {missing[0]} is not beside it.", "Get all parts."
        )
    stats = [(folder / name).stat() for name in names]
    files = {
        name: SourceFile(name, found.st_size, found.st_mtime_ns) for name, found in zip(names, stats, strict=True)
    }
    return _local_snapshot(folder, path.name, "folder", files, Choice(tuple(names), None, (), (), ()), None)


def _resolve_folder(folder: Path, name: str, kind: Kind, revision: str | None) -> Snapshot:
    _refuse_revision(name, revision)
    folder = folder.resolve()
    files, manifest = {file.path: file for file in _walk(folder)}, Manifest.read(folder)
    chosen = choose(files, name, lambda path: (folder / path).read_bytes(), manifest)
    return _local_snapshot(folder, name, kind, files, chosen, manifest)


def _local_snapshot(
    folder: Path, name: str, kind: Kind, files: Mapping[str, SourceFile], chosen: Choice, manifest: Manifest | None
) -> Snapshot:
    """The snapshot of the chosen files of a folder, none of which may be a pointer of git-lfs."""
    used = tuple(files[path] for path in sorted({*chosen.weights, *chosen.carried, *filter(None, [chosen.index])}))
    pointers = [
        file.path
        for file in used
        if file.size <= _LFS_POINTER_BYTES and is_lfs_pointer((folder / file.path).read_bytes())
    ]
    if pointers:
        raise SourceError(
            f"{name} holds pointers of git-lfs in place of files: {', '.join(pointers[:5])}.", LFS_ADVICE
        )
    revision = _fingerprint(folder, [files[path] for path in chosen.weights])
    return Snapshot(
        **vars(chosen), name=name, kind=kind, revision=revision, folder=folder, files=used, manifest=manifest
    )


def _walk(folder: Path) -> Iterable[SourceFile]:
    """Every file below the folder but caches; links may lead to the blobs of the same Hub cache only."""
    blobs = folder.parent.parent / "blobs"

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}.", _RIGHTS) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT_FOLDERS)
        for name in [*folders, *sorted(names)]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                fix = "Copy the file into the folder in its place, or remove the link."
                with system_errors(f"{relative} is a link that leads to no file", SourceError, fix):
                    target = Path(os.path.realpath(path, strict=True))
                if not (target.is_relative_to(folder) or target.parent == blobs):
                    raise SourceError(f"{relative} is a link that leaves the folder.", fix)
            if name in folders:
                continue
            with system_errors(f"{relative} cannot be read", SourceError, _RIGHTS):
                found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{relative} is no regular file.", "Move it out of the folder.")
            yield SourceFile(relative, found.st_size, found.st_mtime_ns)


def _fingerprint(folder: Path, weights: list[SourceFile]) -> str:
    """A digest that distinguishes checkpoints without reading them whole.

    Of config.json it takes all bytes, of each weight file the name and the size. Of a safetensors or GGUF file it
    takes the header, every A_log whole and of every other tensor the first and the last 4 KiB; of a .bin file the
    name, size and CRC-32 of each part, which are of all its bytes. So weights that were trained further differ, and
    an edit deep inside one large tensor of a safetensors or GGUF file is not seen.

    Raises:
        CorruptCheckpointError: a header breaks the format.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in weights:
        digest.update(f"\0{file.path}\0{file.size}\0".encode())
        if file.path.endswith((".safetensors", ".gguf")):
            with open(folder / file.path, "rb") as opened:
                read = read_gguf_header if file.path.endswith(".gguf") else read_header
                # Past the buffer, which would read ahead of each piece.
                for start, count in _telling_spans(read(opened, file.path)):
                    digest.update(os.pread(opened.fileno(), count, start))
        elif zipfile.is_zipfile(folder / file.path):
            with zipfile.ZipFile(folder / file.path) as archive:
                for entry in archive.infolist():
                    digest.update(f"{entry.filename}\0{entry.file_size}\0{entry.CRC}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def _telling_spans(header: Header) -> Iterator[tuple[int, int]]:
    """Start and length of the bytes of a safetensors or GGUF file that go into the digest."""
    yield 0, header.size
    for tensor in header.tensors:
        start, size = header.starts[tensor.name], tensor.nbytes
        if tensor.name.endswith(("A_log", "ssm_a")) or size <= 2 * _END_BYTES:
            yield start, size
        else:
            yield start, _END_BYTES
            yield start + size - _END_BYTES, _END_BYTES


# The Hub


def _resolve_hub(model: str, revision: str | None, compose: bool, weights: bool) -> Snapshot:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with hub_errors(model, SourceError, f"There is no folder {model} here."):
        try:
            info = HfApi().model_info(model, revision=revision, files_metadata=True)
        except OfflineModeIsEnabled:
            return _resolve_cached(model, revision, compose)
        commit = str(info.sha)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}

        def download(path: str) -> bytes:
            return Path(hf_hub_download(model, path, revision=commit)).read_bytes()

        manifest = None
        if MANIFEST_NAME in siblings:
            manifest = Manifest.from_json(download(MANIFEST_NAME))
        _refuse_converted(model, manifest, compose)
        chosen = choose(siblings, model, download, manifest)
        small = [*chosen.carried, *filter(None, [chosen.index])]
        wanted = [*small, *chosen.weights] if weights else [path for path in small if path == "config.json"]
        folder = Path(
            snapshot_download(model, revision=commit, allow_patterns=[glob.escape(path) for path in wanted])
        ).resolve()
    local = {file.path: file for file in _walk(folder)} if folder.is_dir() else {}
    files = []
    for path in sorted({*small, *chosen.weights, *chosen.own}):
        told, here = siblings[path], local.get(path)
        sha256 = getattr(told.lfs, "sha256", None)
        size, mtime_ns = (here.size, here.mtime_ns) if here else (told.size or 0, None)
        files.append(SourceFile(path, size, mtime_ns, sha256))
    return Snapshot(
        **vars(chosen),
        name=model,
        kind="hub",
        revision=commit,
        folder=folder,
        files=tuple(files),
        manifest=manifest,
    )


def _resolve_cached(model: str, revision: str | None, compose: bool) -> Snapshot:
    """The copy of a Hub model in the local cache, for HF_HUB_OFFLINE=1; its folder is named by the commit."""
    folder = _cached_folder(model, revision)
    try:
        snapshot = _resolve_folder(folder, model, "hub", None)
    except (SourceError, CorruptCheckpointError) as error:
        raise SourceError(
            f"The local cache holds a part of {model} only: {error.message}",
            "Unset HF_HUB_OFFLINE once to download the rest.",
        ) from error
    snapshot = dataclasses.replace(snapshot, revision=folder.name)
    _refuse_converted(model, snapshot.manifest, compose)
    return snapshot


def _cached_folder(name: str, revision: str | None) -> Path:
    """Where the local cache keeps a model: the commit of a branch or tag, a commit, or else the one last fetched.

    The client's own look-up takes no commit that was downloaded in part, as all that this tool downloads is.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    reference = place / "refs" / (revision or "main")
    wanted = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    found = sorted(
        (place / "snapshots").glob(glob.escape(wanted) if wanted else "*"),
        key=lambda folder: folder.stat().st_mtime,
    )
    if not found:
        raise SourceError(
            f"{name}{f' at {revision}' if revision else ''} is not in the local cache.",
            "Unset HF_HUB_OFFLINE, or give a local folder.",
        )
    return found[-1]


class _RemoteFile(io.RawIOBase):
    """A part of a file of a Hub model, of which each read is one request for exactly what is read."""

    def __init__(self, model: str, revision: str, path: str, start: int, end: int) -> None:
        from huggingface_hub import hf_hub_url

        with hub_errors(model, SourceError):
            self._file = (model, path, hf_hub_url(model, path, revision=revision))
        self._position, self._end = start, end

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._end - self._position)
        if count <= 0:
            return 0
        read = _read_again if count <= _KEPT_BYTES else _read_range
        buffer[:count] = read(*self._file, self._position, count)
        self._position += count
        return count

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _read_range(model: str, path: str, url: str, start: int, count: int) -> bytes:
    """A range of a file on the Hub. Raises SourceError."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    with hub_errors(model, SourceError):
        wanted = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
        answer = http_backoff("GET", url, headers=wanted, follow_redirects=True)
        hf_raise_for_status(answer)
    if len(answer.content) != count:
        raise SourceError(f"The Hub sent {len(answer.content)} bytes of {path} in place of {count}.", "Try again.")
    return answer.content


# An A_log is read where scales are fitted, and again where they are compared.
_read_again = functools.lru_cache(maxsize=256)(_read_range)
