"""Gradients through the frozen layers of a quantised checkpoint, for those whose quantiser cuts them off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from converter.errors import CalibrationError, boundary

REMEDY = "Calibrate the checkpoint before it was quantised, then write its scales into this one: mmod bake."
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def is_quantised(quantisation: Mapping[str, Any] | None) -> bool:
    """Whether a ``quantization_config`` is there, whose quantiser must then be known and run here.

    Raises:
        CalibrationError: stock transformers cannot load it, or would take its weights for plain ones.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    if quantisation is None:
        return False
    fix = f"{REMEDY} If the weights are plain, take quantization_config out of config.json."
    with boundary("Stock transformers cannot load this quantised checkpoint", CalibrationError, fix):
        if not AutoHfQuantizer.supports_quant_method(quantisation):
            raise ValueError(f"it knows no quantiser {quantisation.get('quant_method')}")
        AutoHfQuantizer.from_config(dict(quantisation), pre_quantized=True).validate_environment(device_map=None)
    return True


def let_gradients_through(model: nn.Module) -> None:
    """Give layers that round their inputs outside of autograd, as compressed-tensors does, a backward pass."""
    # bitsandbytes says at every product that its input is rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for module in model.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(_straight_through)


def _straight_through(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
    """A layer's output, with the gradient that its weight alone gives. Raises CalibrationError if it is packed."""
    x = inputs[0] if inputs else None
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.is_floating_point()):
        return None
    if not (torch.is_grad_enabled() and x.requires_grad) or output.requires_grad:
        return None
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor) or weight.dtype not in _PLAIN:
        raise CalibrationError(f"The quantised {type(layer).__name__} layers let no gradient through.", REMEDY)
    passed: Tensor = _StraightThrough.apply(x, weight, output)
    return passed


class _StraightThrough(torch.autograd.Function):
    """Gives ``output`` as the product of x (…, inputs) and a frozen weight (outputs, inputs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.to(weight.dtype) @ weight).to(ctx.dtype), None, None
