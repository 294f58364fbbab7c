"""``mmod ask`` on the bundled model that recalls facts: what is hidden, how far back, and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calibrator.model import load_tokenizer
from converter.commands.cli import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import CalibrationError, TextError
from tests.tiny_folders import tiny_folder

HIDDEN = "The code for Alice is 73915."
QUESTION = "What is the code for Alice? The code for Alice is"

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


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


@pytest.mark.parametrize("words", [("--question", "<far>?"), ("--question", "who?", "--hide", "a <far> thing")])
def test_token_that_the_model_does_not_know_is_named(words: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_folder("mamba2", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 256, "content": "<far>", "special": True, **dict.fromkeys(FLAGS, False)}
    )
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = CliRunner().invoke(app, ["ask", str(model), *words, "--length", "1k", "--back", "64", "-q"]).exception
    assert isinstance(error, TextError) and error.message.startswith(words[-2])
    assert "'<far>' with the id 256, and the model's embedding has 256 rows" in error.message


def test_tokenizer_config_that_stock_code_cannot_use_is_told(tmp_path: Path) -> None:
    model = tiny_folder("mamba2", tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "many"}))
    with pytest.raises(CalibrationError, match="cannot load the tokenizer beside this checkpoint"):
        load_tokenizer(model)
