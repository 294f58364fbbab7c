"""Tiny stock models made ready for calibration, and a reporter that remembers, for tests."""

from __future__ import annotations

import torch

from calibrator.model import StockModel
from calibrator.recurrence import Recurrence
from calibrator.scaling import Scaling
from converter.reporting import Reporter
from tests.tiny_models import tiny_model


def stock_model(model_type: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> StockModel:
    """A tiny random model of one architecture, without a tokenizer."""
    model = tiny_model(model_type, dtype).requires_grad_(False).to(device)
    mixers = {f"{name}.A_log": module for name, module in model.named_modules() if "A_log" in module._parameters}
    A_log = {key: mixer.get_parameter("A_log").detach().float() for key, mixer in mixers.items()}
    return StockModel(model, None, mixers, A_log, dtype, Recurrence(model, mixers))


def layer_scaling(stock: StockModel) -> Scaling:
    """One factor a layer."""
    return Scaling(stock.mixers, stock.A_log, "layer", "linear")


class RememberingReporter(Reporter):
    """Keeps what it is told, and shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
