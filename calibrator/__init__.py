"""The model side: loads a checkpoint with stock transformers, tunes the scales of A and measures the result.

The names below are loaded when they are first used; see docs/api.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.commands.api import calibrate, evaluate

__all__ = ["calibrate", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("converter.commands.api"), name)
