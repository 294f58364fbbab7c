"""Fills in the templates beside it, the card in Markdown and the report in HTML, and writes pieces of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def fill_in(template: str, /, **values: Any) -> str:
    """A template of this folder with these values; what it is not given is an error. HTML is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=template.endswith(".html"),
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def plain(text: str) -> str:
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fold(summary: str, content: str) -> str:
    """Content that opens when its summary is clicked."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"
