"""Proves that a converted checkpoint equals its base, except for the declared tensors, which equal the formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from converter.baking import INDEX_NAME, Change, companions, index_content, plan_changes
from converter.concurrent_parts import MEGABYTE, Advance, for_each, in_parts
from converter.digests import is_sealed, sha256_of
from converter.errors import VerificationError
from converter.fit import fit_scales
from converter.gguf_file import GgufShard
from converter.layouts import Checkpoint, Tensor, WeightFile, read_checkpoint
from converter.layouts.checkpoint import TRANSFORMERS_EMBEDDING
from converter.layouts.config_values import with_entries
from converter.manifest import MANIFEST_NAME, SCALES_NAME, Manifest, seal_of
from converter.reporting import SILENT, Reporter
from converter.rope import rope_entries
from converter.safetensors_file import from_float64, parse_json_object, rounded, to_float64
from converter.scales import ScaleSet
from converter.scales_file import scales_of
from converter.served_length import check_declared
from converter.shards import SafetensorsShard, read_bytes
from converter.source import Snapshot

# NumPy's exp may differ in its last bit between processors, far below half a unit of the written format.
_EXP_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        identical: number of tensors whose bytes are the base's.
        changed: number of tensors that equal the formula.
        by_hash: weight files not read, since the Hub gives both the same SHA-256.
        unproved: sentences on what was not looked at; empty after a full proof.
    """

    identical: int
    changed: int
    by_hash: tuple[str, ...]
    unproved: tuple[str, ...]


def verify(
    converted: Snapshot,
    base: Checkpoint,
    *,
    quick: bool = False,
    read_back: Collection[str] = (),
    reporter: Reporter = SILENT,
) -> Proof:
    """Compare a converted checkpoint with its base, reading each file once.

    Args:
        converted: a folder or Hub model that this tool wrote.
        quick: read headers and declared tensors only.
        read_back: names of tensors whose bytes were compared with the base's already, once they were written.

    Raises:
        VerificationError: something is not what it should be; the first such thing is named.
        UsageError, LayoutError, CorruptCheckpointError: the two cannot be compared.
    """
    manifest = manifest_of(converted)
    # First, since what differs from another base is no damage.
    if base.snapshot.kind == manifest.source.kind and base.snapshot.revision != manifest.source.revision:
        raise VerificationError(
            f"{MANIFEST_NAME} names revision {manifest.source.revision} of the base, and this is "
            f"{base.snapshot.revision}.",
            "Compare with the revision that was converted.",
        )
    found = read_checkpoint(converted, trust_a_log=True)
    kept = all(record.dtype == record.source_dtype for record in manifest.changed)
    stored = scales_of(converted)
    # Whether the scales are for this base was settled before they were written.
    fit = fit_scales(base, stored.scales, stored.base_values(), anyway=True)
    changes = plan_changes(base, fit.scales, "keep" if kept else "float32")
    _compare_declared(manifest, stored.scales, changes)
    _compare_shapes(found.tensors, base, changes)
    check_declared(base, manifest.entries)
    entries = {**manifest.entries, **rope_entries(base, manifest.rope)}
    base = dataclasses.replace(base, target_len=manifest.length, entries=entries)
    config = with_entries(base.config, entries)
    if found.config != config:
        keys = {**found.config, **config}
        different = sorted(key for key in keys if found.config.get(key) != config.get(key))
        where = "The header" if base.layout == "gguf" else "config.json"
        raise VerificationError(f"{where} differs from the base's in {', '.join(different)}.")
    _compare_frames(found, base)
    base_hashes = {base.snapshot.file(file.shard.name).sha256 for file in base.files} - {None}
    by_hash = {file.name for file in found.files if converted.file(file.shard.name).sha256 in base_hashes}
    read = () if quick else (file for file in found.files if file.name not in by_hash)
    told = {file.name: _told(file, found, base) for file in read}

    def compare(part: tuple[WeightFile, list[Tensor]], advance: Advance) -> int:
        """Compare some tensors of a file, and return how many were left unread."""
        file, tensors = part
        digested, unread = told.get(file.name), 0
        is_as_told = digested is not None and digested.is_made_of(changes, advance)
        for tensor in tensors:
            if tensor.name in changes:
                _compare_with_formula(tensor, changes[tensor.name])
            elif is_as_told or file.name in by_hash or tensor.name in read_back:
                pass
            elif quick:
                unread += 1
            elif not tensor.equals(base.tensors[tensor.name]):
                raise VerificationError(
                    f"Tensor {tensor.name} differs from the base's and is not declared as changed ({file.name}).",
                )
            if not is_as_told:
                advance(tensor.nbytes)
        if digested is not None and not is_as_told:
            raise VerificationError(f"{digested.file.name} is not the file whose SHA-256 the Hub gives.")
        return unread

    parts = [
        (file, tensors)
        for file in found.files
        # A digest is of a file from its start to its end.
        for tensors in ([[*file.tensors]] if told.get(file.name) else in_parts(file.tensors))
    ]
    total = sum(tensor.nbytes for _, tensors in parts for tensor in tensors)
    with reporter.task("Comparing with the source (MB)", total // MEGABYTE) as task:
        unread = sum(for_each(compare, parts, task))
    due = companions(base)
    if (index := index_content(base, changes)) is not None:
        due[INDEX_NAME] = index
    if different := _compare_files(converted, manifest, due):
        raise VerificationError(f"{converted.name} is not as it was converted: {'; '.join(different)}.")
    identical = len(found.tensors) - len(changes) - unread
    return Proof(identical, len(changes), tuple(sorted(by_hash)), tuple(_unproved(manifest, base, unread)))


def manifest_of(converted: Snapshot) -> Manifest:
    """What a conversion declares. Raises VerificationError for any other model."""
    if converted.manifest is None:
        raise VerificationError(f"{converted.name} has no {MANIFEST_NAME}.", "Give a model that this tool wrote.")
    return converted.manifest


def _compare_files(converted: Snapshot, manifest: Manifest, due: Mapping[str, bytes]) -> list[str]:
    """What is wrong with the files beside the weights: those that are due, and this tool's own."""
    # People edit the card.
    due = {path: content for path, content in due.items() if path != "README.md"}
    present = {*converted.carried, *converted.left_out, *converted.own, *filter(None, [converted.index])}
    known = {*due, *manifest.files}
    found = [f"{path} is missing" for path in sorted(due.keys() - present)]
    found += [f"{path} was added" for path in sorted(filter(is_sealed, present - known))]
    found += [
        f"{path} differs from what the base gives"
        for path in sorted(due.keys() & present)
        if converted.read(path) != due[path]
    ]
    content = parse_json_object(converted.read(MANIFEST_NAME), MANIFEST_NAME)
    if content.get("seal") != seal_of(content):
        found.append(f"{MANIFEST_NAME} was changed")
    if sha256_of(converted.fetch(SCALES_NAME)) != manifest.files.get(SCALES_NAME):
        found.append(f"{SCALES_NAME} is not the file that was written")
    return found


def _unproved(manifest: Manifest, base: Checkpoint, unread: int) -> Iterator[str]:
    """Sentences on what was not read, and on claims of the manifest that the files cannot prove."""
    if unread:
        yield f"That the bytes of {unread} other tensors are the base's (--quick reads none of them)."
    if manifest.perplexity is not None:
        yield "That the perplexities are what was measured (nothing is measured again)."
    if base.snapshot.kind != manifest.source.kind:
        yield f"That the base is revision {manifest.source.revision} (it is read from another place)."


def _compare_declared(manifest: Manifest, scales: ScaleSet, changes: Mapping[str, Change]) -> None:
    for field in ("form", "granularity"):
        if getattr(manifest, field) != getattr(scales, field):
            raise VerificationError(f"{MANIFEST_NAME} and {SCALES_NAME} disagree on the {field} of the scales.")
    said = {(record.name, record.rule, record.dtype, record.shape) for record in manifest.changed}
    due = {(change.info.name, change.rule.name, change.dtype, change.info.shape) for change in changes.values()}
    if said != due:
        name = sorted(said ^ due)[0][0]
        raise VerificationError(f"{MANIFEST_NAME} and {SCALES_NAME} disagree on {name}.")


def _compare_frames(found: Checkpoint, base: Checkpoint) -> None:
    """Compare the bytes of GGUF files outside of tensors: headers and padding."""
    if base.layout == "gguf" and len(found.files) != len(base.files):
        raise VerificationError(f"The base has {len(base.files)} files, the converted copy {len(found.files)}.")
    for ours, theirs in zip(found.files, base.files, strict=False):
        if not (isinstance(ours.shard, GgufShard) and isinstance(theirs.shard, GgufShard)):
            continue
        if [*ours.shard.frame({})] != [*theirs.shard.frame(base.entries)]:
            raise VerificationError(f"{ours.name} differs from the base's file outside of its tensors.")


def _compare_shapes(found: Mapping[str, Tensor], base: Checkpoint, changes: Mapping[str, Change]) -> None:
    for name in {**base.tensors, **found}:
        if name not in found:
            raise VerificationError(f"Tensor {name} of the base is missing in the converted checkpoint.")
        if name not in base.tensors:
            raise VerificationError(f"Tensor {name} of the converted checkpoint is not in the base.")
        due = changes[name].info if name in changes else base.tensors[name].info
        seen = found[name].info
        if (seen.dtype, seen.shape) != (due.dtype, due.shape):
            raise VerificationError(
                f"Tensor {name} is {seen.dtype} {seen.shape}; {due.dtype} {due.shape} is expected."
            )


@dataclass(frozen=True)
class _Told:
    """A weight file on the Hub whose bytes are rebuilt from its counterpart's tensors and compared by SHA-256.

    Only one of the two files is read: the local one, if there is one.

    Attributes:
        others: where each unchanged tensor is read.
    """

    file: WeightFile
    sha256: str
    others: Mapping[str, Tensor]

    def is_made_of(self, changes: Collection[str], advance: Advance) -> bool:
        """Whether the bytes of the counterpart, and the changed tensors of this file itself, give the SHA-256."""
        shard = self.file.shard
        assert isinstance(shard, SafetensorsShard)
        names, digest = {tensor.info.name: tensor.name for tensor in self.file.tensors}, sha256()
        for piece in shard.pieces():
            if isinstance(piece, bytes):
                digest.update(piece)
                continue
            # A tied head is the embedding again.
            name = names.get(piece.name, TRANSFORMERS_EMBEDDING)
            tensor = Tensor(name, piece, shard) if name in changes else self.others[name]
            for chunk in tensor.shard.chunks(tensor.info):
                digest.update(chunk)
            advance(piece.nbytes)
        return digest.hexdigest() == self.sha256


def _told(file: WeightFile, found: Checkpoint, base: Checkpoint) -> _Told | None:
    """What is made again of a converted file and its counterpart; None if both are here, or no digest is known."""
    twin = next((twin for twin in base.files if twin.name == file.name), None)
    if twin is None or {tensor.name for tensor in twin.tensors} != {tensor.name for tensor in file.tensors}:
        return None
    # Where both are on the Hub, the converted file is read: it is the one to prove.
    for told, its, others in ((twin, base, found), (file, found, base)):
        digest = its.snapshot.file(told.shard.name).sha256
        if digest and isinstance(told.shard, SafetensorsShard) and not its.snapshot.is_here(told.shard.name):
            return _Told(told, digest, others.tensors)
    return None


def _compare_with_formula(found: Tensor, change: Change) -> None:
    data = read_bytes(found.shard, found.info)
    exact = change.values(change.tensor.read())
    if data == from_float64(exact, change.dtype):
        return
    slack = np.abs(exact) * _EXP_TOLERANCE
    low, high = rounded(exact - slack, change.dtype), rounded(exact + slack, change.dtype)
    values = to_float64(data, change.dtype).reshape(exact.shape)
    if not ((low <= values) & (values <= high)).all():
        raise VerificationError(
            f"Tensor {found.name} is not {change.rule.name} of the base's ({found.shard.name}).",
            "Convert again from the base.",
        )
