"""The programs ``mmod`` and ``mmod-convert``; ``python -m converter``, for torchrun and its like, is the latter."""

from importlib import import_module

from converter.commands.ending import run_application

_APPS = "converter.commands.cli"


def main() -> None:
    """Entry point of ``mmod``."""
    run_application(lambda: import_module(_APPS).app())


def convert_main() -> None:
    """Entry point of ``mmod-convert``."""
    run_application(lambda: import_module(_APPS).convert_app())


if __name__ == "__main__":
    convert_main()
