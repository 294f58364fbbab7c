"""Pass keys: the questions, and the measure on a model that knows the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.passkey import Filler, is_solved, make_samples, measure_retrieval
from benchmarks.pictures import draw_pictures
from calibrator.text import TextSource, read_text
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import TextError, UsageError
from converter.source import resolve
from tests.measured_models import QUIET, ScriptedModel

DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo", compose=True).folder)


@pytest.fixture(scope="module")
def filler(tokenizer: Any) -> Filler:
    return Filler(read_text(TextSource(HELD_OUT_NOVEL), tokenizer, limit=20_000), tokenizer)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(150, 2000), depth=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_question_has_the_key_at_its_depth(filler: Filler, length: int, depth: float, seed: int) -> None:
    [sample] = make_samples(filler, [length], [depth], 1, seed)
    text = filler.tokenizer.decode(sample.tokens)
    assert len(sample.tokens) <= length
    assert text.startswith("A pass key is hidden") and text.endswith("Answer:")
    assert text.count(f"The pass key is {sample.key}. Remember it. {sample.key} is the pass key.") == 1
    assert filler.tokenizer.decode(sample.answer).strip() == sample.key
    place = text.index("The pass key is") / len(text)
    assert abs(place - depth) < 0.12 + 150 / length


def test_same_seed_same_questions(filler: Filler) -> None:
    first, again = (make_samples(filler, [300], DEPTHS, 2, seed=5) for _ in range(2))
    assert [sample.key for sample in first] == [sample.key for sample in again]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert len({sample.key for sample in first}) == len(first)
    other = make_samples(filler, [300, 400], DEPTHS, 2, seed=5)
    assert [sample.key for sample in other[: len(first)]] == [sample.key for sample in first]


def test_short_filler_goes_round_until_the_length_is_reached(tokenizer: Any) -> None:
    start = read_text(TextSource(HELD_OUT_NOVEL), tokenizer, limit=700)
    for sample in make_samples(Filler(start, tokenizer), [300, 4000], DEPTHS, 3, seed=0):
        assert sample.length - 100 < len(sample.tokens) <= sample.length


def test_too_short_for_a_sentence(filler: Filler) -> None:
    with pytest.raises(TextError, match="No sentence"):
        make_samples(filler, [45], [0.5], 1, seed=0)
    with pytest.raises(UsageError, match="depth"):
        make_samples(filler, [300], [1.5], 1, seed=0)


def test_model_that_knows_the_answer_solves_everything(filler: Filler, tokenizer: Any) -> None:
    samples = make_samples(filler, [200, 600], DEPTHS, 2, seed=0)
    cells = measure_retrieval(ScriptedModel(tokenizer), tokenizer, samples, QUIET, "script")
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (200, 600) for d in DEPTHS]
    assert all(cell.solved == cell.samples == 2 for cell in cells)


def test_model_that_forgets_fails_where_the_key_is_far_back(filler: Filler, tokenizer: Any) -> None:
    samples = make_samples(filler, [200, 1000], DEPTHS, 2, seed=0)
    cells = measure_retrieval(ScriptedModel(tokenizer, memory=250), tokenizer, samples, QUIET, "script")
    solved = {(cell.length, cell.depth): cell.solved for cell in cells}
    assert [solved[200, depth] for depth in DEPTHS] == [2, 2, 2]
    assert [solved[1000, depth] for depth in DEPTHS] == [0, 0, 2]


@pytest.mark.parametrize(
    ("said", "solved"),
    [(" 12345. Remember", True), ("is 12345", True), ("123456", False), ("1234", False), ("", False)],
)
def test_key_must_be_a_word_of_the_answer(said: str, solved: bool) -> None:
    assert is_solved("12345", said) is solved


def test_picture_shows_solved_cells_alone_in_green() -> None:
    from io import BytesIO

    from PIL import Image

    def draw(solved: int) -> Any:
        cells = [{"length": 256, "depth": 0.0, "samples": 3, "solved": solved}]
        [picture] = draw_pictures({"task": "passkey", "models": [{"model": "m", "cells": cells}]})
        assert f"{int(solved == 3)} of 1 cells solved" in picture.alt
        colors = Image.open(BytesIO(picture.png)).convert("RGB").getcolors(1 << 24)
        return {color for count, color in colors if count > 20_000}

    green, red = (21, 128, 61), (185, 28, 28)
    assert green in draw(3) and red not in draw(3)
    assert red in draw(2) and green not in draw(2)
