"""The spectrum: eigenvalues against steps that are known by construction, before and after scaling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.pictures import draw_pictures
from benchmarks.spectrum import MOST_VALUES, measure_spectrum
from calibrator.methods.floor import mean_steps
from calibrator.model import StockModel
from tests.measured_models import QUIET, random_tokens, tiny_stock


def fix_steps(stock: StockModel) -> dict[str, torch.Tensor]:
    """Make every layer's Δ the softplus of its bias, whatever the text; returns it."""
    steps = {}
    with torch.no_grad():
        for key, mixer in stock.mixers.items():
            if hasattr(mixer, "dt_proj"):
                mixer.dt_proj.weight.zero_()
                steps[key] = functional.softplus(mixer.dt_proj.bias).double()
            else:
                mixer.in_proj.weight[-mixer.num_heads :].zero_()
                steps[key] = functional.softplus(mixer.dt_bias).double()
    return steps


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_eigenvalues_are_exp_of_decay_times_step(model_type: str, tmp_path: Path) -> None:
    stock = tiny_stock(model_type, tmp_path)
    steps = fix_steps(stock)
    with stock.recurrence:
        layers = measure_spectrum(stock, random_tokens(2, 24), QUIET, model_type)
    for layer in layers:
        A = stock.A_log[layer.layer].double().exp()
        step = steps[layer.layer]
        rates = (A * (step if A.dim() == 1 else step[:, None])).flatten()
        assert layer.count == A.numel()
        assert layer.mean_step == pytest.approx(float(step.mean()), rel=1e-5)
        assert len(layer.eigenvalues) == min(A.numel(), MOST_VALUES)
        for found, exact in (
            (layer.eigenvalues, torch.exp(-rates)),
            (layer.at_unit_step, torch.exp(-A)),
            (layer.decay_rates, A),
        ):
            assert found == sorted(found, reverse=True)
            assert (found[0], found[-1]) == pytest.approx((float(exact.max()), float(exact.min())), rel=1e-5)
        np.testing.assert_allclose(layer.lost, 1 - np.array(layer.eigenvalues), atol=2e-6)


@pytest.mark.parametrize("model_type", ["zamba", "zamba2", "bamba", "falcon_h1"])
def test_hybrid_models_show_the_steps_of_every_scaled_layer(model_type: str, tmp_path: Path) -> None:
    stock = tiny_stock(model_type, tmp_path)
    with stock.recurrence:
        steps = mean_steps(stock, random_tokens(1, 24), QUIET, model_type)
        layers = measure_spectrum(stock, random_tokens(1, 24), QUIET, model_type)
    assert steps.keys() == stock.mixers.keys()
    assert all(0 < layer.eigenvalues[-1] <= layer.eigenvalues[0] < 1 for layer in layers)


def test_gated_delta_rules_show_decay_rates_alone(tmp_path: Path) -> None:
    stock = tiny_stock("qwen3_5_text", tmp_path)
    with stock.recurrence:
        layers = measure_spectrum(stock, random_tokens(1, 24), QUIET, "qwen3_5_text")
    assert all(layer.decay_rates and not layer.eigenvalues and layer.mean_step is None for layer in layers)
    record = {"task": "spectrum", "models": [{"model": "m", "layers": [vars(layer) for layer in layers]}]}
    assert [picture.path for picture in draw_pictures(record)] == [
        "spectrum.png",
        "spectrum-unit.png",
        "decay-rates.png",
    ]
