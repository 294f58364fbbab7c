"""How long a text a model says it takes: the entries that servers read, and whether positions depend on them.

vLLM takes the smallest of these keys of the (text) config, SGLang the first that is there and 2,048 without one
(read in vLLM 0.33 and SGLang 0.5); llama.cpp reads ``ARCHITECTURE.context_length``.
"""

from __future__ import annotations

from collections.abc import Mapping

from converter.errors import VerificationError
from converter.layouts import Checkpoint
from converter.layouts.architectures import find_architecture
from converter.layouts.config_values import TEXT_PART, text_part

MAIN_KEY = "max_position_embeddings"
LENGTH_KEYS = (
    *(MAIN_KEY, "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
# llama.cpp's names of architectures without position embeddings.
_GGUF_WITHOUT_POSITIONS = frozenset({"mamba", "mamba2", "jamba", "nemotron_h", "nemotron_h_moe", "kimi-linear"})
_MOST = (1 << 31) - 1


def stated_lengths(checkpoint: Checkpoint) -> dict[str, int]:
    """The entries that state a length, with their place in config.json or the GGUF header."""
    if checkpoint.layout == "gguf":
        keys = {f"{checkpoint.model_type}.context_length": checkpoint.config}
    else:
        prefix, part = text_part(checkpoint.config)
        keys = {f"{prefix}{key}": part for key in LENGTH_KEYS}
    found = {key: part.get(key.removeprefix(TEXT_PART)) for key, part in keys.items()}
    return {key: value for key, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}


def has_positions(checkpoint: Checkpoint) -> bool:
    """Whether some layer's attention has position embeddings, which say nothing sure beyond the stated length."""
    if checkpoint.layout == "gguf":
        return checkpoint.model_type not in _GGUF_WITHOUT_POSITIONS
    architecture = find_architecture(checkpoint.model_type)
    return architecture is None or architecture.has_positions(text_part(checkpoint.config)[1])


def raised_lengths(checkpoint: Checkpoint, target_len: int | None, *, raise_limit: bool = False) -> dict[str, int]:
    """The entries to rewrite so that a server takes ``target_len`` tokens; none if they allow that already.

    Args:
        raise_limit: raise the limit of a model with position embeddings, too.
    """
    stated = stated_lengths(checkpoint)
    if target_len is None or (has_positions(checkpoint) and not raise_limit):
        return {}
    if not stated and not checkpoint.attention_layers and checkpoint.layout != "gguf":
        # A model with attention has a length by default, in transformers' class of its config.
        return {f"{text_part(checkpoint.config)[0]}{MAIN_KEY}": target_len}
    return {key: target_len for key, value in stated.items() if value < target_len}


def length_note(
    checkpoint: Checkpoint, target_len: int | None, entries: Mapping[str, int], rope: str | None
) -> list[str]:
    """A sentence on the limit of a model with position embeddings, where the target lies beyond it.

    Args:
        rope: the extension of the positions, None if they stay as they are.
    """
    stated = stated_lengths(checkpoint)
    limit = min(stated.values(), default=0)
    if not has_positions(checkpoint) or target_len is None or not 0 < limit < target_len:
        return []
    if rope:
        return [
            f"The rotary positions are extended by {rope}, and the stated length is raised from {limit:,} to "
            f"{target_len:,} tokens. The extension costs something on short text; factors are held to the model "
            "with extended positions, tables compare with the source as it is published."
        ]
    if entries:
        return [
            f"The stated length was raised from {limit:,} to {target_len:,} tokens as asked for. Attention was not "
            "trained on positions beyond the first; what it finds there is not known."
        ]
    return [
        f"Attention has position embeddings, so the stated length ({', '.join(stated)}) stays {limit:,} tokens, "
        "which servers keep to; --raise-position-limit raises it, --rope yarn:N extends "
        "the positions as well."
    ]


def check_declared(checkpoint: Checkpoint, entries: Mapping[str, int]) -> None:
    """Refuse a manifest that declares other changes of the config than raised lengths.

    Raises:
        VerificationError: an entry is no length, or is lower than the base's.
    """
    stated = stated_lengths(checkpoint)
    added = {f"{prefix}{MAIN_KEY}" for prefix in ("", TEXT_PART)} if not stated else set()
    for key, value in entries.items():
        if key not in stated.keys() | added or not stated.get(key, 0) < value <= _MOST:
            raise VerificationError(f"The manifest declares {key} = {value}, which is no longer text length.")
