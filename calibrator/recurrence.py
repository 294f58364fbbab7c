"""Steps into the recurrences of stock modules: a scan compiled for the CPU, a state carried on, other steps Δ.

Stock modeling files call their scan and convolution by module-level names, chosen once at import with no look at
the device. :class:`Recurrence` replaces those names while it is open, and puts them back. The stock modules
themselves, their weights and everything round the scan stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

SELECTIVE_SCAN = "mamba_selective_scan"
CHUNK_SCAN = "mamba2_chunk_scan"
CONVOLUTION = "causal_conv1d_fn"
CPU_CHUNK = 64


@dataclass(frozen=True)
class CarriedState:
    """What one layer hands from one piece of a text to the next; all detached.

    Attributes:
        inputs: (batch, channels, kernel - 1), the convolution's last inputs.
        state: the SSM state h, (batch, channels, states) or (batch, heads, head_dim, states).
        trace: dh/dA_log of each eigenvalue through its own layer's past, shaped as ``state``. The gradient of a
            later loss by A_log is that of the piece plus the gradient at the state times the trace, which is
            exact but for paths through other layers before the piece.
        A_log: the A_log that ``state`` was computed under.
    """

    inputs: Tensor
    state: Tensor
    trace: Tensor
    A_log: Tensor


State = Mapping[str, CarriedState]
Steps = Callable[[str, Tensor], Tensor]
"""Takes the name of an A_log and Δ (batch, length, channels or heads) after its softplus; returns the Δ to run."""


class Recurrence:
    """Runs the mixers of one model on compiled code, with or without a carried state.

    Args:
        mixers: name of an A_log tensor to the module that holds it.
    """

    def __init__(self, mixers: Mapping[str, nn.Module]) -> None:
        self._mixers = mixers
        self._modules = {sys.modules[inspect.unwrap(type(mixer).forward).__module__] for mixer in mixers.values()}
        self._device = next(next(iter(mixers.values())).parameters()).device
        self._stack = ExitStack()
        self._key = ""
        self._carrying = False
        self._before: State = {}
        self._after: dict[str, CarriedState] = {}
        self._inputs: dict[str, Tensor] = {}
        self._steps: Steps | None = None

    def __enter__(self) -> Recurrence:
        on_cpu = self._device.type == "cpu"
        for module in self._modules:
            for name in [name for name in vars(module) if _is_kernel(module, name)]:
                stock = getattr(module, name)
                replacement = stock.__wrapped__ if on_cpu else stock
                if name == SELECTIVE_SCAN and on_cpu:
                    replacement = self._selective_scan
                elif name == SELECTIVE_SCAN:
                    replacement = partial(self._stepped_scan, stock)
                elif name == CHUNK_SCAN:
                    replacement = partial(self._chunk_scan, replacement)
                elif name == CONVOLUTION:
                    replacement = partial(self._convolution, replacement)
                self._stack.enter_context(patch.object(module, name, replacement))
        for key, mixer in self._mixers.items():
            handle = mixer.register_forward_pre_hook(partial(self._enter_layer, key))
            self._stack.callback(handle.remove)
            chunk = getattr(mixer, "chunk_size", None)
            if on_cpu and isinstance(chunk, int):
                # The result does not depend on the chunk; stock code's cost on CPU grows with it.
                self._stack.enter_context(patch.object(mixer, "chunk_size", min(chunk, CPU_CHUNK)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def carried(self, before: State | None) -> Iterator[State]:
        """While open, forward (and backward) passes run one piece of a text from the state ``before`` it.

        Args:
            before: state of every layer at the end of the last piece; None or empty for the first.

        Yields:
            The state after the piece, filled in by the forward pass.
        """
        self._carrying, self._before, self._after, self._inputs = True, before or {}, {}, {}
        try:
            yield self._after
        finally:
            self._carrying = False

    @contextmanager
    def stepping(self, steps: Steps) -> Iterator[None]:
        """While open, the time step Δ of every layer passes through ``steps`` on its way to the scan."""
        self._steps = steps
        try:
            yield
        finally:
            self._steps = None

    def _enter_layer(self, key: str, _mixer: nn.Module, _args: Any) -> None:
        self._key = key

    def _convolution(
        self, stock: Callable[..., Tensor], x: Tensor, weight: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        if not self._carrying:
            return stock(x, weight, *args, **kw)
        kept = weight.shape[-1] - 1
        before = self._before.get(self._key)
        past = x.new_zeros(*x.shape[:-1], kept) if before is None else before.inputs
        x = torch.cat([past, x], dim=-1)
        self._inputs[self._key] = x[..., -kept:].detach()
        return stock(x, weight, *args, **kw)[..., kept:]

    def _initial_state(self, A_log: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The state before the piece, moved to today's A_log by its trace, which also carries the gradient."""
        before = self._before.get(self._key)
        if before is None:
            return like.new_zeros(shape, dtype=torch.float32)
        moved = (A_log - before.A_log).reshape(before.A_log.shape + (1,) * (before.state.dim() - 1 - A_log.dim()))
        return before.state + before.trace * moved

    def _keep(self, A_log: Tensor, state: Tensor, trace: Tensor) -> None:
        self._after[self._key] = CarriedState(
            self._inputs[self._key], state.detach(), trace.detach(), A_log.detach().clone()
        )

    def _selective_scan(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The stock function of this name (transformers 5.23, modeling_mamba.py) on the compiled scan."""
        from calibrator.cpu_scan import selective_scan

        dt = _discretised(dt, delta_bias, delta_softplus)
        if self._steps is not None:
            dt = self._steps(self._key, dt.transpose(1, 2)).transpose(1, 2)
        A_log = torch.log(-A)
        shape = (*u.shape[:2], A.shape[1])
        before = self._before.get(self._key) if self._carrying else None
        h = self._initial_state(A_log, shape, u) if self._carrying else u.new_zeros(shape, dtype=torch.float32)
        trace = (h.new_zeros(shape) if before is None else before.trace) if self._carrying else None
        y, state, trace = selective_scan(
            u.float(), dt, A, B.float().transpose(1, 2), C.float().transpose(1, 2), h, trace
        )
        if self._carrying:
            self._keep(A_log, state, trace)
        if D is not None:
            y = y + u * D[:, None]
        if z is not None:
            y = y * functional.silu(z)
        y = y.to(u.dtype)
        return (y, state) if return_last_state else y

    def _stepped_scan(
        self,
        stock: Callable[..., Any],
        u: Tensor,
        dt: Tensor,
        *args: Any,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **kw: Any,
    ) -> Any:
        """The kernel of this name, given other steps while :meth:`stepping` is open."""
        if self._steps is None:
            return stock(u, dt, *args, delta_bias=delta_bias, delta_softplus=delta_softplus, **kw)
        dt = _discretised(dt, delta_bias, delta_softplus)
        dt = self._steps(self._key, dt.transpose(1, 2)).transpose(1, 2)
        return stock(u, dt.to(u.dtype).contiguous(), *args, **kw)

    def _chunk_scan(
        self, stock: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any, **kw: Any
    ) -> Any:
        if self._steps is not None:
            dt = self._steps(self._key, _chunk_steps(dt, kw))
            kw = kw | {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
        if not self._carrying:
            return stock(x, dt, A, B, *args, **kw)
        A_log = torch.log(-A)
        batch, _, heads, head_dim = x.shape
        shape = (batch, heads, head_dim, B.shape[-1])
        before = self._before.get(self._key)
        h = self._initial_state(A_log, shape, x)
        y, state = stock(x, dt, A, B, *args, **(kw | {"initial_states": h, "return_final_states": True}))
        with torch.no_grad():
            delta = _chunk_steps(dt, kw)
            trace = _chunk_trace(x, delta, A, B, h, None if before is None else before.trace)
        self._keep(A_log, state, trace)
        return (y, state) if kw.get("return_final_states") else y


def _is_kernel(module: ModuleType, name: str) -> bool:
    """Whether stock code chose this function of the module at import, among kernels and plain torch."""
    value = getattr(module, name)
    return callable(value) and hasattr(value, "__wrapped__") and name.startswith(("mamba", "causal_conv1d"))


def _discretised(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ (batch, channels, length) in float32 from what the stock module hands to its scan."""
    dt = dt.float() if bias is None else dt.float() + bias[:, None]
    return functional.softplus(dt) if softplus else dt


def _chunk_steps(dt: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Δ (batch, length, heads) in float32 under a stock call's dt_bias, dt_softplus and dt_limit."""
    bias = settings.get("dt_bias")
    dt = dt.float() if bias is None else dt.float() + bias.float()
    if settings.get("dt_softplus"):
        dt = functional.softplus(dt)
    return dt.clamp(*settings.get("dt_limit", (0.0, float("inf"))))


def _chunk_trace(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor, trace: Tensor | None) -> Tensor:
    """dh/dA_log at the end of a piece of Mamba-2, where h = Σ_t exp(c_t) Δ_t x_t B_t and c_t = A Σ_{s>t} Δ_s.

    A and so c are linear in exp(A_log), hence dh/dA_log = Σ_t c_t exp(c_t) Δ_t x_t B_t.

    Args:
        x: (batch, length, heads, head_dim). dt: (batch, length, heads), Δ. A: (heads,).
        B: (batch, length, groups, states). h, trace: (batch, heads, head_dim, states), at the start.
    """
    log_decay = dt * A.float()
    to_end = log_decay.flip(1).cumsum(1).flip(1)
    c = to_end - log_decay
    weighted = x.float() * (c * c.exp() * dt)[..., None]
    groups = B.shape[2]
    heads = x.shape[2] // groups
    result = torch.einsum("blghp,blgn->bghpn", weighted.unflatten(2, (groups, heads)), B.float()).flatten(1, 2)
    whole = to_end[:, 0, :, None, None]
    return result + whole.exp() * (whole * h + (0 if trace is None else trace))
