"""The state that each layer hands from one piece of a text to the next, with its derivative by A_log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibrator.kept_keys import CACHE_LAYERS, KeptKeys, PieceCache
from converter.errors import CalibrationError


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


class State(dict[str, CarriedState]):
    """What a text leaves behind: the state of each layer by the name of its A_log, and what attention keeps.

    Attributes:
        attention: empty for a model without attention.
    """

    attention = KeptKeys()

    def repeated(self, size: int) -> State:
        """One text's state for ``size`` texts that go on from it, without its trace."""
        repeated = State()
        for name, layer in self.items():
            inputs = layer.inputs.expand(size, -1, -1).contiguous()
            state = layer.state.expand(size, *layer.state.shape[1:]).contiguous()
            repeated[name] = CarriedState(inputs, state, None, layer.A_log)
        repeated.attention = self.attention.repeated(size)
        return repeated

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses of dict are pickled item by item, which torch.load refuses where it loads weights only.
        return State, (dict(self),), vars(self)


# For journals, which torch.load reads.
torch.serialization.add_safe_globals([State, CarriedState, KeptKeys, *CACHE_LAYERS])


class Carry:
    """The states before and after the piece of a text that runs now.

    A layer may scan its channels in several calls (Zamba: one a head); each has the next ones of the layer's state.

    Args:
        config: of the text part of a model with attention; None for one without.

    Attributes:
        layer: name of the A_log of the layer that runs now.
        is_open: whether states are carried.
        inputs: by layer, the last inputs of the convolution of the piece.
    """

    def __init__(self, config: Any = None) -> None:
        self._config = config
        self.layer = ""
        self.is_open = False
        self.inputs: dict[str, Tensor] = {}
        self.cache: PieceCache | None = None
        self._before, self._after = State(), State()
        self._scanned = 0

    @contextmanager
    def piece(self, before: State | None, keep: int | None = None) -> Iterator[State]:
        """While open, one piece runs from the state ``before`` it; yields the state after it."""
        self.is_open, self._before, self._after, self.inputs = True, before or State(), State(), {}
        if self._config is not None:
            self.cache = PieceCache(self._config, self._before.attention, keep)
            self._after.attention = self.cache.after
        try:
            yield self._after
            if lost := self.inputs.keys() - self._after.keys():
                raise CalibrationError(
                    f"The scans of {', '.join(sorted(lost))} are not found.", "Use transformers 5.23 or 5.24."
                )
        finally:
            self.is_open, self.cache = False, None

    def enter(self, layer: str) -> None:
        """A layer runs now."""
        self.layer, self._scanned = layer, 0

    @property
    def before(self) -> CarriedState | None:
        """The layer's state before the piece."""
        return self._before.get(self.layer)

    def start(self, A_log: Tensor, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state before the piece, moved to today's A_log by its trace, which also carries the gradient.

        Args:
            shape: of the state; of the layer's next ``shape[1]`` channels or heads.

        Returns:
            The state and its trace, zeros where nothing is carried. The trace is None where that after the piece
            is not wanted: without gradients, and when a layer runs again for them.
        """
        before, trace = self.before if self.is_open else None, None
        if before is None:
            state = like.new_zeros(shape, dtype=torch.float32)
        else:
            part = slice(self._scanned, self._scanned + shape[1])
            state = before.state[:, part]
            if before.trace is not None:
                trace = before.trace[:, part]
                moved = A_log - before.A_log[part]
                state = state + trace * moved.reshape(A_log.shape + (1,) * (state.dim() - 1 - A_log.dim()))
        if not (self.is_open and torch.is_grad_enabled() and self._is_first_run):
            return state, None
        return state, torch.zeros_like(state) if trace is None else trace

    @property
    def _is_first_run(self) -> bool:
        return self.layer not in self._after or self._after[self.layer].state.shape[1] == self._scanned

    def keep(self, A_log: Tensor, state: Tensor, trace: Tensor | None) -> None:
        """Keep the layer's state after the piece, if one is open."""
        if not self.is_open:
            return
        if self._is_first_run:
            trace = None if trace is None else trace.detach()
            new = CarriedState(self.inputs[self.layer], state.detach(), trace, A_log.detach().clone())
            earlier = self._after.get(self.layer)
            self._after[self.layer] = new if earlier is None else _joined(earlier, new)
        self._scanned += state.shape[1]


def _joined(first: CarriedState, second: CarriedState) -> CarriedState:
    """The state of a layer whose channels were scanned in two parts."""
    trace = None if first.trace is None or second.trace is None else torch.cat([first.trace, second.trace], 1)
    state, A_log = torch.cat([first.state, second.state], 1), torch.cat([first.A_log, second.A_log])
    return CarriedState(second.inputs, state, trace, A_log)
