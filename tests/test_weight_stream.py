"""Weights that come from host memory layer by layer: the same losses and gradients, and two layers at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrator import weight_stream
from calibrator.activations import checkpointed
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.weight_stream import WeightStream, is_streamed, outermost_layers
from converter.errors import UsageError
from tests.stock_models import layer_scaling, stock_model
from tests.tiny_models import VOCABULARY

CPU = torch.device("cpu")


def losses_and_gradients(stock: StockModel) -> list[Tensor]:
    """Of two passes with gradients, and one without before each."""
    windows = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    found = []
    with layer_scaling(stock) as scaling, stock.recurrence, checkpointed(stock):
        for part in windows.split(20, dim=1):
            with torch.no_grad():
                found.append(window_losses(stock, part))
            loss = window_losses(stock, part)
            loss.mean().backward()  # type: ignore[no-untyped-call]
            found.append(loss.detach())
        return found + [log_s.grad for log_s in scaling.parameters() if log_s.grad is not None]


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "zamba2", "bamba", "qwen3_next", "nemotron_h"])
def test_streamed_weights_give_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "SMALLEST_STREAMED", 0)
    stock = stock_model(model_type)
    expected = losses_and_gradients(stock)
    whole = sum(parameter.nbytes for layer in outermost_layers(stock.model) for parameter in layer.parameters())
    stock.weights = WeightStream(stock.model, CPU)
    left = sum(parameter.nbytes for layer in outermost_layers(stock.model) for parameter in layer.parameters())
    # What Zamba2's layers share stays.
    assert left < (1 if model_type == "zamba2" else 0.05) * whole
    found = losses_and_gradients(stock)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    stock.release()
    assert stock.weights.nbytes == 0


def test_each_layer_follows_the_one_before_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched that the next layer does not take, but at a pass that nothing foretells."""
    monkeypatch.setattr(weight_stream, "SMALLEST_STREAMED", 0)
    stock = stock_model("bamba")
    stream = stock.weights = WeightStream(stock.model, CPU)
    fetched: list[int] = []
    fetch = stream._fetch

    def record(index: int) -> None:
        if index not in stream._on_device:
            fetched.append(index)
        fetch(index)
        assert len(stream._on_device) <= 2

    monkeypatch.setattr(stream, "_fetch", record)
    losses_and_gradients(stock)
    end = len(outermost_layers(stock.model)) - 1
    forwards, backwards = list(range(end + 1)), list(range(end - 1, -1, -1))
    once = [*forwards, 0, *forwards[1:], *backwards]
    assert fetched == [*once, *forwards[2:], 0, *forwards[1:], *backwards]


def test_weights_stay_where_the_model_computes_unless_that_is_a_gpu() -> None:
    model = stock_model("mamba2").model
    assert not is_streamed(model, CPU, "auto")
    with pytest.raises(UsageError, match="--memory stream"):
        is_streamed(model, CPU, "stream")
