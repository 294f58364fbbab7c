"""Recognising a checkpoint: its layout, its architecture, its tensors and which of them are A_log."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from converter.errors import CorruptCheckpointError, LayoutError, SourceError, UsageError
from converter.gguf_file import GgufShard
from converter.layouts import state_spaces
from converter.layouts.architectures import (
    ARCHITECTURES,
    HYBRID,
    LINEAR,
    WITH_CODE_OF_THEIR_OWN,
    Architecture,
    find_architecture,
    named_safe_gate,
    refuse_without_A_log,
)
from converter.layouts.checkpoint import TRANSFORMERS_EMBEDDING, Checkpoint, Layout, Tensor, WeightFile
from converter.layouts.config_values import Config, section, text_part, whole_number
from converter.layouts.gguf import read_gguf
from converter.layouts.tokenizer_files import special_token_id, vocabulary_size
from converter.safetensors_file import FLOATS, TORCH_NAMES, Index, parse_index, parse_json_object
from converter.shards import SafetensorsShard, Shard, TorchShard
from converter.source import Snapshot, Tokenizer

__all__ = ["Checkpoint", "Layout", "Tensor", "WeightFile", "open_shards", "read_checkpoint", "with_tokenizer"]

_DTYPE_KEYS = ("dtype", "torch_dtype")
_SHORT_DTYPES = {"auto": None, "half": "float16", "float": "float32", "double": "float64"}
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def open_shards(snapshot: Snapshot) -> list[Shard]:
    """Read the headers of the weight files. Raises CorruptCheckpointError."""
    kinds = {".safetensors": SafetensorsShard, ".gguf": GgufShard}
    return [
        kinds[ending].open(name, partial(snapshot.open, name))
        if (ending := PurePosixPath(name).suffix) in kinds
        else TorchShard.open(name, snapshot.folder / name, partial(snapshot.open, name))
        for name in snapshot.weights
    ]


def read_checkpoint(
    snapshot: Snapshot, *, trust_a_log: bool = False, shards: list[Shard] | None = None
) -> Checkpoint:
    """Recognise a snapshot's layout and architecture, and find every tensor, reading headers only.

    Args:
        trust_a_log: take every tensor whose name ends in ``A_log`` for the logarithm of a decay, in an
            architecture that is not known by name.
        shards: the weight files, where :func:`open_shards` opened them already.

    Raises:
        CorruptCheckpointError: a file breaks its format.
        LayoutError: no model that can be scaled, or a feature that cannot be written.
    """
    if not snapshot.weights:
        raise SourceError(
            f"{snapshot.name} holds scales and no weights.", f"Name it so: mmod bake MODEL --scales {snapshot.name}"
        )
    if snapshot.weights[0].endswith(".gguf"):
        opened = open_shards(snapshot) if shards is None else shards
        return read_gguf(snapshot, [shard for shard in opened if isinstance(shard, GgufShard)])
    if "config.json" not in snapshot.carried:
        raise LayoutError(f"{snapshot.name} has no config.json.", "Give the folder of a whole checkpoint.")
    config: Config = _with_plain_dtypes(parse_json_object(snapshot.read("config.json"), "config.json"))
    if config.get("transformers_weights") is not None:
        raise LayoutError(
            "config.json has transformers load weights of another name (transformers_weights).",
            "Give them the usual name, model.safetensors, and take that entry out.",
        )
    index = parse_index(snapshot.read(snapshot.index), snapshot.index) if snapshot.index else None
    shards = open_shards(snapshot) if shards is None else shards
    layout: Layout = "state-spaces" if state_spaces.is_state_spaces(config) else "transformers"
    files = tuple(
        WeightFile(
            _safetensors_name(shard.name),
            shard,
            tuple(Tensor(_spelled(info.name, layout), info, shard) for info in shard.tensors),
        )
        for shard in shards
    )
    _check_names(files, index)
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    tied_head = None
    if layout == "state-spaces":
        token_id = special_token_id(lambda name: snapshot.read(name) if name in snapshot.carried else None)
        config = state_spaces.to_transformers_config(config, token_id)
        _check_embedding(tensors.get(TRANSFORMERS_EMBEDDING), config)
        tied_head = tensors.pop(state_spaces.LM_HEAD, None) if config["tie_word_embeddings"] else None
        files = tuple(
            dataclasses.replace(file, tensors=tuple(tensor for tensor in file.tensors if tensor is not tied_head))
            for file in files
        )
    text_config = text_part(config)[1]
    model_type = text_config.get("model_type") or config.get("model_type")
    if not isinstance(model_type, str):
        raise LayoutError(
            "config.json names no model_type.", "Only Mamba and hybrid models with an A_log are scaled."
        )
    refuse_without_A_log(model_type, config)
    for key in text_config:
        if key.endswith("chunk_size") and text_config[key] is not None:
            # No tensor's shape shows it, and a model with a wrong one fails only when it runs.
            whole_number(text_config, key)
    A_log, attention_layers = _find_A_log(tensors, model_type, text_config, trust_a_log)
    load_dtype = _named_dtype(config, text_config)
    if load_dtype is None:
        # Without it transformers takes the dtype of the first tensor, which may be A_log itself.
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        load_dtype = next(TORCH_NAMES[dtype] for dtype, _ in sizes.most_common() if dtype in FLOATS)
        config = {**config, "dtype": load_dtype}
    return Checkpoint(
        snapshot, layout, model_type, config, files, index, A_log, attention_layers, tied_head, load_dtype
    )


def with_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """A checkpoint that has no tokenizer with one added, whose special token a config made here then names.

    Raises:
        UsageError: it has more tokens than the embedding has rows.
        CorruptCheckpointError: its files are damaged.
    """
    contents = {path.name: path.read_bytes() for path in tokenizer.files}
    config = checkpoint.config
    rows, tokens = text_part(config)[1].get("vocab_size"), vocabulary_size(contents.get)
    if isinstance(rows, int) and tokens > rows:
        raise UsageError(
            f"The tokenizer of {tokenizer.record.name} has {tokens:,} tokens, and the embedding of "
            f"{checkpoint.snapshot.name} {rows:,} rows.",
            "Name the one that the model was trained with: --tokenizer.",
        )
    if checkpoint.layout == "state-spaces":
        config = {**config, **state_spaces.special_tokens(special_token_id(contents.get))}
    return dataclasses.replace(checkpoint, config=config, tokenizer=tokenizer)


def _check_names(files: tuple[WeightFile, ...], index: Index | None) -> None:
    """Refuse names that stand twice in the source or would in the copy, and an index that says otherwise."""
    found: dict[str, str] = {}
    for file in files:
        for info in file.shard.tensors:
            if info.name in found:
                raise CorruptCheckpointError(
                    f"Tensor {info.name} lies in {found[info.name]} and in {file.shard.name}."
                )
            found[info.name] = file.shard.name
    if index is not None and found != index.shards:
        name = next(name for name in {**found, **index.shards} if found.get(name) != index.shards.get(name))
        place = index.shards.get(name, "no file")
        raise CorruptCheckpointError(
            f"The index puts tensor {name} in {place}; it is in {found.get(name, 'none')}."
        )
    names = Counter([file.name for file in files] + [tensor.name for file in files for tensor in file.tensors])
    if twice := [name for name, count in names.items() if count > 1]:
        raise CorruptCheckpointError(f"Two parts of the checkpoint would both be called {twice[0]}.")


def _safetensors_name(name: str) -> str:
    """The converted copy's name of a weight file: pytorch_model-1-of-2.bin becomes model-1-of-2.safetensors."""
    if name.endswith(".safetensors"):
        return name
    return f"{name.removesuffix('.bin').replace('pytorch_model', 'model', 1)}.safetensors"


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that torch.compile, FSDP and DataParallel add."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in ("module", *WRAPPERS):
        parts.pop(0)
    return ".".join(part for part in parts if part not in WRAPPERS)


def _spelled(name: str, layout: Layout) -> str:
    """The converted copy's name of a tensor."""
    plain = without_wrappers(name)
    return TRANSFORMERS_EMBEDDING if layout == "state-spaces" and plain == state_spaces.EMBEDDING else plain


def _check_embedding(embedding: Tensor | None, config: Config) -> None:
    """Compare the embedding of a state-spaces checkpoint with its config."""
    expected = (config["vocab_size"], config["hidden_size"])
    if embedding is None or embedding.shape != expected:
        raise LayoutError(
            f"{state_spaces.EMBEDDING} should have the shape {expected}; "
            f"the file has {embedding.shape if embedding else 'no such tensor'}.",
            "config.json and weights do not belong together.",
        )


def _find_A_log(
    tensors: Mapping[str, Tensor], model_type: str, config: Config, trust_a_log: bool
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Every A_log with the numbers of the attention layers, compared with the layers that config.json promises."""
    named = {name: tensor for name, tensor in tensors.items() if re.search(r"(?:^|[._])A_log$", name)}
    architecture = find_architecture(model_type)
    if (architecture.safe_gate if architecture else named_safe_gate)(config):
        raise LayoutError(
            f"{model_type} with its safe gate computes lower_bound * sigmoid(exp(A_log) * g), not a decay "
            "exp(-exp(A_log) * g): no scale of A can be written into its A_log.",
            "There is no way to convert it while the gate is on.",
        )
    if architecture is None:
        _refuse_unknown(named, model_type, config, trust_a_log)
        A_log = {name: named[name] for name in sorted(named, key=_by_number)}
        _check_formats(A_log, None)
        return A_log, ()
    kinds = architecture.kinds(config)
    promised = [layer for layer, kind in enumerate(kinds) if kind in (LINEAR, HYBRID)]
    if ahead := [name for name in named if re.search(r"(?:^|\.)(mtp|nextn)", name)]:
        raise LayoutError(
            f"The layers that predict several tokens at once have an A of their own ({ahead[0]}), and stock "
            "transformers does not run them.",
            "Take them out of the checkpoint.",
        )
    matches = {name: match for name in named if (match := architecture.A_log_key().fullmatch(name))}
    if strange := sorted(named.keys() - matches.keys()):
        raise LayoutError(
            f"{model_type} keeps no A_log under the name {strange[0]}.",
            "The checkpoint is not what config.json says.",
        )
    by_layer = sorted(matches, key=lambda name: int(matches[name]["layer"]))
    found = [int(matches[name]["layer"]) for name in by_layer]
    if not promised and not found:
        raise LayoutError(
            f"This {model_type} model is attention throughout: it has no layer with an A_log.",
            "There is nothing to scale in it; its family's hybrids, such as Granite 4.0 H, have such layers.",
        )
    if found != promised:
        missing = sorted(set(promised) - set(found)) or "none"
        surplus = sorted((Counter(found) - Counter(promised)).elements()) or "none"
        raise LayoutError(
            f"config.json promises {len(promised)} layers with an A_log and the files hold {len(found)} "
            f"(missing in layers: {missing}, unexpected in layers: {surplus}).",
        )
    A_log = {name: named[name] for name in by_layer}
    _check_formats(A_log, architecture)
    attention = (
        layer for layer, kind in enumerate(kinds) if kind != LINEAR and kind.endswith((HYBRID, "attention"))
    )
    return A_log, tuple(attention)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _refuse_unknown(named: Mapping[str, Tensor], model_type: str, config: Config, trust_a_log: bool) -> None:
    known = ", ".join(sorted(ARCHITECTURES))
    if not named:
        raise LayoutError(
            f"{model_type} is not a model with a state transition matrix A: no tensor's name ends in A_log.",
            f"Models that can be scaled: {known}.",
        )
    family = WITH_CODE_OF_THEIR_OWN.get(model_type, model_type if "auto_map" in config else None)
    if family and not trust_a_log:
        raise LayoutError(
            f"{family} needs code of its own, which is not run: nothing can be calibrated or measured on it.",
            "If its decay is exp(-exp(A_log) * softplus(…)), scales that are given can be written unchecked: "
            "mmod bake, or --method constant --factor, with --trust-a-log.",
        )
    if not trust_a_log:
        raise LayoutError(
            f"{model_type} is not known here, but has {len(named)} tensors named A_log ({min(named)}, …).",
            "If its decay is exp(-exp(A_log) * softplus(…)), add --trust-a-log.",
        )


def _check_formats(A_log: Mapping[str, Tensor], architecture: Architecture | None) -> None:
    usual = Counter(tensor.shape for tensor in A_log.values()).most_common(1)[0][0]
    for tensor in A_log.values():
        tensor.require_float()
        unfit = architecture is not None and (len(tensor.shape) != architecture.rank or tensor.shape != usual)
        if unfit or math.prod(tensor.shape) == 0:
            raise LayoutError(
                f"{tensor.info.name} has the shape {tensor.shape}, which is not that of an A_log of this model.",
                "The checkpoint is damaged, or config.json belongs to another.",
            )


def _with_plain_dtypes(config: Config) -> Config:
    """A config whose dtypes are spelled as stock transformers reads them; ``auto`` names none."""
    plain = {
        key: str(config[key]).removeprefix("torch.") for key in _DTYPE_KEYS if isinstance(config.get(key), str)
    }
    changed: dict[str, Any] = {key: _SHORT_DTYPES.get(value, value) for key, value in plain.items()}
    if text_config := section(config, "text_config"):
        changed["text_config"] = _with_plain_dtypes(text_config)
    return {**config, **changed}


def _named_dtype(config: Config, text_config: Config) -> str | None:
    """The dtype that config.json names, if it names one."""
    named: list[Any] = [part.get(key) for part in (config, text_config) for key in _DTYPE_KEYS]
    dtype = next((value for value in named if value is not None), None)
    if dtype is not None and dtype not in [TORCH_NAMES[name] for name in FLOATS]:
        raise LayoutError(
            f"config.json has dtype = {dtype!r}, which is no floating-point type.", "Correct config.json."
        )
    return dtype
