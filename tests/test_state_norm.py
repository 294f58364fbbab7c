"""State norms: carried states against the cache that stock code fills, and norms against the states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.state_norm import final_states, measure_state_norms
from calibrator.model import StockModel
from tests.measured_models import QUIET, random_tokens, tiny_stock

LENGTHS = (7, 32, 50)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "zamba", "bamba", "qwen3_next"])
def test_carried_states_are_those_of_the_stock_cache(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StockModel, "tokens_at_once", 16)
    stock = tiny_stock(model_type, tmp_path)
    window = random_tokens(1, max(LENGTHS))
    with torch.no_grad(), stock.recurrence:
        carried = dict(final_states(stock, window, LENGTHS))
    with torch.no_grad():
        for length in LENGTHS:
            outputs = stock.model(window[:, :length], use_cache=True)
            cache = next(outputs[name] for name in ("cache", "past_key_values", "cache_params") if name in outputs)
            for key, mixer in stock.mixers.items():
                expected = cache.layers[mixer.layer_idx].recurrent_states[0]
                found = carried[length][key].view_as(expected)
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_norms_of_layers_and_heads(tmp_path: Path) -> None:
    stock = tiny_stock("mamba2", tmp_path)
    windows = random_tokens(3, 48)
    with torch.no_grad(), stock.recurrence:
        norms = measure_state_norms(stock, windows, (48,), QUIET, "mamba2")[48]
        states = [dict(final_states(stock, row[None], (48,)))[48] for row in windows]
    for layer in norms:
        whole = torch.stack([state[layer.layer].norm() for state in states])
        heads = torch.stack([state[layer.layer][0].flatten(1).norm(dim=1) for state in states])
        assert layer.norm == pytest.approx(float(whole.mean()), rel=1e-5)
        assert layer.smallest == pytest.approx(float(heads.min()), rel=1e-5)
        assert layer.largest == pytest.approx(float(heads.max()), rel=1e-5)
