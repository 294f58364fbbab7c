"""What a checkpoint is and what a conversion would change in it, told from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field

from converter.errors import LayoutError
from converter.layouts import open_shards, read_checkpoint
from converter.layouts.gguf import rounded_ssm_tensors
from converter.scales import Granularity, auto_granularity, offered_granularities
from converter.served_length import stated_lengths
from converter.source import Snapshot


@dataclass(frozen=True)
class ALogRecord:
    """One tensor that a conversion would rewrite."""

    name: str
    source_name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """The result of ``mmod inspect``.

    Attributes:
        files: number of weight files; ``bytes`` their tensors' size; ``tensors`` how many these are.
        dtypes: number format (safetensors name) to the number of parameters stored in it.
        granularities: what the factors can be shared by, coarsest first; ``auto_granularity`` is the default.
        attention_layers: numbers of the layers with attention, which stay as they are.
        stated_lengths: entries of config.json, or of a GGUF header, that say how long a text may be.
        rounded_ssm: of a GGUF model, see :func:`converter.layouts.gguf.rounded_ssm_tensors`.
        left_out: files that a conversion would not copy.
        converted_from: name and revision of the base, where this tool wrote the checkpoint.
        obstacle: why the checkpoint cannot be converted, and ``fix`` what helps; both empty if it can.
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
    stated_lengths: dict[str, int] = field(default_factory=dict)
    rounded_ssm: dict[str, dict[str, int]] = field(default_factory=dict)
    obstacle: str = ""
    fix: str = ""


def inspect(snapshot: Snapshot, *, trust_a_log: bool = False) -> Inspection:
    """Describe a checkpoint.

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
        stated_lengths=stated_lengths(checkpoint),
        rounded_ssm=rounded_ssm_tensors(checkpoint),
    )
