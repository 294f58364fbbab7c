"""The state that each layer hands from one piece of a text to the next, with its derivative by A_log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CarriedState:
    """The state of one layer between two pieces of a text; all tensors are detached.

    Attributes:
        inputs: (batch, channels, kernel - 1), the convolution's last inputs.
        state: the SSM state h, (batch, channels, states) or (batch, heads, head_dim, states).
        trace: dh/dA_log of each eigenvalue through its own layer's past, shaped as ``state``. The gradient of a
            later loss by A_log is that of the piece plus the gradient at the state times the trace, which is
            exact except for paths through other layers before the piece. None after a pass without gradients.
        A_log: the A_log that ``state`` was computed under.
    """

    inputs: Tensor
    state: Tensor
    trace: Tensor | None
    A_log: Tensor


State = Mapping[str, CarriedState]


class Carry:
    """The states before and after the piece of a text that runs now.

    Attributes:
        layer: name of the A_log of the layer that runs now.
        is_open: whether states are carried.
        inputs: by layer, the last inputs of the convolution of the piece.
    """

    def __init__(self) -> None:
        self.layer = ""
        self.is_open = False
        self.inputs: dict[str, Tensor] = {}
        self._before: State = {}
        self._after: dict[str, CarriedState] = {}

    @contextmanager
    def piece(self, before: State | None) -> Iterator[State]:
        """While open, one piece runs from the state ``before`` it; yields the state after it."""
        self.is_open, self._before, self._after, self.inputs = True, before or {}, {}, {}
        try:
            yield self._after
        finally:
            self.is_open = False

    @property
    def before(self) -> CarriedState | None:
        """The layer's state before the piece."""
        return self._before.get(self.layer)

    def initial_state(self, A_log: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The state before the piece, moved to today's A_log by its trace, which also carries the gradient."""
        before = self.before
        if before is None:
            return like.new_zeros(shape, dtype=torch.float32)
        if before.trace is None:
            return before.state
        moved = (A_log - before.A_log).reshape(before.A_log.shape + (1,) * (before.state.dim() - 1 - A_log.dim()))
        return before.state + before.trace * moved

    @property
    def trace_before(self) -> Tensor | None:
        """The trace before the piece."""
        return None if self.before is None else self.before.trace

    @property
    def is_tracing(self) -> bool:
        """Whether the trace is wanted: not without gradients, and not when a layer runs again for them."""
        return torch.is_grad_enabled() and self.layer not in self._after

    def keep(self, A_log: Tensor, state: Tensor, trace: Tensor | None) -> None:
        """Keep the layer's state after the piece."""
        if self.layer not in self._after:
            self._after[self.layer] = CarriedState(
                self.inputs[self.layer],
                state.detach(),
                None if trace is None else trace.detach(),
                A_log.detach().clone(),
            )
