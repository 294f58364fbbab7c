"""Scales for Mamba checkpoints: found, baked into A_log, proved. See docs/api.md for the API of this package.

The names below are loaded when they are first used, so that importing the package stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converter.commands.api import bake, inspect, verify
    from converter.scales import ScaleSet

__version__ = "0.1.0"
__all__ = ["ScaleSet", "bake", "inspect", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("converter.scales" if name == "ScaleSet" else "converter.commands.api"), name)
