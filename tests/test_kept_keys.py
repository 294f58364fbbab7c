"""Hybrids in pieces: attention keeps its keys, so that every architecture says what it says in one pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrator import recurrence
from calibrator.activations import checkpointed
from calibrator.carried_state import State
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import carry
from calibrator.kept_keys import CACHE
from calibrator.model import StockModel
from tests.measured_models import random_tokens
from tests.stock_models import layer_scaling, stock_model
from tests.test_architectures import ATTENTION_LAYERS, with_strong_decay

HYBRIDS = sorted(ATTENTION_LAYERS)
LENGTH, PIECE = 90, 30


def strong_stock(model_type: str) -> StockModel:
    stock = stock_model(model_type)
    with_strong_decay(stock.model)
    return stock


def in_pieces(stock: StockModel, text: Tensor, keep: int | None = None) -> tuple[list[Tensor], list[State]]:
    """Hidden states of the pieces of a text, and the state after each."""
    state: State | None = None
    hidden, states = [], []
    for piece in text.split(PIECE, dim=1):
        with stock.recurrence.carried(state, keep) as state:
            hidden.append(stock.hidden_states(piece))
        states.append(state)
    return hidden, states


class Detaching:
    """A cache of nothing, under which no gradient flows through keys and values before the last piece."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        parts = (part.split(LENGTH - PIECE, dim=-2) for part in (keys, values))
        return tuple(torch.cat([past.detach(), last], dim=-2) for past, last in parts)

    def update_indexer(self, keys: Tensor, _: int) -> Tensor:
        return keys


def with_constant_keys(model: PreTrainedModel) -> list[Any]:
    """Let attention run under :class:`Detaching`; returns the hooks."""

    def hook(_: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        return args, kw | {CACHE: Detaching()}

    attention = [module for module in model.modules() if getattr(module, "is_causal", False)]
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module in attention]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_pieces_give_what_one_pass_gives(model_type: str) -> None:
    stock, text = strong_stock(model_type), random_tokens(2, LENGTH)
    with stock.recurrence, torch.no_grad():
        whole = stock.logits(stock.hidden_states(text))
        hidden, states = in_pieces(stock, text)
        pieces = stock.logits(torch.cat(hidden, dim=1))
        short = stock.logits(torch.cat(in_pieces(stock, text, keep=10)[0], dim=1))
    assert (whole - pieces).abs().max() < 1e-4 * whole.abs().max()
    assert (whole - short).abs().max() > 1e-3 * whole.abs().max()
    assert tuple(states[-1].attention.layers) == ATTENTION_LAYERS[model_type]
    assert [state.attention.position for state in states] == [30, 60, 90]


@pytest.mark.parametrize("model_type", HYBRIDS)
@pytest.mark.parametrize("rerun", [False, True])
def test_gradient_is_exact_within_a_layer_but_for_keys_of_the_past(model_type: str, rerun: bool) -> None:
    """What the last layer with an A_log puts out before the piece reaches its loss through keys alone."""
    stock, text = strong_stock(model_type), random_tokens(2, LENGTH)
    weight = torch.randn(stock.hidden_states(text[:, :PIECE]).shape, generator=torch.Generator().manual_seed(4))
    runs: AbstractContextManager[None] = checkpointed(stock) if rerun else nullcontext()
    with layer_scaling(stock) as scaling, stock.recurrence:
        factor = scaling.parameters()[-1]
        hooks = with_constant_keys(stock.model)
        (stock.hidden_states(text)[:, -PIECE:] * weight).sum().backward()
        for hook in hooks:
            hook.remove()
        expected, factor.grad = factor.grad, None
        _, states = in_pieces(stock, text[:, :-PIECE])
        with runs, stock.recurrence.carried(states[-1]) as after:
            (stock.hidden_states(text[:, -PIECE:]) * weight).sum().backward()
        found, factor.grad = factor.grad, None
        with stock.recurrence.carried(State()):
            (stock.hidden_states(text[:, -PIECE:]) * weight).sum().backward()
        without = factor.grad
    assert expected is not None and found is not None and without is not None
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    assert float(without) != pytest.approx(float(expected), rel=1e-2)
    assert after.attention.position == LENGTH
    assert all(layer.keys.shape[-2] == LENGTH for layer in after.attention.layers.values())
    assert not any(layer.keys.requires_grad for layer in after.attention.layers.values())


@pytest.mark.parametrize("model_type", ["bamba", "falcon_h1", "qwen3_next", "qwen4_exp_text"])
def test_the_last_keys_are_kept_at_their_own_positions(model_type: str) -> None:
    stock, text = strong_stock(model_type), random_tokens(1, LENGTH)
    with stock.recurrence, torch.no_grad():
        _, every = in_pieces(stock, text[:, :PIECE])
        _, last = in_pieces(stock, text[:, :PIECE], keep=12)
    for number, layer in last[-1].attention.layers.items():
        kept = every[-1].attention.layers[number]
        assert layer.keys.shape[-2] == layer.values.shape[-2] == 12
        assert torch.equal(layer.keys, kept.keys[..., -12:, :])
        assert torch.equal(layer.values, kept.values[..., -12:, :])
    assert last[-1].attention.position == PIECE


@pytest.mark.parametrize(
    ("piece", "window", "due"),
    [(64, 100, (50, 50)), (20, 100, (20, 80)), (9, 1, (1, 0)), (1 << 16, 1 << 18, (1 << 12, 258048))],
)
def test_attention_sees_a_window_at_most_and_half_of_it_at_least(
    piece: int, window: int, due: tuple[int, int]
) -> None:
    assert stock_model("bamba").recurrence.piece_and_keys(piece, window) == due
    assert stock_model("bamba").recurrence.piece_and_keys(piece, None) == (piece, None)
    assert stock_model("mamba2").recurrence.piece_and_keys(piece, window) == (piece, None)


def test_measures_of_long_text_keep_the_mask_small(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, text, limit = strong_stock("bamba"), random_tokens(2, LENGTH), 2 * 8 * LENGTH
    sizes: list[int] = []

    def note(_: nn.Module, _args: Any, kw: dict[str, Any]) -> None:
        sizes.append(0 if kw["attention_mask"] is None else kw["attention_mask"].numel())

    for module in stock.model.modules():
        if getattr(module, "is_causal", False):
            module.register_forward_pre_hook(note, with_kwargs=True)
    monkeypatch.setattr(StockModel, "tokens_at_once", 2 * PIECE)
    found, largest = [], []
    for values in (recurrence.MASK_VALUES, limit):
        monkeypatch.setattr(recurrence, "MASK_VALUES", values)
        with stock.recurrence, torch.no_grad():
            found.append(prediction_losses(stock, text))
            largest.append(max(sizes))
            state, _ = carry(stock, text[:, :40])
            sizes.clear()
            found.append(carry(stock, text[:, 40:], state, keep=20)[1])
            largest.append(max(sizes))
            sizes.clear()
    assert max(largest[2:]) <= limit < min(largest[:2])
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mamba2", "bamba", "falcon_h1", "qwen4_exp_text"])
def test_a_recorded_state_goes_on_as_the_state_itself(model_type: str, tmp_path: Path) -> None:
    stock, text = strong_stock(model_type), random_tokens(1, LENGTH)
    with stock.recurrence, torch.no_grad():
        _, states = in_pieces(stock, text[:, :-PIECE])
        torch.save(states[-1], tmp_path / "state")
        again = torch.load(tmp_path / "state", weights_only=True)
        results = []
        for state in (states[-1], again):
            with stock.recurrence.carried(state):
                results.append(stock.hidden_states(text[:, -PIECE:]))
    assert torch.equal(*results)
