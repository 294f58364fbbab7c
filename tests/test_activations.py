"""What layers keep for the backward pass: the same gradients under every plan; a way on when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrator.activations import Activations, LayerPlan, Need, checkpointed
from calibrator.loss import window_losses
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.weight_stream import MemoryMode
from converter.errors import CalibrationError, UsageError
from tests.stock_models import RememberingReporter, layer_scaling, stock_model
from tests.tiny_models import VOCABULARY


def windows() -> Tensor:
    return torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))


def gradients(stock: StockModel, scaling: Scaling, mode: MemoryMode) -> list[Tensor]:
    """The gradients of a short window after those of a piece that starts from a state."""
    parameters = scaling.parameters()
    for parameter in parameters:
        parameter.grad = None
    activations = Activations(stock, parameters, mode, RememberingReporter())
    first, second = windows().split(20, dim=1)
    with torch.no_grad(), stock.recurrence.carried(None) as state:
        stock.hidden_states(first)
    within = partial(stock.recurrence.carried, state)
    activations.backward(second.numel(), lambda: window_losses(stock, second).mean(), within)
    activations.backward(second.numel(), lambda: window_losses(stock, first).mean())
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "zamba", "bamba", "qwen3_next"])
def test_layers_that_run_twice_give_the_same_gradients(model_type: str) -> None:
    stock = stock_model(model_type)
    with layer_scaling(stock) as scaling, stock.recurrence:
        kept, twice, chosen = (gradients(stock, scaling, mode) for mode in ("keep", "checkpoint", "auto"))
    assert len(kept) == len(stock.mixers)
    for expected, *others in zip(kept, twice, chosen, strict=True):
        assert expected.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("model_type", ["mamba2", "zamba", "zamba2"])
def test_a_layer_inside_a_layer_runs_no_third_time(model_type: str) -> None:
    stock = stock_model(model_type)
    calls = dict.fromkeys(stock.mixers, 0)

    def count(key: str, *_: object) -> None:
        calls[key] += 1

    for key, mixer in stock.mixers.items():
        mixer.register_forward_pre_hook(partial(count, key))
    with layer_scaling(stock), stock.recurrence, checkpointed(stock):
        window_losses(stock, windows()).mean().backward()
    assert set(calls.values()) == {2}


def failing(times: int, loss: Callable[[], Tensor], scaling: Scaling) -> Callable[[], Tensor]:
    """A loss that runs out of memory some times, each time after it has left a gradient behind."""
    left = [times]

    def run() -> Tensor:
        value = loss()
        if left[0]:
            left[0] -= 1
            value.backward()  # type: ignore[no-untyped-call]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")
        return value

    return run


def test_running_out_of_memory_lowers_the_plan_and_goes_on() -> None:
    stock = stock_model("mamba2")
    reporter = RememberingReporter()
    with layer_scaling(stock) as scaling, stock.recurrence:
        expected = gradients(stock, scaling, "keep")
        for parameter in scaling.parameters():
            parameter.grad = None
        activations = Activations(stock, scaling.parameters(), "keep", reporter)
        first, second = windows().split(20, dim=1)
        with torch.no_grad(), stock.recurrence.carried(None) as state:
            stock.hidden_states(first)
        loss = failing(2, lambda: window_losses(stock, second).mean(), scaling)
        activations.backward(40, loss, partial(stock.recurrence.carried, state))
        activations.backward(40, lambda: window_losses(stock, first).mean())
        found = [parameter.grad for parameter in scaling.parameters()]
        assert len(reporter.warnings) == 2
        assert "of 2 layers 2 run twice" in reporter.warnings[-1]
        for gradient, wanted in zip(found, expected, strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-9)
        with pytest.raises(CalibrationError, match="Tried to allocate 2 GiB") as caught:
            activations.backward(40, failing(99, lambda: window_losses(stock, first).mean(), scaling))
        assert "--target-len" in caught.value.fix
    assert not any(layer.training for layer in stock.model.modules())


def test_offload_without_a_gpu_is_refused() -> None:
    stock = stock_model("mamba2")
    with pytest.raises(UsageError, match="offload"):
        Activations(stock, [], "offload", RememberingReporter())


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 100))
def test_lowering_a_plan_ends_with_all_inputs_on_the_host(kept: int, on_host: int, layers: int) -> None:
    plan: LayerPlan | None = LayerPlan(layers, min(kept, layers), min(on_host, layers))
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = plan.lower()
    assert len(seen) == len(set(seen)) < 20
    assert (seen[-1].kept, seen[-1].on_host) == (0, layers)


@given(
    layers=st.integers(1, 80),
    kept=st.integers(0, 3),
    input_bytes=st.integers(1, 1000),
    extra=st.integers(1, 9000),
    work=st.integers(0, 100_000),
    budget=st.integers(1, 500_000),
)
def test_the_best_plan_fits_and_a_better_one_would_not(
    layers: int, kept: int, input_bytes: int, extra: int, work: int, budget: int
) -> None:
    def peak(plan: LayerPlan) -> int:
        # The layer whose gradient runs has all its activations, whether they were kept or are made again.
        return work + (plan.layers - plan.on_host) * input_bytes + max(1, plan.kept) * extra

    measured = LayerPlan(layers, min(kept, layers), 0)
    need = Need(measured, peak(measured), input_bytes, input_bytes + extra)
    best = need.best_plan(budget)
    assert peak(best) <= budget or best == LayerPlan(layers, 0, layers)
    if best.on_host:
        assert peak(LayerPlan(layers, 0, best.on_host - 1)) > budget
    elif best.kept < layers:
        assert peak(LayerPlan(layers, best.kept + 1, 0)) > budget
    assert Need(best, peak(best), input_bytes, input_bytes + extra).best_plan(budget) == best
