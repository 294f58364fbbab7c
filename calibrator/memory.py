"""Keeping few activations while gradients run through a frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from calibrator.model import StockModel


@contextmanager
def checkpointed(stock: StockModel) -> Iterator[None]:
    """While open, each layer keeps its input only and runs again in the backward pass.

    Stock layers do this when they are in training mode. Only the layers' own flag is set: nothing below them
    changes its behaviour, so that there is no dropout.
    """
    layers: list[Any] = [
        module for module in stock.model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
            layer.training = False
