"""What a checkpoint is and what a conversion would change in it, told from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from converter.console import Reporter
from converter.errors import LayoutError
from converter.layouts import open_shards, read_checkpoint
from converter.scales import Granularity, auto_granularity, offered_granularities
from converter.source import Snapshot


@dataclass(frozen=True)
class ALogRecord:
    """One tensor that a conversion would write anew."""

    name: str
    source_name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """What ``mmod inspect`` tells.

    Attributes:
        files: number of weight files; ``bytes`` their tensors' size; ``tensors`` how many these are.
        dtypes: number format (safetensors name) to the number of parameters stored in it.
        granularities: what the factors can be shared by, coarsest first; ``auto_granularity`` is the default.
        attention_layers: numbers of the layers with attention, which stay as they are.
        left_out: files that a conversion would not copy.
        converted_from: name and revision of the base, where this tool wrote the checkpoint.
        obstacle: why the checkpoint cannot be converted, and ``fix`` what helps; both empty where it can.
    """

    name: str
    kind: str
    revision: str
    files: int
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    left_out: tuple[str, ...]
    converted_from: str | None
    layout: str | None = None
    model_type: str | None = None
    load_dtype: str | None = None
    A_log: tuple[ALogRecord, ...] = ()
    granularities: tuple[Granularity, ...] = ()
    auto_granularity: Granularity | None = None
    attention_layers: tuple[int, ...] = ()
    obstacle: str = ""
    fix: str = ""


def inspect(snapshot: Snapshot, *, trust_a_log: bool = False) -> Inspection:
    """Tell what a checkpoint is.

    Args:
        snapshot: resolved with ``weights=False``, so that nothing large is downloaded.

    Raises:
        CorruptCheckpointError: a file breaks its format.
    """
    shards = open_shards(snapshot)
    infos = [info for shard in shards for info in shard.tensors]
    parameters: Counter[str] = Counter()
    for info in infos:
        parameters[info.dtype] += math.prod(info.shape)
    base = snapshot.manifest.source if snapshot.manifest else None
    facts = Inspection(
        name=snapshot.name,
        kind=snapshot.kind,
        revision=snapshot.revision,
        files=len(shards),
        bytes=sum(info.nbytes for info in infos),
        tensors=len(infos),
        dtypes=dict(parameters.most_common()),
        left_out=snapshot.left_out,
        converted_from=f"{base.name} at {base.revision}" if base else None,
    )
    try:
        checkpoint = read_checkpoint(snapshot, trust_a_log=trust_a_log, shards=shards)
    except LayoutError as error:
        return dataclasses.replace(facts, obstacle=error.message, fix=error.fix)
    shape = next(iter(checkpoint.A_log.values())).shape
    return dataclasses.replace(
        facts,
        layout=checkpoint.layout,
        model_type=checkpoint.model_type,
        load_dtype=checkpoint.load_dtype,
        A_log=tuple(
            ALogRecord(name, tensor.info.name, tensor.dtype, tensor.shape)
            for name, tensor in checkpoint.A_log.items()
        ),
        granularities=offered_granularities(shape),
        auto_granularity=auto_granularity(shape),
        attention_layers=checkpoint.attention_layers,
    )


def show(inspection: Inspection, reporter: Reporter) -> None:
    """Tell a person, with one row for each number format and shape of A_log."""
    formats = ", ".join(f"{count:,} in {dtype}" for dtype, count in inspection.dtypes.items())
    reporter.line(f"{inspection.name} ({inspection.kind}, {inspection.revision})")
    reporter.line(
        f"{inspection.tensors} tensors in {_count(inspection.files, 'file')}, {inspection.bytes / 1e6:,.1f} MB; "
        f"parameters: {formats}"
    )
    if inspection.converted_from:
        reporter.line(f"Converted by this tool from {inspection.converted_from}.")
    if inspection.obstacle:
        reporter.line(f"It cannot be converted: {inspection.obstacle} {inspection.fix}".rstrip())
        return
    reporter.line(f"{inspection.model_type} in the {inspection.layout} layout, loaded as {inspection.load_dtype}")
    groups = Counter((record.dtype, record.shape) for record in inspection.A_log)
    reporter.table(
        "A_log tensors that a conversion writes",
        ("first name", "layers", "dtype", "shape"),
        [
            (
                next(record.name for record in inspection.A_log if (record.dtype, record.shape) == group),
                str(count),
                group[0],
                " x ".join(map(str, group[1])),
            )
            for group, count in groups.items()
        ],
    )
    reporter.line(
        f"Granularities: {', '.join(inspection.granularities)}; auto takes {inspection.auto_granularity}."
    )
    if inspection.attention_layers:
        reporter.line(
            f"Layers with attention, which stays as it is: {', '.join(map(str, inspection.attention_layers))}"
        )
    if inspection.left_out:
        reporter.line(f"Not copied (weights for other programs): {', '.join(inspection.left_out)}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
