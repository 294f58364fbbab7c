"""What a model is compared with and cannot be baked: forward passes of the stock model under other steps Δ.

MambaExtend, LongMamba and DeciMamba are reimplementations from their papers' descriptions, for measuring alone.
All act on the step that a token is given: a token whose Δ is 0 leaves the state as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from calibrator.loss import window_losses
from calibrator.methods.spsa import FLOOR, HORIZON, PAPER_RATE, PAPER_STEPS, SPREAD_DECAY, START, WINDOWS
from calibrator.model import StockModel
from calibrator.scaling import Scaling
from calibrator.text import Text, take_span
from converter.errors import UsageError
from converter.reporting import Reporter

GLOBAL_DECAYS = (1e-5, 1e-2, 0.1, 0.3, 0.6, 0.9)
DECIMATION_RATIO = 0.5
BASE_TRAIN_LENS = 4
CALIBRATION_WINDOWS = 5
CALIBRATION_TRAIN_LENS = 16


class Comparator(Protocol):
    """A changed forward pass."""

    @property
    def name(self) -> str:
        """As results name it."""

    @property
    def only_tails(self) -> bool:
        """Whether earlier tokens are dropped, so that only the last predictions can be measured."""

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the result, as plain values."""

    def applied(self, stock: StockModel, length: int) -> AbstractContextManager[None]:
        """While open, the model runs changed; ``length`` is that of the windows it will see."""


@dataclass(frozen=True)
class ConstantScaling:
    """One factor on A, or on Δ, in every layer (Mamba Modulation, section 5.1, figure 2)."""

    target: str
    factor: float
    only_tails: bool = False

    @property
    def name(self) -> str:
        """As results name it."""
        return f"constant {self.target} x {self.factor:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Comparator`."""
        return {"target": self.target, "factor": self.factor}

    @contextmanager
    def applied(self, stock: StockModel, length: int) -> Iterator[None]:
        """See :class:`Comparator`."""
        if self.target == "delta":
            with stock.recurrence.stepping(lambda _, delta: delta * self.factor):
                yield
            return
        scaling = Scaling(stock.mixers, stock.A_log, "layer", "linear")
        with scaling:
            for log_s in scaling.parameters():
                log_s.data.fill_(self.factor).log_()
            yield


@dataclass(frozen=True)
class MambaExtend:
    """MambaExtend (Azizi et al., 2025), reimplemented: one factor a layer on Δ.

    Attributes:
        factors: name of an A_log to the factor of its layer's Δ.
    """

    factors: Mapping[str, float]
    name: str = "MambaExtend (reimplementation)"
    only_tails: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Comparator`."""
        return {"factors": list(self.factors.values())}

    @contextmanager
    def applied(self, stock: StockModel, length: int) -> Iterator[None]:
        """See :class:`Comparator`."""
        with stock.recurrence.stepping(lambda key, delta: delta * self.factors[key]):
            yield


@torch.no_grad()
def fit_mambaextend(stock: StockModel, text: Text, target_len: int, reporter: Reporter) -> MambaExtend:
    """Walk to the factors as the paper of Mamba Modulation walks to those of A: the preset ``paper`` of SPSA.

    Args:
        text: never the text that is measured.
        target_len: tokens of the windows whose perplexity is the objective.
    """
    generator = torch.Generator().manual_seed(0)
    windows = take_span(text, target_len, WINDOWS)

    def made(s: Tensor) -> MambaExtend:
        return MambaExtend(dict(zip(stock.mixers, s.clamp(min=FLOOR).tolist(), strict=True)))

    def perplexity(s: Tensor) -> float:
        with made(s).applied(stock, target_len):
            losses = [window_losses(stock, window[None].to(stock.device)).mean() for window in windows]
        return math.exp(torch.stack(losses).mean())

    s = torch.empty(len(stock.mixers)).uniform_(*START, generator=generator)
    with reporter.task("Fitting MambaExtend", PAPER_STEPS) as task:
        for step in range(PAPER_STEPS):
            spread = 0.1 / (1 + step) ** SPREAD_DECAY
            signs = torch.randint(2, s.shape, generator=generator) * 2 - 1
            slope = (perplexity(s + spread * signs) - perplexity(s - spread * signs)) / (2 * spread)
            rate = PAPER_RATE * math.cos(0.5 * math.pi * step / HORIZON)
            s = (s - rate * slope * signs).clamp(min=FLOOR)
            task.advance()
    return made(s)


@dataclass(frozen=True)
class LongMamba:
    """LongMamba (Ye et al., 2025), reimplemented: channels that reach far back skip tokens with a small Δ.

    Attributes:
        thresholds: window length to the A_log's name to the least Δ (heads or channels,) that still counts; 0 in
            channels whose receptive field is local, and at lengths the model was trained at.
        global_decay: share of a state that a global channel keeps over a training length.
    """

    thresholds: Mapping[int, Mapping[str, Tensor]]
    global_decay: float
    name: str = "LongMamba (reimplementation)"
    only_tails: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Comparator`."""
        return {"global_decay": self.global_decay}

    @contextmanager
    def applied(self, stock: StockModel, length: int) -> Iterator[None]:
        """See :class:`Comparator`."""
        thresholds = self.thresholds[length]
        with stock.recurrence.stepping(lambda key, delta: delta * (delta >= thresholds[key].to(delta.device))):
            yield


@torch.no_grad()
def fit_longmamba(
    stock: StockModel, text: Text, train_len: int, lengths: Sequence[int], reporter: Reporter
) -> LongMamba:
    """Find LongMamba's thresholds on calibration text.

    A channel is global when its slowest eigenvalue, run over a training length of mean steps, keeps more than a
    certain share of the state. Its threshold for a length is the one above which the steps of that length add up to
    what all steps of the training length add up to. The share is the one of ``GLOBAL_DECAYS`` under which the model
    reads the last calibration window best.

    Args:
        text: never the text that is measured.
        lengths: of the windows that will be measured.
    """
    size = CALIBRATION_TRAIN_LENS * train_len
    available = max(map(len, text.documents)) // size
    windows = take_span(text, size, max(2, min(CALIBRATION_WINDOWS, available)))
    least, mean_step = _aligned_thresholds(stock, windows[:-1], train_len, (*lengths, size), reporter)
    found: list[tuple[float, LongMamba]] = []
    for share in GLOBAL_DECAYS:
        thresholds: dict[int, dict[str, Tensor]] = {length: {} for length in least}
        for key in stock.mixers:
            A = stock.A_log[key].double().exp().cpu()
            slowest = A if A.numel() == len(mean_step[key]) else A.amin(-1)
            is_local = torch.exp(-slowest.flatten() * mean_step[key] * train_len) < share
            for length, rows in least.items():
                skips_nothing = is_local | torch.full_like(is_local, length <= train_len)
                thresholds[length][key] = rows[key].masked_fill(skips_nothing, 0.0).float()
        fitted = LongMamba(thresholds, share)
        with fitted.applied(stock, size):
            loss = float(window_losses(stock, windows[-1:].to(stock.device)).mean())
        reporter.detail(f"LongMamba, global above {share:g}: {loss:.4f} nats on calibration text")
        found.append((loss, fitted))
    return min(found, key=lambda pair: pair[0])[1]


def _aligned_thresholds(
    stock: StockModel, windows: Tensor, train_len: int, lengths: Sequence[int], reporter: Reporter
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """For every length and layer the least step (heads or channels,) that counts; and every layer's mean steps."""
    least: dict[int, dict[str, Tensor]] = {length: {} for length in lengths}
    mean_step: dict[str, Tensor] = {}

    def see(key: str, delta: Tensor) -> Tensor:
        steps = delta[0].double().cpu()
        mean_step[key] = mean_step.get(key, torch.zeros(1)) + steps.mean(0) / len(windows)
        ordered = steps.sort(0, descending=True).values
        share = ordered.cumsum(0) / steps.sum(0)
        for length in lengths:
            last = (share < train_len / length).sum(0).clamp(max=len(steps) - 1)
            edge = ordered.gather(0, last[None])[0] / len(windows)
            least[length][key] = least[length].get(key, torch.zeros(1)) + edge
        return delta

    with reporter.task("Fitting LongMamba", windows.numel()) as task, stock.recurrence.stepping(see):
        for row in windows:
            stock.hidden_states(row[None].to(stock.device))
            task.advance(len(row))
    return least, mean_step


@dataclass(frozen=True)
class DeciMamba:
    """DeciMamba (Ben-Kish et al., 2025), reimplemented for Mamba-1: chosen layers keep the tokens with the most Δ.

    Layer number i among the decimating ones keeps ``base`` · ``ratio``^i tokens, those with the largest mean Δ over
    channels; the others enter neither its state nor any later layer. The last tokens always stay, since their
    predictions are what is measured.

    Attributes:
        layers: names of the A_log of the decimating layers, in the model's order.
        base: tokens that the first of them keeps at most.
        ratio: what share of that each further one keeps.
        tail: predictions at the end that must stay.
    """

    layers: tuple[str, ...]
    base: int
    ratio: float
    tail: int
    name: str = "DeciMamba (reimplementation)"
    only_tails: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Comparator`."""
        return {"layers": list(self.layers), "base": self.base, "ratio": self.ratio, "tail": self.tail}

    def tokens_kept(self, key: str) -> int:
        """Tokens that a decimating layer lets through at most."""
        return max(int(self.base * self.ratio ** self.layers.index(key)), self.tail + 1)

    @contextmanager
    def applied(self, stock: StockModel, length: int) -> Iterator[None]:
        """See :class:`Comparator`."""
        modules = dict(stock.model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        kept: dict[str, Tensor] = {}

        def choose(key: str, delta: Tensor) -> Tensor:
            if key not in self.layers:
                return delta
            importance = delta.mean(2)
            importance[:, -self.tail - 1 :] = float("inf")
            size = min(self.tokens_kept(key), delta.shape[1])
            kept[key] = importance.topk(size, dim=1).indices.sort(1).values
            is_kept = torch.zeros_like(importance).scatter_(1, kept[key], 1.0)
            return delta * is_kept[..., None]

        def drop(key: str, _block: Any, _inputs: Any, hidden: Tensor) -> Tensor:
            return hidden.gather(1, kept[key][..., None].expand(-1, -1, hidden.shape[-1]))

        with ExitStack() as stack:
            for key in self.layers:
                block = modules[names[id(stock.mixers[key])].rpartition(".")[0]]
                stack.callback(block.register_forward_hook(partial(drop, key)).remove)
            stack.enter_context(stock.recurrence.stepping(choose))
            yield


def make_decimamba(stock: StockModel, train_len: int, tail: int) -> DeciMamba:
    """DeciMamba's defaults for a model: its middle layer decimates, to a few training lengths.

    Raises:
        UsageError: the model is no Mamba-1.
    """
    if stock.model.config.model_type not in ("mamba", "falcon_mamba"):
        raise UsageError("DeciMamba is defined for Mamba-1.", "Leave it out for this model.")
    keys = list(stock.mixers)
    return DeciMamba((keys[len(keys) // 2],), BASE_TRAIN_LENS * train_len, DECIMATION_RATIO, tail)
