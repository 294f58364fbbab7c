"""Gradients through frozen layers whose quantiser runs outside of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrator.quantised import let_gradients_through
from converter.errors import CalibrationError


class Rounding(nn.Linear):
    """A frozen layer that rounds its input, and lets no gradient through."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(torch.float8_e4m3fn).to(x.dtype), self.weight.to(x.dtype), self.bias)


def test_rounded_inputs_keep_the_output_and_get_the_gradient_of_the_weight() -> None:
    torch.manual_seed(0)
    layer, plain = Rounding(6, 5).requires_grad_(False), nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(2, 3, 6, requires_grad=True)
    unhooked = layer(inputs)
    assert not unhooked.requires_grad
    let_gradients_through(nn.Sequential(layer))
    weights = torch.randn(2, 3, 5)
    output = layer(inputs)
    assert torch.equal(output, unhooked)
    [found] = torch.autograd.grad((output * weights).sum(), inputs)
    [expected] = torch.autograd.grad((plain(inputs) * weights).sum(), inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(layer(inputs), unhooked)


def test_packed_weights_without_a_backward_pass_are_named_with_the_way_out() -> None:
    layer = Rounding(6, 5).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    let_gradients_through(nn.Sequential(layer))
    with pytest.raises(CalibrationError, match="Rounding layers let no gradient through") as caught:
        layer(torch.randn(2, 6, requires_grad=True))
    assert "mmod bake" in caught.value.fix
