"""The spectrum by layer: A itself, and the eigenvalues exp(-|A|Δ) under the steps Δ that a text brings about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrator.methods.floor import beside, mean_steps
from calibrator.model import StockModel
from converter.reporting import Reporter

MOST_VALUES = 128
"""Values that stand for a layer; layers with more eigenvalues are summed up by as many even quantiles."""


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's eigenvalues, all or as quantiles, in descending order.

    Attributes:
        layer: the A_log's name.
        count: how many eigenvalues the layer has.
        decay_rates: |A|.
        eigenvalues: exp(-|A|·Δ) of one step, the geometric mean over the text's tokens; empty where stock code
            does not hand a step to a scan (gated delta rules).
        lost: 1 - exp(-|A|·Δ) of the same, ascending: the share of a state that one step forgets.
        at_unit_step: exp(-|A|), the paper's figure 1.
        mean_step: Δ, mean over tokens and heads or channels; None where it was not seen.
    """

    layer: str
    count: int
    decay_rates: list[float]
    eigenvalues: list[float]
    lost: list[float]
    at_unit_step: list[float]
    mean_step: float | None


@torch.no_grad()
def measure_spectrum(stock: StockModel, windows: Tensor, reporter: Reporter, what: str) -> list[LayerSpectrum]:
    """Read A and measure Δ on windows from zero state.

    Args:
        windows: (windows, length) token ids.
    """
    steps = mean_steps(stock, windows, reporter, what)
    layers = []
    for key in stock.mixers:
        A = stock.A_log[key].double().exp().cpu()
        step = steps.get(key)
        rates = A.new_empty(0) if step is None else A * beside(step, A)
        layers.append(
            LayerSpectrum(
                layer=key,
                count=A.numel(),
                decay_rates=_sum_up(A),
                eigenvalues=_sum_up(torch.exp(-rates)),
                lost=_sum_up(-torch.expm1(-rates))[::-1],
                at_unit_step=_sum_up(torch.exp(-A)),
                mean_step=None if step is None else float(step.mean()),
            )
        )
    return layers


def _sum_up(values: Tensor) -> list[float]:
    ordered = values.flatten().sort(descending=True).values
    places = torch.linspace(0, max(len(ordered) - 1, 0), min(len(ordered), MOST_VALUES)).round().long()
    return [float(f"{value:.6g}") for value in ordered[places].tolist()]
