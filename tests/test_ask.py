"""``mmod ask`` on the bundled model that recalls facts: what is hidden, how far back, and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import TextError

HIDDEN = "The code for Alice is 73915."
QUESTION = "What is the code for Alice? The code for Alice is"


def ask(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["ask", "demo:recall", "--question", QUESTION, *words, "--json", "-q"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """About 300 tokens of a novel."""
    path = tmp_path / "novel.txt"
    path.write_text(" ".join(Path(HELD_OUT_NOVEL).read_text(encoding="utf-8").split()[4000:4200]))
    return path


def test_hidden_sentence_is_found_as_far_back_as_asked() -> None:
    said = ask("--hide", HIDDEN, "--length", "400", "--back", "200")
    assert said["answers"][0]["answer"].startswith("73915")
    assert (said["length"], said["back"]) == (400, 200)
    # The model cannot know what is not there.
    assert not ask("--length", "400")["answers"][0]["answer"].startswith("73915")


def test_short_text_is_read_whole_and_the_distance_told_is_the_real_one(novel: Path) -> None:
    said = ask("--text", str(novel), "--hide", HIDDEN, "--back", "1")
    assert said["answers"][0]["answer"].startswith("73915")
    assert 200 < said["length"] < 512 and 1 < said["back"] < 40


def test_sentence_that_the_file_has_is_found_without_hide(novel: Path) -> None:
    novel.write_text(f"{HIDDEN} {novel.read_text()}")
    said = ask("--text", str(novel))
    assert said["answers"][0]["answer"].startswith("73915")
    assert said["back"] is None and 200 < said["length"] < 512


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--length", "1k"), "1024 are asked for"),
        (("--length", "2"), "no room for the question"),
        (("--hide", HIDDEN, "--back", "1k"), "no room for a sentence"),
    ],
)
def test_texts_that_are_too_short_are_refused(novel: Path, words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(TextError, match=problem):
        ask("--text", str(novel), *words)
