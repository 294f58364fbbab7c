"""How pages that GitHub shows as they are become the site: formulas as MathML, other links whole."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Rewrite all of a page but its code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(part if number % 2 else _rewrite(part, config.repo_url) for number, part in enumerate(parts))


def _rewrite(text: str, repository: str) -> str:
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1], display="block"), text, flags=re.DOTALL)
    text = re.sub(r"\$(.+?)\$", lambda found: convert(found[1]), text)
    where = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1 (\2)"
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", where, text)
