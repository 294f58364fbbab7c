"""LongPPL: key tokens and their perplexity, worked out token by token from the paper's definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.longppl import find_key_tokens, long_perplexity
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.model import StockModel
from tests.measured_models import demo_folder, load

SHORT, STEP, LENGTH = 32, 8, 192


def last_probabilities(stock: StockModel, context: Tensor, count: int) -> list[float]:
    """Of the last tokens of a text, from transformers' own logits."""
    chances = stock.model(context[None]).logits[0, -count - 1 : -1].float().softmax(-1)
    return [float(row[token]) for row, token in zip(chances, context[-count:], strict=True)]


@torch.no_grad()
def test_perplexity_of_the_tokens_that_need_a_long_context(tmp_path: Path) -> None:
    """Where a random span stands in the text again, each of its tokens is known from the first time alone."""
    teacher, other = load(demo_folder("demo:recall", tmp_path / "a")), load(demo_folder("demo", tmp_path / "b"))
    text = torch.randint(300, 4000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    text[0, 130:160] = text[0, 20:50]
    with teacher.recurrence:
        keys = find_key_tokens(teacher, text, SHORT)
        expected = []
        for start in range(0, LENGTH - SHORT, STEP):
            # As in the authors' code the tokens of one step share a short context.
            end = start + SHORT + STEP
            short, long = (last_probabilities(teacher, text[0, a:end], STEP) for a in (start, 0))
            pairs = zip(short, long, strict=True)
            expected += [math.log(b / a) > 2 and b > math.exp(-2) for a, b in pairs]
    assert keys[0].tolist() == [False] * SHORT + expected and sum(expected) > 10
    with other.recurrence:
        losses = prediction_losses(other, text.view(2, -1))
        second = [last_probabilities(other, text[0, LENGTH // 2 : place + 1], 1)[0] for place in range(130, 160)]
    of_keys = [chance for chance, is_key in zip(second, keys[0, 130:160], strict=True) if is_key]
    assert len(of_keys) == sum(expected)
    assert long_perplexity(losses, keys) == pytest.approx(math.prod(of_keys) ** (-1 / len(of_keys)), rel=1e-3)
    assert math.isnan(long_perplexity(losses, torch.zeros_like(keys)))
