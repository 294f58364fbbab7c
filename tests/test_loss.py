"""The loss in slices: the same values and gradients as over all scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calibrator import loss
from calibrator.loss import losses_and_divergences, token_losses, window_losses
from calibrator.scaling import Scaling
from tests.measured_models import random_tokens
from tests.stock_models import stock_model
from tests.tiny_models import VOCABULARY


def expected_losses(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize("positions", [1, 7, 39, 1000])
def test_slices_make_no_difference(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    windows = random_tokens(2, 40)
    scores = stock.model(windows, use_cache=False).logits
    monkeypatch.setattr(loss, "SLICE_SCORES", positions * 2 * VOCABULARY)
    with stock.recurrence, torch.no_grad():
        found = window_losses(stock, windows)
    assert found.shape == (2, 39) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected_losses(scores[:, :-1], windows[:, 1:]), rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    windows = random_tokens(2, 40)
    gradients = []
    for scores_at_once in (5 * 2 * VOCABULARY, 1 << 30):
        monkeypatch.setattr(loss, "SLICE_SCORES", scores_at_once)
        with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
            window_losses(stock, windows).mean().backward()
            gradients.append([parameter.grad for parameter in scaling.parameters()])
    for sliced, whole in zip(*gradients, strict=True):
        assert sliced is not None and whole is not None
        torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-9)


def test_no_more_scores_stand_in_memory_than_a_slice_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    sizes: list[int] = []
    project = type(stock).logits

    def watched(self: object, hidden: Tensor) -> Tensor:
        scores = project(stock, hidden)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(type(stock), "logits", watched)
    monkeypatch.setattr(loss, "SLICE_SCORES", 10 * VOCABULARY)
    hidden = torch.randn(1, 95, 64)
    with torch.no_grad():
        assert token_losses(stock, hidden, random_tokens(1, 95)).shape == (1, 95)
    assert sum(sizes) == 95 * VOCABULARY and max(sizes) == 10 * VOCABULARY


def test_divergences_are_from_the_reference_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("mamba2")
    windows = random_tokens(2, 40)
    monkeypatch.setattr(loss, "SLICE_SCORES", 7 * 2 * 2 * VOCABULARY)
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence, torch.no_grad():
        for parameter in scaling.parameters():
            parameter.fill_(3.0)
        with scaling.off():
            reference = stock.hidden_states(windows)[:, :-1]
        hidden = stock.hidden_states(windows)[:, :-1]
        losses, divergences = losses_and_divergences(stock, hidden, windows[:, 1:], reference)
        torch.testing.assert_close(losses, token_losses(stock, hidden, windows[:, 1:]))
        scaled = stock.logits(hidden).log_softmax(-1)
    unscaled = stock.model(windows, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = (unscaled.exp() * (unscaled - scaled)).sum(-1)
    assert expected.mean() > 1e-5
    torch.testing.assert_close(divergences, expected, rtol=1e-3, atol=1e-5)
