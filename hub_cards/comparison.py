"""Several converted models side by side: one table of lengths and models."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.errors import OutputError
from converter.lengths import format_length
from converter.manifest import Manifest, PerplexityTable
from hub_cards.markdown import markdown_table, plain
from hub_cards.sections import change


@dataclass(frozen=True)
class Comparison:
    """Perplexity by length of several converted models, before and after.

    Attributes:
        columns: ``Tokens``, then a model each.
        rows: a length each, then what was measured how.
        comparable: whether all models were measured on the same text, span and number format.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    comparable: bool

    def to_markdown(self) -> str:
        """The comparison as a Markdown table."""
        return markdown_table(self.columns, self.rows)


def compare(folders: Sequence[Path]) -> Comparison:
    """Set converted folders side by side, lengths down and models across.

    Raises:
        OutputError: a folder is no conversion, or has no perplexities.
    """
    models = []
    for folder in folders:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise OutputError(f"{folder} is no converted model.", "Give folders that this tool wrote.")
        if manifest.perplexity is None:
            line = shlex.join(["mmod", "evaluate", *map(str, folders)])
            raise OutputError(f"{folder} has no perplexities to compare.", f"Measure the models again: {line}")
        models.append((folder, manifest, manifest.perplexity))
    lengths = sorted({int(length) for *_, table in models for length in table.base})
    rows = [
        (format_length(length), *(_before_after(table, str(length)) for *_, table in models)) for length in lengths
    ]
    conditions = [(table.text.name, f"{table.span_tokens:,}", table.dtype) for *_, table in models]
    methods = [manifest.calibration.method if manifest.calibration else "given scales" for _, manifest, _ in models]
    labels = ("text", "span (tokens)", "number format")
    rows += [(label, *(plain(c[place]) for c in conditions)) for place, label in enumerate(labels)]
    rows.append(("method", *methods))
    columns = ("Tokens", *(plain(os.path.basename(os.path.abspath(folder))) for folder, *_ in models))
    return Comparison(columns, tuple(rows), len({c for c in conditions}) == 1)


def _before_after(table: PerplexityTable, length: str) -> str:
    if length not in table.base:
        return "n/a"
    before, after = table.base[length], table.converted[length]
    return f"{before:.2f} → {after:.2f} ({change(before, after)})"
