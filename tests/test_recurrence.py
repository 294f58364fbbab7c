"""The recurrences of stock models in pieces: equal to one pass, forward and backward, on every path."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from calibrator.carried_state import CarriedState, State
from calibrator.kernels import kernel_functions
from calibrator.recurrence import Recurrence
from calibrator.scaling import Scaling
from converter.errors import CalibrationError
from tests.stock_models import stock_model
from tests.tiny_models import SETTINGS, VOCABULARY, tiny_model

LENGTH, PIECE = 90, 30
PATHS = ("mamba", "falcon_mamba", "mamba2", "mamba with kernels", "falcon_mamba with kernels")
PATHS += ("mamba2 with kernels", "mamba2 with the fused kernel", "mamba with the fused kernel")
PLAIN_SELECTIVE = {name: inspect.unwrap(function) for name, function in kernel_functions(modeling_mamba).items()}
PLAIN = {name: inspect.unwrap(function) for name, function in kernel_functions(modeling_mamba2).items()}


def mixers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name of each A_log to the module that holds it."""
    return {f"{name}.A_log": module for name, module in model.named_modules() if "A_log" in module._parameters}


def fused_mixer(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    headdim: int = 0,
    ngroups: int = 1,
    **_: Any,
) -> Any:
    """What mamba-ssm's kernel of this signature computes, put together from stock transformers' plain functions."""
    heads, channels = dt_bias.shape[0], conv1d_weight.shape[0]
    d_inner = heads * headdim
    gate, xBC, dt = zxbcdt.split([d_inner, channels, heads], dim=-1)
    xBC = PLAIN["causal_conv1d_fn"](xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation).transpose(1, 2)
    x, B, C = xBC.split([d_inner, (channels - d_inner) // 2, (channels - d_inner) // 2], dim=-1)
    y, state = PLAIN["mamba2_chunk_scan"](
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        initial_states=initial_states,
        return_final_states=True,
    )
    gated = y.flatten(2) * functional.silu(gate)
    variance = gated.unflatten(-1, (ngroups, -1)).pow(2).mean(-1, keepdim=True)
    normed = (gated.unflatten(-1, (ngroups, -1)) * torch.rsqrt(variance + rmsnorm_eps)).flatten(2)
    out = normed * rmsnorm_weight
    return (out, state) if return_final_states else out


def fused_selective_mixer(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    _out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What mamba-ssm's ``mamba_inner_fn`` computes, put together from stock transformers' plain functions."""
    x, z = xz.chunk(2, dim=1)
    x = PLAIN_SELECTIVE["causal_conv1d_fn"](x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    dt, B, C = functional.linear(x.transpose(1, 2), x_proj_weight).split([rank, states, states], dim=-1)
    delta = delta_proj_weight @ dt.transpose(1, 2)
    y = PLAIN_SELECTIVE["mamba_selective_scan"](
        x, delta, A, B.transpose(1, 2), C.transpose(1, 2), D=D, z=z, delta_bias=delta_bias, delta_softplus=True
    )
    return functional.linear(y.transpose(1, 2), out_proj_weight)


@contextmanager
def running(path: str, layers: int) -> Iterator[tuple[PreTrainedModel, Recurrence]]:
    """A model of ``layers`` layers whose state counts, and its recurrences open on one path."""
    model_type, _, kernels = path.partition(" with ")
    settings = SETTINGS[model_type] | {"num_hidden_layers": layers}
    with patch.dict(SETTINGS, {model_type: settings}):
        model = tiny_model(model_type).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.fill_(-4.0)
        elif parameter.ndim > 1 and not name.endswith("A_log"):
            parameter.mul_(4.0)
    stand_ins = {
        "mamba2": (modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused_mixer),
        "mamba": (modeling_mamba, "mamba_inner_fn", fused_selective_mixer),
    }
    with ExitStack() as stack:
        if "fused" in kernels:
            module, name, stand_in = stand_ins[model_type]
            stack.enter_context(
                patch.object(module, name, functools.wraps(inspect.unwrap(vars(module)[name]))(stand_in))
            )
        yield model, stack.enter_context(Recurrence(model, mixers_of(model), kernels=bool(kernels)))


def tokens() -> Tensor:
    """A text."""
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def scaling_of(model: PreTrainedModel) -> Scaling:
    mixers = mixers_of(model)
    A_log = {key: mixer.get_parameter("A_log").detach().float() for key, mixer in mixers.items()}
    return Scaling(mixers, A_log, "layer", "linear")


def hidden_states(model: PreTrainedModel, text: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(text, use_cache=False).last_hidden_state
    return hidden


def in_pieces(model: PreTrainedModel, recurrence: Recurrence, text: Tensor) -> tuple[Tensor, State]:
    """Hidden states of a text in pieces, and the state after it."""
    state: State | None = None
    pieces = []
    for piece in text.split(PIECE, dim=1):
        with recurrence.carried(state) as state:
            pieces.append(hidden_states(model, piece))
    assert state is not None
    return torch.cat(pieces, dim=1), state


@pytest.mark.parametrize("path", PATHS)
def test_pieces_give_what_one_pass_gives(path: str) -> None:
    with running(path, 2) as (model, recurrence), torch.no_grad():
        whole = hidden_states(model, tokens())
        pieces, state = in_pieces(model, recurrence, tokens())
        alone = torch.cat([hidden_states(model, piece) for piece in tokens().split(PIECE, dim=1)], dim=1)
    assert (whole - pieces).abs().max() < 1e-5 * whole.abs().max()
    assert (whole - alone).abs().max() > 1e-2 * whole.abs().max()
    assert all(carried.trace is None for carried in state.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rerun", [False, True])
def test_trace_brings_the_gradient_of_the_past_within_a_layer(path: str, rerun: bool) -> None:
    with running(path, 1) as (model, recurrence), scaling_of(model) as scaling:
        weight = torch.randn(2, PIECE, 64, generator=torch.Generator().manual_seed(4))
        (hidden_states(model, tokens())[:, -PIECE:] * weight).sum().backward()
        expected = scaling.parameters()[0].grad
        scaling.parameters()[0].grad = None

        *past, last = tokens().split(PIECE, dim=1)
        state: State | None = None
        for piece in past:
            with recurrence.carried(state) as state:
                hidden_states(model, piece)
        alone: Callable[[Tensor], Tensor] = lambda piece: hidden_states(model, piece)  # noqa: E731
        with recurrence.carried(state) as after:
            hidden = checkpoint(alone, last, use_reentrant=False) if rerun else alone(last)
            (hidden * weight).sum().backward()
        found = scaling.parameters()[0].grad
        with recurrence.carried(None):
            scaling.parameters()[0].grad = None
            (alone(last) * weight).sum().backward()
        without = scaling.parameters()[0].grad
    assert expected is not None and found is not None and without is not None
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()
    assert all(carried.trace is not None for carried in after.values())


def test_a_state_from_other_factors_is_moved_by_its_trace() -> None:
    """To first order, a state of the old factors and its trace give the state of the new ones."""
    with running("mamba with kernels", 1) as (model, recurrence), scaling_of(model) as scaling:
        before, after = tokens().split([60, 30], dim=1)
        with recurrence.carried(None) as state:
            hidden_states(model, before)
        with torch.no_grad():
            scaling.parameters()[0].add_(0.01)
        with recurrence.carried(state), torch.no_grad():
            moved = hidden_states(model, after)
        unmoved_state = {
            key: CarriedState(carried.inputs, carried.state, None, carried.A_log) for key, carried in state.items()
        }
        with recurrence.carried(unmoved_state), torch.no_grad():
            unmoved = hidden_states(model, after)
        with torch.no_grad():
            exact = hidden_states(model, tokens())[:, 60:]
    assert (moved - exact).abs().max() < 0.1 * (unmoved - exact).abs().max()


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_open_recurrences_change_no_result(model_type: str) -> None:
    model = tiny_model(model_type)
    text = tokens()[:, :40]
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    before = [dict(vars(module)) for module in modules]
    with torch.no_grad():
        stock = model(text, use_cache=False).logits
        with Recurrence(model, mixers_of(model)):
            assert [dict(vars(module)) for module in modules] != before
            ours = model(text, use_cache=False).logits
        again = model(text, use_cache=False).logits
    assert [dict(vars(module)) for module in modules] == before
    assert (ours - stock).abs().max() < 1e-5 * stock.abs().max()
    assert torch.equal(again, stock)


def test_without_a_compiler_mamba_1_is_refused_on_cpu_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "calibrator.cpu_scan", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with stock_model("mamba2").recurrence:
        pass
    with pytest.raises(CalibrationError, match="numba") as caught, stock_model("mamba").recurrence:
        pass
    assert caught.value.fix == "Install it: pip install numba"


def test_a_modeling_file_whose_scans_are_not_found_is_refused() -> None:
    model = tiny_model("mamba2")
    with ExitStack() as stack:
        for name, plain in PLAIN.items():
            stack.enter_context(patch.object(modeling_mamba2, name, plain))
        with (
            pytest.raises(CalibrationError, match="modeling_mamba2 are not found"),
            Recurrence(model, mixers_of(model)),
        ):
            pass
