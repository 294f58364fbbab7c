"""The norm of each layer's SSM state by the length of the text behind it (Mamba Modulation, table 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from calibrator.carried_state import State
from calibrator.evaluation.recall import carry
from calibrator.model import StockModel
from converter.reporting import Reporter


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer's states after one length, over all windows.

    Attributes:
        layer: the A_log's name.
        norm: Frobenius norm of the whole state, mean over windows.
        smallest, largest: of the norms of single heads (Mamba-2) or channels (Mamba-1), over all windows.
    """

    layer: str
    norm: float
    smallest: float
    largest: float


@torch.no_grad()
def measure_state_norms(
    stock: StockModel, windows: Tensor, lengths: Sequence[int], reporter: Reporter, what: str
) -> dict[int, list[LayerNorms]]:
    """Run windows from zero state and take the norms of the states after each length.

    Args:
        windows: (windows, longest length) token ids.
        lengths: tokens, ascending; the last is the longest.

    Returns:
        Length to one entry a layer, in the model's order.
    """
    results = {}
    with reporter.task(f"States of {what}", windows.shape[0] * max(lengths)) as task:
        per_length: dict[int, list[dict[str, Tensor]]] = {length: [] for length in lengths}
        for row in windows:
            for length, states in final_states(stock, row[None], lengths):
                per_length[length].append(states)
            task.advance(len(row))
        for length, rows in per_length.items():
            results[length] = [_norms(key, torch.cat([states[key] for states in rows])) for key in stock.mixers]
    return results


def final_states(
    stock: StockModel, window: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The SSM states after each length of one window.

    Args:
        window: (1, longest length) token ids.

    Yields:
        The length, and the A_log's name to (1, heads or channels, …) float32 on the CPU.
    """
    state: State | None = None
    for done, length in pairwise((0, *lengths)):
        state, _ = carry(stock, window[:, done:length], state)
        yield length, {key: state[key].state.float().cpu() for key in stock.mixers}


def _norms(key: str, states: Tensor) -> LayerNorms:
    """Norms of one layer's states (windows, heads or channels, …)."""
    parts = states.flatten(2).norm(dim=2)
    return LayerNorms(key, float(parts.norm(dim=1).mean()), float(parts.min()), float(parts.max()))
