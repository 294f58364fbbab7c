"""A few steps of gradient calibration on every architecture of stock transformers that has an A_log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibrator.calibration import calibrate, prepare_calibration
from calibrator.methods import METHODS
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text
from tests.measured_models import random_tokens
from tests.small_checkpoints import is_identity
from tests.stock_models import RememberingReporter, stock_model
from tests.test_architectures import with_strong_decay
from tests.tiny_models import SETTINGS

TEXT = Text("text", (random_tokens(1, 600)[0],))


def strong_stock(model_type: str) -> StockModel:
    stock = stock_model(model_type)
    with_strong_decay(stock.model)
    return stock


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_gradients_move_every_layers_factors(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stock = strong_stock(model_type)
    granularity = METHODS["gradient"].granularity(tuple(next(iter(stock.A_log.values())).shape))
    settings = Settings(
        "gradient", granularity, "linear", 16, 64, max_short_loss=10.0, steps=3, validations=3, short_windows=2
    )
    weights = {name: value.clone() for name, value in stock.model.state_dict().items()}
    problem = prepare_calibration(stock, [TEXT], settings, RememberingReporter(), "commit")
    outcome = calibrate(problem)
    assert [entry["step"] for entry in outcome.record.history] == [0, 1, 2, 3]
    moved = problem.scaling.scale_set().log_s
    assert moved.keys() == stock.A_log.keys()
    assert all((abs(values) > 1e-4).any() for values in moved.values())
    # Random text through a random model: the loss may rise, and then the unscaled model is kept.
    objectives = [candidate.objective for candidate in problem.validation.candidates]
    assert outcome.record.kept_step == objectives.index(min(objectives))
    assert is_identity(outcome.scales) == (outcome.record.kept_step == 0)
    after = stock.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_gradient_is_the_slope_of_what_the_mixer_puts_out(model_type: str) -> None:
    stock = strong_stock(model_type)
    tokens, width = random_tokens(2, 40), 0.01
    mixer = next(iter(stock.mixers.values()))
    outputs: list[torch.Tensor] = []
    mixer.register_forward_hook(lambda *args: outputs.append(args[2][0] if isinstance(args[2], tuple) else args[2]))

    def weighed() -> torch.Tensor:
        outputs.clear()
        stock.hidden_states(tokens)
        weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(6))
        return (outputs[0] * weight).double().sum()

    with Scaling(stock.mixers, stock.A_log, "layer", "linear") as scaling, stock.recurrence:
        factor = scaling.parameters()[0]
        weighed().backward()
        slope = float(factor.grad)
        values = []
        for side in (1, -1):
            with torch.no_grad():
                factor.fill_(side * width)
                values.append(float(weighed()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * width), rel=0.01)
    assert abs(slope) > 1e-2
