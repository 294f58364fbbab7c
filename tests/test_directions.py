"""Which package may import which: commands import all, the file side neither of the two others."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "converter" / "commands"


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("converter", ("calibrator", "hub_cards", "converter.commands", "rich", "typer")),
        ("calibrator", ("hub_cards", "converter.commands", "rich", "typer")),
        ("hub_cards", ("calibrator", "converter.commands", "rich", "typer", "torch")),
    ],
)
def test_a_package_imports_only_what_lies_below_it(package: str, forbidden: tuple[str, ...]) -> None:
    files = [path for path in (ROOT / package).rglob("*.py") if COMMANDS not in path.parents]
    assert len(files) > 5
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        if path.name != "__main__.py" and path != ROOT / package / "__init__.py"
        for name in imported(path)
        if any(name == other or name.startswith(other + ".") for other in forbidden)
    ]
    assert not wrong


def test_importing_the_converter_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "rich", "typer", "numpy")
    code = f"import sys, converter, calibrator; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
