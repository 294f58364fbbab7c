"""The scales on a running model: what is calibrated is what is baked, for every shape of A_log and both targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrator.model import StockModel
from calibrator.scaling import Scaling
from converter.scales import FORMS, Form, Granularity, ScaleSet, offered_granularities
from tests.measured_models import random_tokens
from tests.small_checkpoints import random_scales
from tests.stock_models import stock_model
from tests.test_architectures import with_strong_decay

# One architecture for each shape of A_log.
MODELS = ("mamba", "mamba2", "zamba", "kimi_linear")


def strong_stock(model_type: str) -> StockModel:
    """A tiny model whose decays matter: small changes of A move its logits."""
    stock = stock_model(model_type)
    with_strong_decay(stock.model)
    return stock


def logits(stock: StockModel, length: int = 24) -> Tensor:
    with torch.no_grad(), stock.recurrence:
        return stock.logits(stock.hidden_states(random_tokens(1, length)))


def scales_for(stock: StockModel, granularity: Granularity, form: Form = "linear") -> ScaleSet:
    return random_scales({key: tuple(value.shape) for key, value in stock.A_log.items()}, granularity, form)


CASES = [
    (name, granularity, form)
    for name in MODELS
    for granularity in offered_granularities(tuple(next(iter(stock_model(name).A_log.values())).shape))
    for form in FORMS
]


@pytest.mark.parametrize(("model_type", "granularity", "form"), CASES)
def test_scaled_model_is_the_baked_model(model_type: str, granularity: Granularity, form: Form) -> None:
    stock = strong_stock(model_type)
    unscaled = logits(stock)
    scales = scales_for(stock, granularity, form)
    scaling = Scaling(stock.mixers, stock.A_log, granularity, form)
    with scaling:
        scaling.load(scales)
        scaled = logits(stock)
        for key, values in scaling.scale_set().log_s.items():
            np.testing.assert_array_equal(values, scales.log_s[key])
    assert torch.equal(logits(stock), unscaled)
    for key, mixer in stock.mixers.items():
        baked = torch.from_numpy(scales.bake(key, stock.A_log[key].numpy()))
        mixer.get_parameter("A_log").copy_(baked)
    assert (scaled - unscaled).abs().max() > 1e-2 * unscaled.abs().max()
    assert (logits(stock) - scaled).abs().max() < 1e-5 * scaled.abs().max()


def test_factors_move_only_by_their_gradients() -> None:
    stock = strong_stock("mamba2")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling, stock.recurrence:
        stock.logits(stock.hidden_states(random_tokens(1, 24))).square().mean().backward()
        gradients = [parameter.grad for parameter in scaling.parameters()]
    assert all(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients)
    assert all(parameter.grad is None for parameter in stock.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_candidates_are_rounded_as_stock_transformers_rounds_a_loaded_model(dtype: torch.dtype) -> None:
    stock = strong_stock("mamba2")
    scales = scales_for(stock, "head")
    with Scaling(stock.mixers, stock.A_log, "head", "linear") as scaling:
        scaling.load(scales)
        exact = {key: mixer.A_log.clone() for key, mixer in stock.mixers.items()}
        with scaling.rounded(dtype):
            for key, mixer in stock.mixers.items():
                assert mixer.A_log.dtype == torch.float32
                assert torch.equal(mixer.A_log, exact[key].to(dtype).float())
                assert not torch.equal(mixer.A_log, exact[key])
        assert all(torch.equal(mixer.A_log, exact[key]) for key, mixer in stock.mixers.items())
