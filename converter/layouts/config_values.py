"""Reading config.json, which comes from outside: each value is checked for its type as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from converter.errors import LayoutError

Config = Mapping[str, Any]
Item = TypeVar("Item", int, str)
TEXT_PART = "text_config."


def wrong(key: str, value: Any, expected: str) -> LayoutError:
    """The error for a value of the wrong kind."""
    return LayoutError(f"config.json has {key} = {value!r}; {expected} was expected.", "Correct config.json.")


def whole_number(config: Config, key: str, default: int | None = None) -> int:
    """A positive whole number. Raises LayoutError if it is missing without a default, or something else."""
    value = config.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise wrong(key, value, "a positive whole number")
    return value


def listed(config: Config, key: str, kind: type[Item]) -> list[Item]:
    """A list of whole numbers or of strings, empty if the key is missing or null."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise wrong(key, value, "a list of whole numbers" if kind is int else "a list of words")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """True or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise wrong(key, value, "true or false")
    return value


def section(config: Config, key: str) -> Config:
    """A nested object, empty if the key is missing or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise wrong(key, value, "an object")
    return value


def text_part(config: Config) -> tuple[str, Config]:
    """The part of a config that describes the language model, and what its keys start with in entries."""
    text = section(config, "text_config")
    return (TEXT_PART, text) if text else ("", config)


def with_entries(config: Config, entries: Config) -> dict[str, Any]:
    """The config with entries rewritten; ``text_config.KEY`` is one of its text part."""
    result = dict(config)
    for key, value in entries.items():
        if key.startswith(TEXT_PART):
            result["text_config"] = {**section(result, "text_config"), key.removeprefix(TEXT_PART): value}
        else:
            result[key] = value
    return result
