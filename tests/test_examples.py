"""The examples run from top to bottom on a tiny checkpoint, cell by cell as a notebook runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_folders import novel, tiny_folder

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = novel(tmp_path, 20_000)
    small = {
        "MODEL": repr(str(tiny_folder("mamba2", tmp_path / "tiny"))),
        "DATA": repr((str(text),)),
        "TEXT": f"Path({str(text)!r})",
        "HELD_OUT": repr(str(text)),
        "TRAIN_LEN": "64",
        "TARGET_LEN": "512",
        "STEPS": "2",
    }
    code = example.read_text()
    for name, value in small.items():
        code = re.sub(rf"^{name} = .*$", f"{name} = {value}", code, count=1, flags=re.MULTILINE)
    cells = re.split(r"^# %%(?: \[markdown\])?\n", code, flags=re.MULTILINE)
    assert cells[0] == "" and len(cells) > 5
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, example.name, "exec"), names)
    printed = capsys.readouterr().out
    assert {
        "convert_and_load": "equal the formula",
        "scales_in_memory": "perplexity",
        "calibrate_on_your_text": "demo-my-text",
    }[example.stem] in printed
