"""The training length: published families by name, and a measurement where the length is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibrator.text import Text, TextSource, read_text
from calibrator.train_len import look_up_train_len, measure_train_len
from converter.errors import TextError
from tests.measured_models import demo_folder, load, random_tokens
from tests.stock_models import RememberingReporter, stock_model

NOVEL = Path(__file__).parent.parent / "converter" / "demo" / "texts" / "persuasion.txt"


@pytest.mark.parametrize(
    ("name", "train_len"),
    [
        ("state-spaces/mamba2-2.7b", 2048),
        ("state-spaces/mamba-130m-hf", 2048),
        ("state-spaces/mamba-2.8b-slimpj", 2048),
        ("tiiuae/falcon-mamba-7b-instruct", 8192),
        ("mistralai/Mamba-Codestral-7B-v0.1", 262144),
        ("someone/mamba2-2.7b", None),
        ("mamba2-2.7b", None),
    ],
)
def test_published_families_are_known_by_name(name: str, train_len: int | None) -> None:
    assert look_up_train_len(name, "hub") == train_len


def test_only_a_published_name_tells_the_length() -> None:
    assert look_up_train_len("demo:mamba", "demo") == 256
    for name in ("demo", "tiny-mamba2-256", "state-spaces/mamba2-2.7b"):
        assert look_up_train_len(name, "folder") is None


def test_measured_length_is_near_the_true_one(tmp_path: Path) -> None:
    stock = load(demo_folder("demo:mamba", tmp_path / "model"))
    text = read_text(TextSource(str(NOVEL)), stock.tokenizer, limit=20_000)
    reporter = RememberingReporter()
    with stock.recurrence:
        # It was trained on windows of 256 tokens.
        assert measure_train_len(stock, [text], reporter) in (128, 256, 512)
    assert "--train-len" in reporter.lines[0]


def test_text_too_short_to_measure_on_is_an_error() -> None:
    stock = stock_model("mamba2")
    with pytest.raises(TextError, match="500 tokens") as caught:
        measure_train_len(stock, [Text("short", (random_tokens(1, 500)[0],))], RememberingReporter())
    assert "--train-len" in caught.value.fix
