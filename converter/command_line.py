"""Writes the command line that repeats a run: names instead of local paths, and the commit of a Hub id."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.lengths import format_length
from converter.source import DEMOS, Snapshot

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LOCATIONS = frozenset({"data", "held_out", "tokenizer", "scales"})
# Arguments, and options that depend on the machine.
_NOT_REPEATED = frozenset(
    {"model", "output", "overwrite", "dry_run", "proof"}
    | {"device", "memory", "allow_slow", "hub_kernels"}
    | {"push", "repo_id", "private", "public", "push_revision", "commit_message"}
    | {"yes_overwrite", "push_anyway"}
    | {"on", "timeout", "yes"}
)


def command_line(verb: str, arguments: Iterable[str], options: Mapping[str, Any]) -> str:
    """One line for the shell.

    Args:
        verb: one word or more, such as ``mmod bake``.
        options: name of a request's field to its value. A tuple repeats the option, True writes a flag, None and
            False are left out.
    """
    words = [*verb.split(), *arguments]
    for name, value in options.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item is None or item is False:
                continue
            shown = format_length(item) if name.endswith("_len") and isinstance(item, int) else str(item)
            words += ["--" + name.replace("_", "-"), *([] if item is True else [shown])]
    return shlex.join(words)


def repeating_line(
    verb: str,
    arguments: Iterable[str],
    request: DataclassInstance,
    snapshot: Snapshot,
    left_out: Container[str] = _NOT_REPEATED,
) -> str:
    """The command line that repeats a request, with names in place of local paths.

    Args:
        request: its fields have the names of the command line's options.
        snapshot: what its model was resolved to; a Hub id's commit takes the place of its branch.
        left_out: names of the fields that are no part of the line.
    """
    if snapshot.kind == "hub":
        request = dataclasses.replace(request, revision=snapshot.revision)
    options: dict[str, Any] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name in left_out or value == field.default:
            continue
        if field.name in _LOCATIONS:
            value = tuple(name_of(item) for item in (value if isinstance(value, tuple) else (value,)))
        options[field.name] = value
    return command_line(verb, arguments, options)


def name_of(location: str) -> str:
    """A Hub id or demo name as it is; of a local path, with or without a text's weight behind it, the last part."""
    path = Path(os.path.expanduser(location))
    if location in DEMOS:
        return location
    if path.exists():
        return path.resolve().name
    place, equals, weight = location.rpartition("=")
    if equals:
        return f"{name_of(place)}={weight}"
    return path.name if path.is_absolute() else location
