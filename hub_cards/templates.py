"""Fills in the templates beside it: the card in Markdown and the report in HTML."""

from __future__ import annotations

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
