"""Pieces of Markdown: text without markup, code, tables, folds, and foreign Markdown that ends where it should."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markdown_it import MarkdownIt


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


def contained(markdown: str) -> str:
    """Markdown from elsewhere, ended so that it cannot swallow what follows it.

    A fence, an HTML block or a fold that is still open at the end is closed; what is open inside a list or quote
    ends with it.
    """
    text = markdown.replace("\r\n", "\n").strip()
    lines = text.splitlines()
    tokens = MarkdownIt("commonmark").parse(text)
    for token in tokens:
        if token.level == 0 and token.type in ("fence", "html_block") and token.map and token.map[1] >= len(lines):
            text += _missing_end(token.markup, token.content, lines[-1] if token.map[1] - token.map[0] > 1 else "")
    html = "".join(token.content for token in tokens if token.type in ("html_block", "inline"))
    folds = len(re.findall(r"<details\b", html)) - html.count("</details>")
    return text + "\n\n</details>" * folds


def _missing_end(markup: str, content: str, last_line: str) -> str:
    """What closes a fence (which has a ``markup``) or an HTML block, where nothing does yet."""
    if markup:
        return "" if re.fullmatch(rf" {{0,3}}{re.escape(markup)}+[ \t]*", last_line) else f"\n{markup}"
    for opening, closing in (("<!--", "-->"), ("<?", "?>"), ("<![CDATA[", "]]>")):
        if content.lstrip().startswith(opening):
            return "" if closing in content else f"\n{closing}"
    verbatim = re.match(r"\s*<(script|pre|style|textarea)\b", content, re.IGNORECASE)
    if verbatim and f"</{verbatim[1].lower()}>" not in content.lower():
        return f"\n</{verbatim[1]}>"
    return ""
