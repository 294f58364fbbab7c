"""The proof that a converted checkpoint is its base but for the declared tensors, and those what is declared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from converter.bake import Change, plan_changes
from converter.concurrent_parts import MEGABYTE, Advance, for_each, in_parts
from converter.errors import VerificationError
from converter.fit import fit_scales
from converter.gguf_file import GgufShard
from converter.layouts import Checkpoint, Tensor, WeightFile, read_checkpoint
from converter.layouts.config_values import with_entries
from converter.layouts.state_spaces import COPIED_WEIGHTS, SUBFOLDER, read_copy
from converter.manifest import MANIFEST_NAME, SCALES_NAME, ChangedTensor
from converter.reporting import Reporter
from converter.safetensors_file import from_float64, rounded, to_float64
from converter.scales_file import scales_of
from converter.served_length import check_declared
from converter.shards import read_bytes
from converter.source import Snapshot

# NumPy's exp may differ in its last bit between processors, far below half a unit of the written format.
_EXP_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Counts:
    """Numbers of tensors.

    Attributes:
        identical: whose bytes are the base's.
        changed: that equal the formula.
    """

    identical: int
    changed: int


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        identical: number of tensors whose bytes are the base's.
        changed: number of tensors that equal the formula.
        state_spaces: the same of the copy in the state-spaces layout; None where there is none or it was not read.
        by_hash: weight files not read, since the Hub gives both the same SHA-256.
        unproved: sentences on what was not looked at; empty after a full proof.
    """

    identical: int
    changed: int
    state_spaces: Counts | None
    by_hash: tuple[str, ...]
    unproved: tuple[str, ...]


def verify(
    converted: Snapshot,
    base: Checkpoint,
    *,
    quick: bool = False,
    read_back: Collection[str] = (),
    reporter: Reporter | None = None,
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
    reporter = reporter or Reporter()
    if converted.manifest is None:
        raise VerificationError(f"{converted.name} has no {MANIFEST_NAME}.", "Give a folder that this tool wrote.")
    found = read_checkpoint(converted, trust_a_log=True)
    declared = converted.manifest.changed
    kept = all(record.dtype == record.source_dtype for record in declared)
    stored = scales_of(converted)
    # Whether the scales are for this base was settled before they were written.
    fit = fit_scales(base, stored.scales, stored.base_values(), anyway=True)
    changes = plan_changes(base, fit.scales, "keep" if kept else "float32")
    _compare_declared(declared, changes)
    _compare_shapes(found.tensors, base, changes)
    check_declared(base, converted.manifest.entries)
    config = with_entries(base.config, converted.manifest.entries)
    if found.config != config:
        keys = {**found.config, **config}
        different = sorted(key for key in keys if found.config.get(key) != config.get(key))
        where = "The header" if base.layout == "gguf" else "config.json"
        raise VerificationError(f"{where} differs from the base's in {', '.join(different)}.")
    _compare_frames(found, base, converted.manifest.entries)
    by_hash = _same_hashes(found, base)
    has_copy = COPIED_WEIGHTS in converted.own
    copy = read_copy(converted, base) if has_copy and not quick else None
    if copy is not None:
        _compare_shapes({tensor.name: tensor for tensor in copy.tensors}, base, changes, f"{SUBFOLDER}/: ")

    def compare(part: tuple[WeightFile, list[Tensor]], advance: Advance) -> int:
        """Compare some tensors of a file, and return how many were left unread."""
        file, tensors = part
        unread = 0
        for tensor in tensors:
            if tensor.name in changes:
                _compare_with_formula(tensor, changes[tensor.name])
            elif file.name in by_hash or (tensor.name in read_back and file is not copy):
                pass
            elif quick:
                unread += 1
            elif not tensor.equals(base.tensors[tensor.name]):
                raise VerificationError(
                    f"Tensor {tensor.name} differs from the base's and is not declared as changed ({file.name}).",
                    "Convert again, or compare with the base and revision that the manifest names.",
                )
            advance(tensor.nbytes)
        return unread

    files = [*found.files, *([copy] if copy else [])]
    parts = [(file, tensors) for file in files for tensors in in_parts(file.tensors)]
    total = sum(tensor.nbytes for _, tensors in parts for tensor in tensors)
    with reporter.task("Comparing with the source (MB)", total // MEGABYTE) as task:
        unread = sum(for_each(compare, parts, task))
    unproved = []
    if unread:
        unproved.append(f"That the bytes of {unread} other tensors are the base's (--quick reads none of them).")
    if has_copy and quick:
        unproved.append(f"That the copy in {SUBFOLDER}/ holds the same weights (--quick does not read it).")
    identical = len(found.tensors) - len(changes) - unread
    copied = Counts(len(copy.tensors) - len(changes), len(changes)) if copy else None
    return Proof(identical, len(changes), copied, tuple(sorted(by_hash)), tuple(unproved))


def _compare_declared(declared: list[ChangedTensor], changes: Mapping[str, Change]) -> None:
    said = {(record.name, record.rule, record.dtype, record.shape) for record in declared}
    due = {(change.info.name, change.rule.name, change.dtype, change.info.shape) for change in changes.values()}
    if said != due:
        name = sorted(said ^ due)[0][0]
        raise VerificationError(f"{MANIFEST_NAME} and {SCALES_NAME} disagree on {name}.")


def _compare_frames(found: Checkpoint, base: Checkpoint, entries: Mapping[str, int]) -> None:
    """Compare all bytes of GGUF files that are no tensor's: headers, and what fills up to the alignment."""
    if base.layout == "gguf" and len(found.files) != len(base.files):
        raise VerificationError(f"The base has {len(base.files)} files, the converted copy {len(found.files)}.")
    for ours, theirs in zip(found.files, base.files, strict=False):
        if not (isinstance(ours.shard, GgufShard) and isinstance(theirs.shard, GgufShard)):
            continue
        if [*ours.shard.frame({})] != [*theirs.shard.frame(entries)]:
            raise VerificationError(f"{ours.name} differs from the base's file outside of its tensors.")


def _compare_shapes(
    found: Mapping[str, Tensor], base: Checkpoint, changes: Mapping[str, Change], where: str = ""
) -> None:
    for name in {**base.tensors, **found}:
        if name not in found:
            raise VerificationError(f"{where}Tensor {name} of the base is missing in the converted checkpoint.")
        if name not in base.tensors:
            raise VerificationError(f"{where}Tensor {name} of the converted checkpoint is not in the base.")
        due = changes[name].info if name in changes else base.tensors[name].info
        seen = found[name].info
        if (seen.dtype, seen.shape) != (due.dtype, due.shape):
            raise VerificationError(
                f"{where}Tensor {name} is {seen.dtype} {seen.shape}; {due.dtype} {due.shape} is expected."
            )


def _same_hashes(found: Checkpoint, base: Checkpoint) -> set[str]:
    """The converted weight files that have the SHA-256 of a base file, as the Hub tells."""
    base_hashes = {base.snapshot.file(file.shard.name).sha256 for file in base.files} - {None}
    return {file.name for file in found.files if found.snapshot.file(file.shard.name).sha256 in base_hashes}


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
