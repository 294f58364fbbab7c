"""A GGUF model as a checkpoint: ``blk.N.ssm_a`` holds -exp(A_log) in float32, the header says the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from converter.errors import LayoutError
from converter.gguf_file import GgufShard, check_parts
from converter.layouts.checkpoint import Checkpoint, Tensor, WeightFile
from converter.source import Snapshot

_SSM_A = re.compile(r"blk\.(\d{1,6})\.ssm_a")
_ATTENTION = re.compile(r"blk\.(\d{1,6})\.attn_output\..+")
_SSM = re.compile(r"blk\.\d+\.(ssm_.+)")


def read_gguf(snapshot: Snapshot, shards: Sequence[GgufShard]) -> Checkpoint:
    """Recognise a GGUF model from its headers.

    Raises:
        CorruptCheckpointError: the files are not the parts of one model.
        LayoutError: no model with an ``ssm_a`` in float32.
    """
    check_parts(shards)
    values = shards[0].header.values
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise LayoutError(f"{shards[0].name} names no architecture.", "Give the GGUF file of a language model.")
    files = tuple(
        WeightFile(shard.name, shard, tuple(Tensor(info.name, info, shard) for info in shard.tensors))
        for shard in shards
    )
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    numbered = {int(match[1]): tensors[name] for name in tensors if (match := _SSM_A.fullmatch(name))}
    if not numbered:
        raise LayoutError(
            f"{snapshot.name} ({architecture}) has no tensor blk.N.ssm_a.",
            "Only Mamba and hybrid models are scaled.",
        )
    for tensor in numbered.values():
        if tensor.dtype != "F32" or math.prod(tensor.shape) == 0:
            raise LayoutError(
                f"{tensor.name} is {tensor.dtype} {tensor.shape}; llama.cpp's own converter writes it in float32.",
                "Convert the original checkpoint to GGUF again.",
            )
    attention = {int(match[1]) for name in tensors if (match := _ATTENTION.fullmatch(name))}
    return Checkpoint(
        snapshot=snapshot,
        layout="gguf",
        model_type=architecture,
        config=values,
        files=files,
        index=None,
        A_log={numbered[layer].name: numbered[layer] for layer in sorted(numbered)},
        attention_layers=tuple(sorted(attention)),
        tied_head=None,
        load_dtype="float32",
    )


def rounded_ssm_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Kind of the tensors of a state-space layer that are not in float32, to their formats and how many have each.

    A recurrence in a quantised format drifts over a long text even where it is right on a short one.
    """
    kinds: dict[str, dict[str, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _SSM.fullmatch(name)
        if checkpoint.layout == "gguf" and match and tensor.dtype != "F32":
            formats = kinds.setdefault(match[1], {})
            formats[tensor.dtype] = formats.get(tensor.dtype, 0) + 1
    return kinds
