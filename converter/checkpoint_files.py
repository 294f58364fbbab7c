"""Which files of a folder belong to a checkpoint: its weights, what loaders read with them, and no more.

What is not known here stays where it is and is named, since a copy may be published: optimizer states, pickled
arguments, logs, notes, and the same weights for other programs.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

from converter.errors import CorruptCheckpointError, SourceError
from converter.gguf_file import parts_of
from converter.manifest import MANIFEST_NAME, OWN_FOLDER, SCALES_NAME, Manifest
from converter.safetensors_file import parse_index

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.*"),
)
TOKENIZER_CORES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
# What stock loaders and people read of a checkpoint beside its weights; code goes along where one of these
# names it.
CARRIED_FILES = (
    *("config.json", "generation_config.json", "*processor_config.json", *TOKENIZER_FILES),
    *("additional_chat_templates/*.jinja", "README.md"),
    # What some quantisers say beside config.json.
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
)
LICENCES = re.compile(
    r"[^/]*(licen[cs]e|copying|copyright|notice|use[_-]policy)[^/.]*(\.(md|txt|rst|pdf|html))?", re.IGNORECASE
)
# What this tool itself adds to a conversion, and makes again when that is converted again.
OWN_FILES = (MANIFEST_NAME, SCALES_NAME, f"{OWN_FOLDER}/*.json", f"{OWN_FOLDER}/*.png")
# These are left out without being named.
LEFT_OUT_FOLDERS = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints"})
_UNNAMED = frozenset({".gitattributes", ".gitignore"})
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = frozenset({"adapter_model.safetensors", "adapter_model.bin"})
# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SAVE_AGAIN = "Load it where it was made, and save it with save_pretrained(), which writes safetensors."
# What lies where weights are looked for: patterns, what it is, and what helps. The first that is found counts.
_NEAR_WEIGHTS = (
    (r"[^/]+-\d+-of-\d+\.(safetensors|bin)", "shards without their index", "Get the file *.index.json as well."),
    (r"[^/]+\.safetensors", "weights of another name", f"If it is the whole model, rename it to {_WEIGHTS[0]}."),
    (r"[^/]+\.bin", "weights of another name", f"If it is the whole model, rename it to {_WEIGHTS[2]}."),
    (r"[^/]+\.(pt|pth|ckpt|pkl|pickle)", "pickled weights, which are not opened", _SAVE_AGAIN),
    (
        r"[^/]+\.(npz|npy|h5|hdf5|msgpack|ot|onnx|distcp|keras|gguf)",
        "weights in another format",
        _SAVE_AGAIN,
    ),
    (rf".+/({'|'.join(map(re.escape, _WEIGHTS))})", "a checkpoint in a folder below", "Give that folder: {folder}"),
)
_OF_TRAINING = "training_args|optimizer|scheduler|scaler|rng_state|random_states"
_MOST_NAMES = 12

Read = Callable[[str], bytes]
"""Gives the content of a file by its path."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint's paths by their use.

    Attributes:
        weights: the weight files, all of one format.
        index: the index of sharded weights, or None.
        carried: every other file that belongs to a copy of the checkpoint.
        left_out: files that do not.
        own: of a conversion, what this tool added to it.
    """

    weights: tuple[str, ...]
    index: str | None
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    own: tuple[str, ...]


def choose(paths: Iterable[str], name: str, read: Read, manifest: Manifest | None) -> Choice:
    """Sort a checkpoint's paths.

    Args:
        name: of the checkpoint, for messages.
        manifest: of a conversion, else None.

    Raises:
        SourceError: no weights, or an adapter.
        CorruptCheckpointError: a shard is missing, or a path leads out of the checkpoint.
    """
    present = set(paths)
    for path in present:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
            raise CorruptCheckpointError(f"{name} names the file {path!r}, which leads out of its folder.")
    main = next((weight for weight in _WEIGHTS if weight in present), None)
    if ADAPTER_CONFIG in present or (main is None and present & _ADAPTERS):
        config = _read_object(read, ADAPTER_CONFIG) if ADAPTER_CONFIG in present else {}
        _refuse_adapter(name, config, has_weights=main is not None)
    if main is None and not (manifest is not None and manifest.scales_only):
        main = _only_gguf(present, name)
    index = main if main and main.endswith(".index.json") else None
    weights = parse_index(read(index), index).files if index else tuple(parts_of(main)) if main else ()
    if missing := sorted(set(weights) - present):
        other = next((weight for weight in _WEIGHTS if weight in present - {main}), None)
        raise CorruptCheckpointError(
            f"{name} lacks {len(missing)} of {len(weights)} shards of {main}: {', '.join(missing[:3])}.",
            f"Get them, or move {main} out of the folder, so that {other} is read." if other else "",
        )
    rest = {
        path for path in present - set(weights) - {main} if not LEFT_OUT_FOLDERS & set(PurePosixPath(path).parts)
    }
    carried = {path for path in rest if _matches(path, CARRIED_FILES) or LICENCES.fullmatch(path)}
    carried |= _code(carried, rest, read)
    own = {path for path in rest if manifest is not None and is_own(path)}
    left_out = rest - carried - own - _UNNAMED
    return Choice(tuple(sorted(weights)), index, *(tuple(sorted(kind)) for kind in (carried, left_out, own)))


def _only_gguf(paths: Iterable[str], name: str) -> str:
    """The first file of the one GGUF language model among these files. Raises SourceError."""
    models = sorted({parts_of(path)[0] for path in paths if re.fullmatch(r"(?!mmproj)[^/]+\.gguf", path)})
    if not models:
        _refuse_other_weights(sorted(paths), name)
    if len(models) > 1:
        raise SourceError(
            f"{name} holds {len(models)} GGUF models: {', '.join(models[:3])}, …", "Name the file that you mean."
        )
    return models[0]


def _refuse_other_weights(paths: Iterable[str], name: str) -> NoReturn:
    """Say what is there in place of weights, and how it becomes some. Raises SourceError."""
    for pattern, what, fix in _NEAR_WEIGHTS:
        kind = re.compile(rf"(?!{_OF_TRAINING}){pattern}", re.IGNORECASE)
        if found := [path for path in paths if kind.fullmatch(path)]:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            fix = fix.format(folder=found[0].rpartition("/")[0])
            raise SourceError(f"{name} holds {what} ({found[0]}{more}), and no {_WEIGHTS[0]}.", fix)
    raise SourceError(
        f"{name} holds no weights: none of {', '.join(_WEIGHTS)} is there.",
        "Give the folder of a whole checkpoint.",
    )


def is_own(path: str) -> bool:
    """Whether a path of a conversion is one of this tool's."""
    return _matches(path, OWN_FILES)


def is_tokenizer_core(path: str) -> bool:
    """Whether a tokenizer can be made of this file."""
    return _matches(path, TOKENIZER_CORES)


def in_short(paths: Iterable[str]) -> str:
    """Paths in one line; a folder that is left out whole is named once."""
    counts = Counter(path.partition("/")[0] + "/" if "/" in path else path for path in paths)
    names = [f"{name} ({count} files)" if count > 1 else name for name, count in sorted(counts.items())]
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return ", ".join([*names[:_MOST_NAMES], *more])


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches the path; its stars match no slash."""
    depth = path.count("/")
    return any(depth == pattern.count("/") and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _read_object(read: Read, path: str) -> dict[str, Any]:
    """A JSON object; empty if the file holds none, which is reported when the file is used."""
    try:
        content = json.loads(read(path))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _code(carried: Iterable[str], present: set[str], read: Read) -> set[str]:
    """The Python files that a config has loaders run, with those that they import from beside them."""
    due: list[str] = []
    for path in carried:
        auto_map = _read_object(read, path).get("auto_map") if path.endswith("config.json") else None
        # Its values are ``module.Class``, or lists of such.
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            names = value if isinstance(value, list) else [value]
            due += [f"{name.partition('.')[0]}.py" for name in names if isinstance(name, str) and "--" not in name]
    found: set[str] = set()
    while due:
        path = due.pop()
        if path in present and path not in found:
            found.add(path)
            code = read(path).decode("utf-8", "replace")
            due += [f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\w+)\s+import", code, re.MULTILINE)]
    return found


def _refuse_adapter(name: str, config: dict[str, Any], has_weights: bool) -> None:
    """Say what an adapter is, and how it becomes a model.

    Beside whole weights it is refused as well: with peft installed, loaders take the adapter's base in their place.
    """
    kind, base = (
        config.get("peft_type") or "peft",
        config.get("base_model_name_or_path") or "a model it does not name",
    )
    line = (
        "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('ADAPTER')"
        ".merge_and_unload().save_pretrained('MERGED')\""
    )
    if has_weights:
        raise SourceError(
            f"{name} holds an adapter ({kind}, for {base}) beside whole weights, and loaders with peft take {base} "
            "and the adapter in place of these weights.",
            f"If the adapter is merged into them, move {ADAPTER_CONFIG} and adapter_model.* out of the folder; "
            f"if not, merge it, add the tokenizer and convert MERGED: {line}",
        )
    raise SourceError(
        f"{name} is an adapter ({kind}, for {base}), which holds no A_log of its own.",
        f"Merge it, add the tokenizer and convert MERGED: {line}",
    )
