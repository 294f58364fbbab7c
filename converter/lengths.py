"""Lengths in tokens as people write them: 256, 4k, 32k, 1m (1k is 1,024 tokens)."""

from __future__ import annotations

import re

from converter.errors import UsageError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_length(text: str) -> int:
    """Parse a length. Raises UsageError unless it is a whole number of tokens above 0 and below 2^31."""
    found = re.fullmatch(r"(\d{1,10})\s*([km]?)", text.strip().lower())
    tokens = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < tokens < 1 << 31:
        raise UsageError(f"'{text}' is no length in tokens.", "Write 4096, 4k or 32k (1k is 1,024 tokens).")
    return tokens


def parse_train_len(text: str) -> int:
    """A training length. Raises UsageError for one of a single token as well, which predicts nothing."""
    if (tokens := parse_length(text)) == 1:
        raise UsageError("A training length of one token holds no prediction.", "Give 2 tokens or more.")
    return tokens


def parse_target(text: str) -> int | str:
    """A length, or ``auto`` for one to be found. Raises UsageError."""
    return "auto" if text.strip().lower() == "auto" else parse_length(text)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse lengths separated by commas, and return them sorted without duplicates. Raises UsageError."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def format_length(tokens: int) -> str:
    """Write a length briefly: 256, 4k, 1.5k stays 1536."""
    for suffix in ("m", "k"):
        if tokens % _UNITS[suffix] == 0:
            return f"{tokens // _UNITS[suffix]}{suffix}"
    return str(tokens)
