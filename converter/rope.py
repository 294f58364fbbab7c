"""Extended rotary positions, as a config declares them: YaRN (arXiv:2309.00071) or linear, by a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from converter.errors import UsageError
from converter.layouts import Checkpoint
from converter.layouts.config_values import section, text_part
from converter.served_length import MAIN_KEY, has_positions

TYPES = ("yarn", "linear")
# The first of these that a config has is the one that transformers, vLLM and SGLang read.
ROPE_KEYS = ("rope_parameters", "rope_scaling")


@dataclass(frozen=True)
class RopeExtension:
    """Positions of a longer text, mapped into the range of those that the model was trained on.

    Attributes:
        kind: ``yarn`` or ``linear``.
        factor: how many times longer the text is.
    """

    kind: str
    factor: float

    @classmethod
    def parse(cls, words: str) -> RopeExtension:
        """Read ``yarn:4``. Raises UsageError."""
        kind, _, number = words.partition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if kind not in TYPES or not 1 < factor < math.inf:
            raise UsageError(f"--rope {words} is no extension.", f"Give {' or '.join(TYPES)} and a factor: yarn:4.")
        return cls(kind, factor)


def rope_entries(checkpoint: Checkpoint, words: str | None) -> dict[str, Any]:
    """The entry of config.json that declares an extension such as ``yarn:4``; none for None.

    Raises:
        UsageError: the model has no rotary positions, or they are extended already.
    """
    if words is None:
        return {}
    extension = RopeExtension.parse(words)
    prefix, part = text_part(checkpoint.config)
    key = next((key for key in ROPE_KEYS if part.get(key)), None)
    known = section(part, key) if key else {}
    length = part.get(MAIN_KEY)
    rotary = has_positions(checkpoint) and ("rope_theta" in known or "rope_theta" in part)
    if checkpoint.layout == "gguf" or not rotary or not isinstance(length, int):
        raise UsageError("config.json declares no rotary positions to extend.", "Leave out --rope for this model.")
    if known.get("rope_type", known.get("type", "default")) != "default":
        raise UsageError("The rotary positions are extended already.", "Leave out --rope for this model.")
    extended = {**known, "rope_type": extension.kind, "factor": extension.factor}
    if extension.kind == "yarn":
        extended["original_max_position_embeddings"] = length
    return {f"{prefix}{key or ROPE_KEYS[1]}": extended}
