"""mmod diagnose through the real command: what it measures, what it concludes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.errors import MmodError
from hub_cards.report import report_html
from tests.measured_models import demo_folder


def diagnose(model: str, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["diagnose", model, *words, "--json", "-q"])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout)
    return record


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrator.skills.PROMPTS_ON_CPU", 4)
    monkeypatch.setattr("converter.commands.diagnose.PROMPTS", 4)


def test_model_that_recalls_is_asked_at_every_distance() -> None:
    record = diagnose("demo:recall", "--target-len", "520", "--train-len", "128")
    # A multiple of the training length.
    assert (record["model"], record["train_len"], record["target_len"]) == ("demo:recall", 128, 512)
    assert list(record["by_position"]) == ["256", "512"]
    assert record["sliding"]["by_position"].keys() <= record["by_position"].keys()
    kinds = {cell["kind"] for cell in record["recall"]}
    assert {"random span", "pass key"} <= kinds
    assert sorted(cell["distance"] for cell in record["recall"] if cell["kind"] == "pass key") == [16, 64, 256]
    assert all(cell["length"] == 512 and cell["samples"] == 4 for cell in record["recall"])
    assert any("In 512 tokens it finds a" in sentence for sentence in record["verdict"])
    page = report_html({}, {Path("told.json"): record})
    assert all(sentence.partition("'")[0] in page for sentence in record["verdict"])
    assert f"one pass, 512 tokens: {record['by_position']['512']:.2f}" in page
    assert "demo:recall, 256 back, pass key: " in page and "4 prompts" in page


def test_model_that_breaks_down_needs_scaling_and_a_steady_one_does_not(tmp_path: Path) -> None:
    """With six times its A the model reads little but the last words; the perplexity of that grows with length."""
    slow, fast = (demo_folder("demo", tmp_path / name, factor) for name, factor in (("slow", 0.05), ("fast", 6.0)))
    broken, steady = (diagnose(str(path), "--target-len", "1k", "--train-len", "64") for path in (slow, fast))
    assert (broken["needs_scaling"], steady["needs_scaling"]) == (True, False)
    assert broken["verdict"][0].startswith("Yes: near 1k tokens the perplexity is")
    assert steady["verdict"][0].startswith("No: the model is steady to 1k tokens")
    assert broken["recall"] == steady["recall"] == []
    for record in (broken, steady):
        [last] = list(record["by_position"])[-1:]
        worse = record["by_position"][last] > 1.02 * record["sliding"]["by_position"][last]
        assert worse == record["needs_scaling"]


def test_sliding_window_is_no_longer_than_the_text_that_is_measured() -> None:
    record = diagnose("demo", "--target-len", "128", "--train-len", "64")
    assert record["sliding"]["window"] == 128 and list(record["sliding"]["by_position"]) == ["256"]


def test_verdict_names_the_length_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six training lengths hold one sliding window of four, beyond which there is nothing to compare with."""
    monkeypatch.setattr("calibrator.evaluation.baselines.choose_window", lambda *_: 512)
    record = diagnose("demo:recall", "--target-len", "768", "--train-len", "128")
    assert record["target_len"] == 768 and list(record["by_position"]) == ["256", "512"]
    assert "512 tokens the perplexity" in record["verdict"][0] or "steady to 512 tokens" in record["verdict"][0]
    assert record["verdict"][1].startswith("In 768 tokens it finds")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target-len", "256", "--train-len", "200"), "256 is less than twice that"),
        (("--text", "{novel}", "--target-len", "512", "--train-len", "256"), "are needed"),
    ],
)
def test_too_short_a_length_or_text_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("A few words. " * 150)
    given = [word.format(novel=tmp_path / "novel.txt") for word in words]
    done = CliRunner().invoke(app, ["diagnose", "demo", *given])
    assert isinstance(done.exception, MmodError) and said in done.exception.message
