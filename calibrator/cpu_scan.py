"""A selective scan for the CPU, compiled by numba: the one kernel that stock transformers lacks there.

Stock code walks the sequence in Python and keeps every state for the backward pass, which grows out of reach at
a thousand tokens. This scan walks it in compiled code, keeps one state in ``STRIDE`` and recomputes the others.
It also carries a state, and the derivative of that state, from one piece of a text to the next.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t        (Mamba, equations 2a and 2b)

Shapes: u, Δ (batch, channels, length); A (channels, states); B, C (batch, length, states); h (batch, channels,
states). All float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converter.errors import CalibrationError, boundary

# Read by numba at its import: as many threads as torch has, which OMP_NUM_THREADS sets. More than there are free
# processors wait for each other in loops that take all their time.
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

STRIDE = 64
_REINSTALL = "Install numba again, in a version that fits Python and NumPy: pip install --upgrade numba"


class _compiled:
    """Compile a function, with numba's cache if that works: it may be read-only, full or damaged."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._code: Any = None

    def __call__(self, *arrays: np.ndarray) -> None:
        if self._code is not None:
            self._code(*arrays)
            return
        # Without a home, numba would make a folder named "~" here.
        has_place = "NUMBA_CACHE_DIR" in os.environ or os.path.expanduser("~") != "~"
        try:
            self._code = numba.njit(parallel=True, fastmath=True, cache=has_place)(self._function)
            # The cache is used by the first call, which compiles before it touches an array.
            self._code(*arrays)
        except Exception:
            self._code = numba.njit(parallel=True, fastmath=True)(self._function)
            with boundary("numba cannot compile the scan of Mamba-1 for this CPU", CalibrationError, _REINSTALL):
                self._code(*arrays)


@intrinsic
def _float_of_bits(_typing: Any, bits: Any) -> Any:
    """Read an int32 as the float32 with the same bits (LLVM's bitcast, which vectorises)."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@numba.njit(fastmath=True, inline="always")
def _decay(x: Any) -> Any:
    """exp(x) for x <= 0, to 2 + |x| units in the last place of float32, without a branch so that it vectorises.

    2^f on [-0.5, 0.5] is a polynomial of degree 6 (Taylor's coefficients of ln 2, error 1.2e-8).
    """
    y = max(x * np.float32(1.4426950408889634), np.float32(-126.0))
    whole = np.int32(y - np.float32(0.5))
    f = y - np.float32(whole)
    p = np.float32(1.5403530393381608e-4)
    p = p * f + np.float32(1.3333558146428443e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + np.float32(1.0)
    return p * _float_of_bits(np.int32((whole + np.int32(127)) << np.int32(23)))  # type: ignore[call-arg]


@_compiled
def _forward(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    h: np.ndarray,
    e: np.ndarray,
    y: np.ndarray,
    kept: np.ndarray,
) -> None:
    """Scan forward; ``h`` and ``e`` are the states at the start and become those at the end.

    ``e`` (batch, channels, states) is dh/dA_log of each eigenvalue's own past; of size 0 it is not computed.
    ``kept`` (batch, channels, ceil(length / STRIDE), states) takes the state before every stretch; of size 0
    nothing is kept.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    for row in numba.prange(batch * channels):
        b = row // channels
        d = row - b * channels
        state = h[b, d].copy()
        for t in range(length):
            if kept.size and t % STRIDE == 0:
                kept[b, d, t // STRIDE] = state
            step = delta[b, d, t]
            drive = step * u[b, d, t]
            out = np.float32(0.0)
            if e.size:
                for n in range(states):
                    exponent = step * A[d, n]
                    decay = _decay(exponent)
                    e[b, d, n] = decay * (e[b, d, n] + exponent * state[n])
                    state[n] = decay * state[n] + drive * B[b, t, n]
                    out += C[b, t, n] * state[n]
            else:
                for n in range(states):
                    state[n] = _decay(step * A[d, n]) * state[n] + drive * B[b, t, n]
                    out += C[b, t, n] * state[n]
            y[b, d, t] = out
        h[b, d] = state


@_compiled
def _backward(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    kept: np.ndarray,
    grad_y: np.ndarray,
    grad_h: np.ndarray,
    grad_u: np.ndarray,
    grad_delta: np.ndarray,
    grad_A: np.ndarray,
    grad_B: np.ndarray,
    grad_C: np.ndarray,
) -> None:
    """Scan backward; ``grad_h`` is the gradient at the final state and becomes that at the initial one.

    ``grad_A`` (batch, channels, states); ``grad_B`` and ``grad_C`` (groups, batch, length, states), one copy for
    each group of channels that a thread walks, to be summed by the caller.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    groups = grad_B.shape[0]
    for item in numba.prange(batch * groups):
        b = item // groups
        g = item - b * groups
        decays = np.empty((STRIDE, states), np.float32)
        past = np.empty((STRIDE + 1, states), np.float32)
        for d in range(g * channels // groups, (g + 1) * channels // groups):
            carry = grad_h[b, d].copy()
            total = np.zeros(states, np.float32)
            for stretch in range(kept.shape[2] - 1, -1, -1):
                start = stretch * STRIDE
                size = min(STRIDE, length - start)
                past[0] = kept[b, d, stretch]
                for i in range(size):
                    step = delta[b, d, start + i]
                    drive = step * u[b, d, start + i]
                    for n in range(states):
                        decay = _decay(step * A[d, n])
                        decays[i, n] = decay
                        past[i + 1, n] = decay * past[i, n] + drive * B[b, start + i, n]
                for i in range(size - 1, -1, -1):
                    t = start + i
                    step = delta[b, d, t]
                    value = u[b, d, t]
                    out = grad_y[b, d, t]
                    from_B = np.float32(0.0)
                    from_A = np.float32(0.0)
                    for n in range(states):
                        carry[n] += out * C[b, t, n]
                        grad_C[g, b, t, n] += out * past[i + 1, n]
                        grad_B[g, b, t, n] += carry[n] * step * value
                        from_B += carry[n] * B[b, t, n]
                        carry[n] *= decays[i, n]
                        through = carry[n] * past[i, n]
                        from_A += through * A[d, n]
                        total[n] += through * step
                    grad_u[b, d, t] = from_B * step
                    grad_delta[b, d, t] = from_B * value + from_A
            grad_A[b, d] = total
            grad_h[b, d] = carry


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, trace: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, delta, A, B, C = (x.detach().contiguous() for x in (u, delta, A, B, C))
        batch, channels, length = u.shape
        end = h.detach().clone(memory_format=torch.contiguous_format)
        end_trace = u.new_empty(0, 0, 0) if trace is None else trace.detach().clone()
        stretches = -(-length // STRIDE) if any(ctx.needs_input_grad) else 0
        kept = u.new_empty(batch, channels, stretches, A.shape[1])
        y = torch.empty_like(u)
        _forward(*(x.numpy() for x in (u, delta, A, B, C, end, end_trace, y, kept)))
        ctx.save_for_backward(u, delta, A, B, C, kept)
        ctx.mark_non_differentiable(end_trace)
        return y, end, end_trace

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_end, _ = grads
        u, delta, A, B, C, kept = ctx.saved_tensors
        batch, channels, _ = u.shape
        grad_h = u.new_zeros(batch, channels, A.shape[1]) if grad_end is None else grad_end.clone().contiguous()
        grad_y = torch.zeros_like(u) if grad_y is None else grad_y.contiguous()
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_A = u.new_empty(batch, *A.shape)
        groups = min(numba.get_num_threads(), channels)
        grad_B, grad_C = (u.new_zeros(groups, *B.shape) for _ in range(2))
        arrays = (u, delta, A, B, C, kept, grad_y, grad_h, grad_u, grad_delta, grad_A, grad_B, grad_C)
        _backward(*(x.numpy() for x in arrays))
        return grad_u, grad_delta, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_h, None


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, trace: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan from state ``h``, differentiable in every argument but ``trace``.

    Args:
        u, delta: (batch, channels, length); delta after its softplus.
        A: (channels, states), negative.
        B, C: (batch, length, states).
        h: (batch, channels, states), the state before the first token.
        trace: (batch, channels, states), dh/dA_log at the start, or None if it is not wanted.

    Returns:
        y (batch, channels, length), the final state, and its trace (empty if it was not wanted).
    """
    result: tuple[Tensor, Tensor, Tensor] = _SelectiveScan.apply(u, delta, A, B, C, h, trace)
    return result
