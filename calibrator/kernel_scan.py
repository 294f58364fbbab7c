"""A state put into, and its trace read out of, the selective-scan kernel, which can only start from zero.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t        (Mamba, equations 2a and 2b)

One token a state, put before the text, writes the state: its B selects the state and its u carries the value.
The trace dh/dA needs no backward pass: with S the sum of Δ and S_t its part up to t, it is the final state of the
same scan over the inputs (S - S_t) u_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Δ of the tokens that write the state: a power of two, so that dividing by it is exact, and so small that the
# states written first hardly decay until the last is written; what they decay is made up for.
TICK = 2.0**-20

Kernel = Callable[..., Any]


def selective_scan(
    kernel: Kernel,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    trace: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the scan from state ``h``, differentiable in every argument but ``trace``.

    It is in float32 throughout: a state written in less would lose most of its digits.

    Args:
        kernel: ``selective_scan_fn`` of mamba-ssm 2.3, or stock transformers' plain torch function of the same
            arguments.
        u, delta: (batch, channels, length); delta after its softplus, float32.
        A: (channels, states), negative.
        B, C: (batch, states, length).
        h: (batch, channels, states), the state before the first token.
        trace: (batch, channels, states), dh/dA_log at the start, or None if it is not wanted.
        D, z: (channels,), and (batch, channels, length): y becomes (y + D u) silu(z).

    Returns:
        y (batch, channels, length), and the final state and its trace, these two detached.
    """
    u, B, C = u.float(), B.float(), C.float()
    states = A.shape[1]
    ticks_left = torch.arange(states - 1, -1, -1, device=u.device, dtype=u.dtype)
    writes = h * torch.exp(-A * (TICK * ticks_left)) / TICK
    select = torch.eye(states, device=u.device, dtype=u.dtype).expand(u.shape[0], -1, -1)
    y, end = kernel(
        torch.cat([writes, u], dim=-1),
        torch.cat([torch.full_like(writes, TICK), delta], dim=-1),
        A,
        torch.cat([select, B], dim=-1),
        torch.cat([torch.zeros_like(select), C], dim=-1),
        D=D,
        z=None if z is None else torch.cat([torch.zeros_like(writes), z.float()], dim=-1),
        return_last_state=True,
    )
    # The kernel's final state is a view of all that it keeps for its backward pass.
    end = end.detach().clone()
    return y[..., states:], end, None if trace is None else _final_trace(kernel, u, delta, A, B, C, h, trace)


@torch.no_grad()
def _final_trace(
    kernel: Kernel, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, trace: Tensor
) -> Tensor:
    """dh/dA_log of each eigenvalue at the end of a piece, through its own layer's past, shaped as ``trace``."""
    to_end = delta.flip(-1).cumsum(-1).flip(-1)
    _, by_A = kernel(u * (to_end - delta), delta, A, B, C, return_last_state=True)
    exponent = A * to_end[..., :1]
    return A * by_A + exponent.exp() * (exponent * h + trace)
