"""Writes scales into a copy of a checkpoint. Everything else is copied byte for byte.

New values are computed in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from converter.concurrent_parts import MEGABYTE, Advance, for_each, in_parts
from converter.digests import RunningDigest
from converter.disk import named, require_space
from converter.errors import LayoutError, UsageError
from converter.gguf_file import GgufShard
from converter.layouts import Checkpoint, Tensor, WeightFile
from converter.layouts.config_values import with_entries
from converter.manifest import ChangedTensor
from converter.reporting import SILENT, Reporter
from converter.safetensors_file import (
    TORCH_NAMES,
    TensorInfo,
    drop_page_cache,
    from_float64,
    header_bytes,
    in_aligned_order,
    parse_json_object,
    rounded,
    to_float64,
    write_all,
)
from converter.scales import Form, ScaleSet, factor_shape, scaled_A_log, unfit
from converter.shards import SafetensorsShard, copy_bytes, opening

ALogDtype = Literal["float32", "keep"]
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Rule:
    """How factors s change a tensor.

    Attributes:
        name: as the manifest spells it.
        form: whether log s is added to the values (linear) or s multiplies them (power).
    """

    name: str
    form: Form

    def values(self, before: NDArray[np.float64], log_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """The new values."""
        return scaled_A_log(before, log_s, self.form, np.exp)

    def log_factors(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log s from the values before and after; zeros tell nothing and are left out."""
        if self.form == "linear":
            return after - before
        moved = (before != 0) & (after != 0)
        return np.log(np.abs(after[moved] / before[moved]))


@dataclass(frozen=True)
class PowerOfA(Rule):
    """The power form on a tensor that holds A = -exp(A_log) itself."""

    def values(self, before: NDArray[np.float64], log_s: NDArray[np.float64]) -> NDArray[np.float64]:
        return -(np.abs(before) ** np.exp(log_s))

    def log_factors(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        return super().log_factors(np.log(np.abs(before)), np.log(np.abs(after)))


# Its exp is the largest that float32 holds, in which models compute A.
_LARGEST_LOG = math.log(np.finfo(np.float32).max)
A_LOG_RULES: Mapping[Form, Rule] = {
    "linear": Rule("A_log + log s", "linear"),
    "power": Rule("A_log * s", "power"),
}
SSM_A_RULES: Mapping[Form, Rule] = {
    "linear": Rule("ssm_a * s", "power"),
    "power": PowerOfA("-(|ssm_a| ^ s)", "power"),
}


@dataclass(frozen=True)
class Change:
    """One tensor that is rewritten.

    Attributes:
        dtype: number format it is written in.
        log_s: logarithm of the factors; broadcasts against the tensor.
    """

    tensor: Tensor
    rule: Rule
    dtype: str
    log_s: NDArray[np.float64]

    @property
    def info(self) -> TensorInfo:
        """Name, number format and shape in the converted copy."""
        return TensorInfo(self.tensor.name, self.dtype, self.tensor.shape)

    def values(self, before: NDArray[np.float64]) -> NDArray[np.float64]:
        """The new values, in float64, of a tensor that held ``before``."""
        return self.rule.values(before, self.log_s)

    def apply(self, load_dtype: str) -> tuple[bytes, ChangedTensor]:
        """The new bytes and their entry in the manifest.

        Args:
            load_dtype: safetensors name of the number format in which stock transformers loads the tensor.

        Raises:
            LayoutError: the old values are not finite, or the new ones not in the format's range.
        """
        before = self.tensor.read()
        data = from_float64(self.values(before), self.dtype)
        after = to_float64(data, self.dtype).reshape(before.shape)
        if not np.isfinite(after).all():
            raise LayoutError(
                f"The scaled {self.tensor.name} leaves the range of {TORCH_NAMES[self.dtype]}.",
                "Use --a-log-dtype float32, or milder factors.",
            )
        if self.rule in A_LOG_RULES.values() and after.max(initial=0) > _LARGEST_LOG:
            raise LayoutError(
                f"The scaled {self.tensor.name} is {after.max():.3g}, and A = -exp of it infinite.",
                "Use milder factors.",
            )
        effective = self.rule.log_factors(rounded(before, load_dtype), rounded(after, load_dtype))
        record = ChangedTensor(
            name=self.tensor.name,
            source_name=self.tensor.info.name,
            rule=self.rule.name,
            shape=self.tensor.shape,
            source_dtype=self.tensor.dtype,
            dtype=self.dtype,
            requested=_summary(self.log_s),
            effective=_summary(effective),
        )
        return data, record


@dataclass(frozen=True)
class BakeReport:
    """What was written.

    Attributes:
        changed: tensors whose bytes or number format differ from the source's.
        identical: number of tensors whose bytes are the source's.
        left_out: files of the source that were not copied, since no loader reads them.
        read_back: names of tensors that were read again after writing and found to be the source's bit for bit.
        digests: the SHA-256 of each weight file, by name; none of a copy without scales, which nobody keeps.
    """

    changed: list[ChangedTensor]
    identical: int
    left_out: tuple[str, ...] = ()
    read_back: frozenset[str] = frozenset()
    digests: Mapping[str, str] = field(default_factory=dict)


def bake(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    scales: ScaleSet | None,
    a_log_dtype: ALogDtype = "float32",
    read_back: bool = False,
    beside: Callable[[Advance], None] | None = None,
    reporter: Reporter = SILENT,
) -> BakeReport:
    """Write a complete copy of the checkpoint, in the transformers layout, with the scales in it.

    Args:
        folder: an existing empty folder.
        scales: None for a copy without scales.
        a_log_dtype: ``float32``, or ``keep`` for the source's number format.
        read_back: read each unchanged tensor again once it is written, and compare it with its source.
        beside: what else may refuse the copy, run meanwhile; see :func:`converter.concurrent_parts.for_each`.

    Raises:
        UsageError, LayoutError: the scales do not fit the checkpoint.
        OutputError: not enough room.
        SourceError: the source changed meanwhile.
    """
    changes = plan_changes(checkpoint, scales, a_log_dtype) if scales is not None else {}
    checkpoint.check_values()
    carried = sum(checkpoint.snapshot.file(path).size for path in checkpoint.snapshot.carried)
    anew = sum(change.info.nbytes for change in changes.values())
    require_space(folder, checkpoint.total_bytes() + anew + carried)

    parts = [
        part for file in checkpoint.files for part in _begin(file, changes, folder / file.name, checkpoint.entries)
    ]
    # A digest is taken in the file's order, so that those of several files go on at once.
    parts.sort(key=lambda part: part.number)

    records: dict[str, ChangedTensor] = {}
    compared: set[str] = set()

    def write(part: _Part, advance: Advance) -> None:
        """Write some tensors of one file to their places: the source's bytes, but for the changed ones."""
        source = {tensor.name: tensor for tensor in part.file.tensors}
        with named(part.path), open(part.path, "r+b", buffering=0) as output:
            for info in part.tensors:
                os.lseek(output.fileno(), part.shard.header.starts[info.name], os.SEEK_SET)
                if info.name in changes:
                    data, records[info.name] = changes[info.name].apply(checkpoint.load_format)
                    write_all(output.fileno(), data)
                else:
                    copy_bytes(part.file.shard, source[info.name].info, output.fileno())
                    if read_back and Tensor(info.name, info, part.shard).equals(source[info.name]):
                        compared.add(info.name)
                advance(info.nbytes)
            if scales is not None:
                part.digest.add(part.path, part.start, part.end, advance)
            drop_page_cache(output.fileno(), part.end)

    title = "Writing and comparing" if read_back else "Writing weights"
    with reporter.task(f"{title} (MB)", checkpoint.total_bytes() // MEGABYTE) as task:
        for_each(write, parts, task, beside)
    index = index_content(checkpoint, changes)
    if index is not None:
        (folder / INDEX_NAME).write_bytes(index)
    write_companions(checkpoint, folder)
    checkpoint.snapshot.check_unchanged()
    return BakeReport(
        changed=[records[name] for name in changes],
        identical=len(checkpoint.tensors) - len(records),
        left_out=checkpoint.snapshot.left_out,
        read_back=frozenset(compared),
        digests={part.file.name: str(part.digest) for part in parts if scales is not None},
    )


# Which tensors change


def plan_changes(checkpoint: Checkpoint, scales: ScaleSet, a_log_dtype: ALogDtype) -> dict[str, Change]:
    """The tensors that are rewritten, by name; one with s = 1 and its own number format is not among them.

    Raises:
        UsageError, LayoutError: the scales do not fit the checkpoint.
    """
    if scales.log_s.keys() != checkpoint.A_log.keys():
        strange = sorted(scales.log_s.keys() ^ checkpoint.A_log.keys())
        raise unfit(f"{strange[0]} is not in both ({len(strange)} such names)")
    rules = SSM_A_RULES if checkpoint.layout == "gguf" else A_LOG_RULES
    changes = {}
    for name, tensor in checkpoint.A_log.items():
        shape, log_s = factor_shape(tensor.shape, scales.granularity), scales.log_s[name].astype(np.float64)
        if log_s.shape != shape:
            raise unfit(f"the scales of {name} have the shape {log_s.shape}; {shape} is needed")
        if not np.isfinite(log_s).all():
            raise UsageError(f"The scales of {name} hold NaN or infinity.", "Calibrate again.")
        dtype = "F32" if a_log_dtype == "float32" else tensor.dtype
        change = Change(tensor, rules[scales.form], dtype, log_s)
        if change.log_s.any() or change.dtype != tensor.dtype:
            changes[name] = change
    return changes


def _summary(log_s: NDArray[np.float64]) -> dict[str, float]:
    """Smallest, geometric mean and largest factor."""
    if log_s.size == 0:
        return {"min": 1.0, "mean": 1.0, "max": 1.0}
    return {
        "min": float(np.exp(log_s.min())),
        "mean": float(np.exp(log_s.mean())),
        "max": float(np.exp(log_s.max())),
    }


# Files


@dataclass(frozen=True)
class _Part:
    """Tensors that follow one another in a weight file of the output.

    Attributes:
        file: where their bytes come from.
        shard: the new file, by its own header.
        digest: of the whole new file.
        start, end: the span from the end of the tensors before to their own end.
    """

    file: WeightFile
    path: Path
    shard: SafetensorsShard
    digest: RunningDigest
    number: int
    tensors: Sequence[TensorInfo]
    start: int
    end: int


def _begin(
    file: WeightFile, changes: Mapping[str, Change], path: Path, entries: Mapping[str, Any]
) -> Iterator[_Part]:
    """Give a weight file its header, the source's own if it fits, and its full length.

    Yields:
        Its parts, whose spans are the whole of it.
    """
    old = [dataclasses.replace(tensor.info, name=tensor.name) for tensor in file.tensors]
    new = [changes[info.name].info if info.name in changes else info for info in old]
    alike = file.shard if isinstance(file.shard, SafetensorsShard) and tuple(new) == file.shard.tensors else None
    with named(path), open(path, "wb", buffering=0) as output:
        if isinstance(alike, GgufShard):
            alike.begin(output.fileno(), entries)
        else:
            header = next(alike.frame({}))[1] if alike else header_bytes(in_aligned_order(new), file.shard.metadata)
            write_all(output.fileno(), header)
            os.ftruncate(output.fileno(), len(header) + sum(info.nbytes for info in new))
    kind = GgufShard if isinstance(alike, GgufShard) else SafetensorsShard
    shard, digest, start = kind.open(file.name, opening(path)), RunningDigest(), 0
    parts = [*in_parts(shard.tensors)]
    ends = [*(shard.header.starts[part[0].name] for part in parts[1:]), path.stat().st_size]
    for number, (part, end) in enumerate(zip(parts, ends, strict=False)):
        yield _Part(file, path, shard, digest, number, part, start, end)
        start = end


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what goes along with the weights."""
    for path, content in companions(checkpoint).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What goes along with the weights: config, tokenizer, and the other files that are carried, by their paths."""
    found = {path: checkpoint.snapshot.read(path) for path in checkpoint.snapshot.carried}
    if checkpoint.layout != "gguf":
        config = with_entries(checkpoint.config, checkpoint.entries)
        # The source's own bytes stay where nothing in them changes.
        if parse_json_object(found["config.json"], "config.json") != config:
            found["config.json"] = _json(config)
    if checkpoint.tokenizer is not None:
        found |= {source.name: source.read_bytes() for source in checkpoint.tokenizer.files}
    target_len = checkpoint.target_len
    if target_len is not None and "tokenizer_config.json" in found:
        settings = parse_json_object(found["tokenizer_config.json"], "tokenizer_config.json")
        longest = settings.get("model_max_length")
        if isinstance(longest, int | float) and longest < target_len:
            found["tokenizer_config.json"] = _json({**settings, "model_max_length": target_len})
    if checkpoint.layout == "state-spaces" and "generation_config.json" not in found:
        tokens = {key: checkpoint.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        found["generation_config.json"] = _json(tokens)
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def index_content(checkpoint: Checkpoint, changes: Mapping[str, Change]) -> bytes | None:
    """The index of the converted weights; None if they are one file."""
    if checkpoint.index is None:
        return None
    growth = sum(change.info.nbytes - change.tensor.info.nbytes for change in changes.values())
    dropped = (
        sum(info.nbytes for file in checkpoint.files for info in file.shard.tensors) - checkpoint.total_bytes()
    )
    metadata = dict(checkpoint.index.metadata)
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += growth - dropped
    files = {tensor.name: file.name for file in checkpoint.files for tensor in file.tensors}
    renamed = {tensor.info.name: tensor.name for tensor in checkpoint.tensors.values()}
    order = [renamed[name] for name in checkpoint.index.shards if name in renamed]
    return _json({"metadata": metadata, "weight_map": {name: files[name] for name in order}})
