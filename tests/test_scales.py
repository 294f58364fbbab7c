"""The scale algebra as properties: what a factor does to the spectrum, and the exact fold of a scaled time step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from converter.errors import UsageError
from converter.scales import (
    FORMS,
    GRANULARITIES,
    Form,
    Granularity,
    ScaleSet,
    auto_granularity,
    factor_shape,
    offered_granularities,
    scaled_A_log,
)
from tests.small_checkpoints import is_identity

Array = NDArray[np.float64]
SHAPES = st.sampled_from([(4,), (24,), (6, 4), (1, 1, 5, 1), (2, 3, 4)])
FINITE = st.floats(-3, 3, width=32)


@st.composite
def scaled_layers(draw: st.DrawFn) -> tuple[Array, NDArray[np.float32], Granularity, Form]:
    """An A_log, factors for it at any granularity that it offers, and a form."""
    shape = draw(SHAPES)
    granularity = draw(st.sampled_from(offered_granularities(shape)))
    A_log = draw(hnp.arrays(np.float64, shape, elements=FINITE))
    log_s = draw(hnp.arrays(np.float32, factor_shape(shape, granularity), elements=FINITE))
    return A_log, log_s, granularity, draw(st.sampled_from(FORMS))


@given(scaled_layers())
def test_a_factor_scales_the_eigenvalues_or_their_logarithms(
    layer: tuple[Array, NDArray[np.float32], Granularity, Form],
) -> None:
    A_log, log_s, granularity, form = layer
    scales = ScaleSet(form, granularity, {"A_log": log_s})
    magnitude, s = np.exp(A_log), np.exp(log_s.astype(np.float64))
    expected = magnitude * s if form == "linear" else magnitude**s
    np.testing.assert_allclose(np.exp(scales.bake("A_log", A_log)), expected, rtol=1e-12)
    np.testing.assert_array_equal(scales.factors("A_log"), s)
    assert scales.bake("A_log", A_log).shape == A_log.shape


@given(scaled_layers())
def test_two_bakes_are_one_bake_of_both_factors(
    layer: tuple[Array, NDArray[np.float32], Granularity, Form],
) -> None:
    A_log, log_s, _, form = layer
    log_s = log_s.astype(np.float64)
    twice = scaled_A_log(scaled_A_log(A_log, log_s, form, np.exp), -0.5 * log_s, form, np.exp)
    np.testing.assert_allclose(twice, scaled_A_log(A_log, 0.5 * log_s, form, np.exp), rtol=1e-12, atol=1e-12)


@given(SHAPES, st.sampled_from(GRANULARITIES))
def test_factors_broadcast_against_their_A_log_or_are_refused(
    shape: tuple[int, ...], granularity: Granularity
) -> None:
    if granularity not in offered_granularities(shape):
        with pytest.raises(UsageError, match=granularity):
            factor_shape(shape, granularity)
        return
    assert np.broadcast_shapes(factor_shape(shape, granularity), shape) == shape
    sizes = {offered: int(np.prod(factor_shape(shape, offered))) for offered in offered_granularities(shape)}
    assert sizes["layer"] == 1
    assert max(sizes.values()) == np.prod(shape)
    assert auto_granularity(shape) in sizes


@given(SHAPES, st.sampled_from(FORMS))
def test_ones_change_nothing(shape: tuple[int, ...], form: Form) -> None:
    ones = ScaleSet.ones({"A_log": shape}, "layer", form)
    A_log = np.linspace(-1, 2, int(np.prod(shape))).reshape(shape)
    assert is_identity(ones)
    np.testing.assert_array_equal(ones.bake("A_log", A_log), A_log)
