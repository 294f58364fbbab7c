"""What a tokenizer's files say: its end-of-text token, and how many rows of an embedding it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from converter.safetensors_file import parse_json_object

Read = Callable[[str], bytes | None]
"""Gives the content of a tokenizer's file by its name, or None if there is no such file."""


def special_token_id(read: Read) -> int:
    """Id of a tokenizer's end-of-text token; 0, GPT-NeoX's, where none is named.

    Raises:
        CorruptCheckpointError: the tokenizer's files are damaged.
    """
    settings, tokenizer = read("tokenizer_config.json"), read("tokenizer.json")
    if settings is None or tokenizer is None:
        return 0
    end = parse_json_object(settings, "tokenizer_config.json").get("eos_token")
    if isinstance(end, dict):
        end = end.get("content")
    for token in parse_json_object(tokenizer, "tokenizer.json").get("added_tokens") or []:
        if isinstance(token, dict) and token.get("content") == end and isinstance(token.get("id"), int):
            return int(token["id"])
    return 0


def vocabulary_size(read: Read) -> int:
    """One more than the largest token id; 0 if no JSON file shows it.

    Raises:
        CorruptCheckpointError: the tokenizer's files are damaged.
    """
    ids: list[Any] = []
    if (tokenizer := read("tokenizer.json")) is not None:
        content = parse_json_object(tokenizer, "tokenizer.json")
        ids += [token.get("id") for token in content.get("added_tokens") or [] if isinstance(token, dict)]
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        # A Unigram model lists its tokens in the order of their ids.
        ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
    for name in ("vocab.json", "added_tokens.json"):
        if (listed := read(name)) is not None:
            ids += parse_json_object(listed, name).values()
    return max((token_id for token_id in ids if isinstance(token_id, int)), default=-1) + 1
