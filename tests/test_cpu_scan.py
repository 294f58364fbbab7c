"""The compiled selective scan against the recurrence written out in float64: state, trace and gradients, too."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mamba import modeling_mamba

from calibrator.cpu_scan import STRIDE, selective_scan

NAMES = ("u", "delta", "A_log", "B", "C", "h")


def draw(batch: int, channels: int, states: int, length: int, seed: int) -> dict[str, Tensor]:
    """Arguments of the scan with A_log in place of A, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "u": (batch, channels, length),
        "delta": (batch, channels, length),
        "A_log": (channels, states),
        "B": (batch, length, states),
        "C": (batch, length, states),
        "h": (batch, channels, states),
    }
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["delta"] = torch.nn.functional.softplus(drawn["delta"] - 2)
    return drawn


def reference(u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 2a and 2b of Mamba, one token after the other."""
    A, rows = -torch.exp(A_log), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, t] * u[:, :, t, None]
        rows.append((h * C[:, None, t]).sum(-1))
    return torch.stack(rows, dim=-1), h


def compiled(arguments: dict[str, Tensor], trace: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The scan in float32."""
    u, delta, A_log, B, C, h = (arguments[name].float() for name in NAMES)
    return selective_scan(u, delta, -torch.exp(A_log), B, C, h, trace)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    size = expected.abs().max()
    assert (found.double() - expected).abs().max() <= tolerance * size + 1e-12


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 17),
    st.integers(1, 3 * STRIDE + 1),
    st.integers(0, 2**31),
)
def test_scan_is_the_recurrence(batch: int, channels: int, states: int, length: int, seed: int) -> None:
    arguments = draw(batch, channels, states, length, seed)
    y, h = reference(**arguments)
    found_y, found_h, trace = compiled(arguments)
    assert_close(found_y, y, 5e-6)
    assert_close(found_h, h, 5e-6)
    assert trace.numel() == 0


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3 * STRIDE), st.integers(1, 3 * STRIDE), st.integers(0, 2**31))
def test_pieces_that_carry_their_state_are_one_scan(first: int, second: int, seed: int) -> None:
    arguments = draw(2, 3, 4, first + second, seed)
    y, h = reference(**arguments)
    pieces, state = [], arguments["h"]
    for start, end in ((0, first), (first, first + second)):
        part = {name: arguments[name][..., start:end] for name in ("u", "delta")}
        part |= {name: arguments[name][:, start:end] for name in ("B", "C")}
        piece, state, _ = compiled(arguments | part | {"h": state})
        pieces.append(piece)
    assert_close(torch.cat(pieces, dim=-1), y, 5e-6)
    assert_close(state, h, 5e-6)


@pytest.mark.parametrize("length", [1, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE + 7])
def test_gradients_are_those_of_the_recurrence(length: int) -> None:
    arguments = draw(2, 3, 4, length, seed=length)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).double() for shape in ((2, 3, length), (2, 3, 4))]
    exact = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    sum((out * weight).sum() for out, weight in zip(reference(**exact), weights, strict=True)).backward()
    rough = {name: value.float().requires_grad_() for name, value in arguments.items()}
    y, h, _ = compiled(rough)
    sum((out * weight).sum() for out, weight in zip((y, h), weights, strict=True)).backward()
    for name in NAMES:
        gradient, expected = rough[name].grad, exact[name].grad
        assert gradient is not None and expected is not None
        assert_close(gradient, expected, 1e-5)


def test_trace_is_the_derivative_of_the_state_by_A_log() -> None:
    arguments = draw(2, 3, 4, 100, seed=2)
    first = {name: value[..., :60] for name, value in arguments.items() if name in ("u", "delta")}
    first |= {name: arguments[name][:, :60] for name in ("B", "C")}
    rest = {name: value[..., 60:] for name, value in arguments.items() if name in ("u", "delta")}
    rest |= {name: arguments[name][:, 60:] for name in ("B", "C")}
    zeros = torch.zeros(2, 3, 4)
    _, state, trace = compiled(arguments | first | {"h": zeros}, zeros)
    _, _, trace = compiled(arguments | rest | {"h": state}, trace)
    # Each row of the batch has its own state, so each is differentiated by itself.
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in arguments.items() if name != "A_log"}
        A_log = arguments["A_log"].clone().requires_grad_()
        _, h = reference(**one | {"A_log": A_log, "h": zeros[:1].double()})
        h.sum().backward()
        assert A_log.grad is not None
        assert_close(trace[row], A_log.grad, 1e-5)


def test_scan_is_the_stock_one() -> None:
    stock = inspect.unwrap(modeling_mamba.mamba_selective_scan)
    arguments = {name: value.float() for name, value in draw(2, 6, 16, 150, seed=4).items()}
    u, delta, A_log, B, C, _ = arguments.values()
    A = -torch.exp(A_log)
    y, h = stock(u, delta, A, B.transpose(1, 2), C.transpose(1, 2), return_last_state=True)
    found_y, found_h, _ = selective_scan(u, delta, A, B, C, torch.zeros_like(h))
    assert_close(found_y, y.double())
    assert_close(found_h, h.double())


def test_decay_is_the_exponential_over_its_whole_range() -> None:
    exponents = np.concatenate([np.linspace(-100, 0, 4001), [-1e-7, -1e-30, -1e6]]).astype(np.float32)
    one = torch.ones(1, len(exponents), 1)
    _, h, _ = selective_scan(
        torch.zeros(1, len(exponents), 1),
        one,
        torch.from_numpy(exponents)[:, None],
        torch.zeros(1, 1, 1),
        torch.zeros(1, 1, 1),
        one,
    )
    expected = np.exp(exponents.astype(np.float64))
    # The rounding of a float32 exponent x moves exp(x) by up to |x| · 2^-24 of itself.
    tolerance = (2.5e-7 + 1.2e-7 * np.abs(exponents)) * expected + 2e-38
    assert (np.abs(h.flatten().numpy() - expected) <= tolerance).all()


def test_scan_has_as_many_threads_as_torch() -> None:
    """More threads than free processors spin: 40 times the time on a busy machine."""
    program = (
        "import calibrator.cpu_scan, numba, torch as t; print(numba.config.NUMBA_NUM_THREADS, t.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "1"], done.stderr
