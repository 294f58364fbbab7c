"""Standard JSON: NaN and infinities are written as strings, since JSON has no numbers for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NUMBER_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def json_text(content: Any) -> str:
    """Indented JSON without a final newline."""
    return json.dumps(_named(content), indent=1, ensure_ascii=False, allow_nan=False)


def _named(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    if isinstance(content, Mapping):
        return {key: _named(value) for key, value in content.items()}
    return [_named(item) for item in content] if isinstance(content, list | tuple) else content
