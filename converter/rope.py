"""Extended rotary positions, as a config declares them: YaRN (arXiv:2309.00071) or linear, by a factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converter.errors import UsageError
from converter.layouts import Checkpoint
from converter.layouts.config_values import section, text_part
from converter.served_length import MAIN_KEY, has_positions

TYPES = ("yarn", "linear")
# The first of these that a config has is the one that transformers, vLLM and SGLang read.
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def parse_extension(words: str) -> tuple[str, float | None]:
    """Read ``yarn:4``, or ``yarn`` for a factor that is still to be chosen. Raises UsageError."""
    kind, colon, number = words.partition(":")
    try:
        factor = float(number) if colon else None
    except ValueError:
        factor = math.nan
    if kind not in TYPES or (factor is not None and not 1 < factor < math.inf):
        raise UsageError(f"--rope {words} is no extension.", f"Give {' or '.join(TYPES)} and a factor: yarn:4.")
    return kind, factor


def rope_choices(checkpoint: Checkpoint, words: str | None, target_len: int) -> dict[str, dict[str, Any]]:
    """The extensions that ``--rope`` leaves to choose from, the farthest one last, with their entries.

    Without a factor these are powers of two, up to the first that reaches the target length.

    Raises:
        UsageError: as :func:`rope_entries`, or the model takes the target length as it is.
    """
    if words is None:
        return {}
    kind, factor = parse_extension(words)
    if factor:
        return {words: rope_entries(checkpoint, words)}
    length = _rotary_part(checkpoint)[2]
    if length >= target_len:
        raise UsageError(f"The positions reach {length:,} tokens as they are.", "Leave out --rope for this target.")
    every = [f"{kind}:{2**power}" for power in range(1, (-(-target_len // length) - 1).bit_length() + 1)]
    return {words: rope_entries(checkpoint, words) for words in every}


def rope_entries(checkpoint: Checkpoint, words: str | None) -> dict[str, Any]:
    """The entry of config.json that declares an extension such as ``yarn:4``; none for None.

    Raises:
        UsageError: the model has no rotary positions, or they are extended already, or the words have no factor.
    """
    if words is None:
        return {}
    kind, factor = parse_extension(words)
    if factor is None:
        raise UsageError(f"--rope {words} has no factor, which only a calibration chooses.", "Give one: yarn:4.")
    key, known, length = _rotary_part(checkpoint)
    extended = {**known, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        extended["original_max_position_embeddings"] = length
    return {key: extended}


def _rotary_part(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any], int]:
    """Where config.json declares rotary positions, what it says of them, and their length. Raises UsageError."""
    prefix, part = text_part(checkpoint.config)
    key = next((key for key in ROPE_KEYS if part.get(key)), None)
    known = section(part, key) if key else {}
    length = part.get(MAIN_KEY)
    rotary = has_positions(checkpoint) and ("rope_theta" in known or "rope_theta" in part)
    if checkpoint.layout == "gguf" or not rotary or not isinstance(length, int):
        raise UsageError("config.json declares no rotary positions to extend.", "Leave out --rope for this model.")
    if known.get("rope_type", known.get("type", "default")) != "default":
        raise UsageError("The rotary positions are extended already.", "Leave out --rope for this model.")
    return f"{prefix}{key or ROPE_KEYS[1]}", known, length
