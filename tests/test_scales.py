"""The scale algebra as properties: what a factor does to the spectrum, and the exact fold of a scaled time step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from converter.baking import plan_changes
from converter.errors import LayoutError, UsageError
from converter.layouts import read_checkpoint
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
from tests.small_checkpoints import is_identity, source
from tests.tiny_models import tiny_model

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


# The fold of a scaled time step, against recurrences written out in float64


def run_mamba1(A_log: Array, D: Array, out_proj: Array, delta: Array, inputs: dict[str, Array]) -> Array:
    """Output of a Mamba-1 mixer behind its projections: (length, hidden). delta, u, z: (length, channels)."""
    h = np.zeros(A_log.shape)
    rows = []
    for u, z, B, C, step in zip(inputs["u"], inputs["z"], inputs["B"], inputs["C"], delta, strict=True):
        h = np.exp(-step[:, None] * np.exp(A_log)) * h + (step * u)[:, None] * B
        rows.append(out_proj @ ((h @ C + D * u) * z))
    return np.array(rows)


def run_mamba2(
    A_log: Array, D: Array, out_proj: Array, delta: Array, inputs: dict[str, Array], eps: float
) -> Array:
    """Output of a Mamba-2 mixer with its gated norm. delta: (length, heads); u, z: (length, heads, head_dim)."""
    heads, head_dim = inputs["u"].shape[1:]
    h = np.zeros((heads, head_dim, inputs["B"].shape[1]))
    rows = []
    for u, z, B, C, step in zip(inputs["u"], inputs["z"], inputs["B"], inputs["C"], delta, strict=True):
        h = np.exp(-step * np.exp(A_log))[:, None, None] * h + (step[:, None] * u)[..., None] * B
        gated = ((h @ C + D[:, None] * u) * z).reshape(-1)
        rows.append(out_proj @ (gated / np.sqrt(np.mean(gated**2) + eps)))
    return np.array(rows)


def draw_inputs(length: int, *shape: int, states: int) -> dict[str, Array]:
    generator = np.random.default_rng(3)
    sizes = {"u": shape, "z": shape, "B": (states,), "C": (states,)}
    return {name: generator.standard_normal((length, *size)) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("mamba", "mamba2", "jamba", "qwen3_next")
    for name in names:
        tiny_model(name).save_pretrained(folder / name)
    return {name: folder / name for name in names}


def folded(folder: Path, scales: ScaleSet, key: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one mixer before and after the fold, in float64 and not rounded to the file's format."""
    checkpoint = read_checkpoint(source(folder))
    changes = plan_changes(checkpoint, scales, "float32")
    stem = key.removesuffix("A_log")
    before = {name: checkpoint.tensors[stem + name].read() for name in ("A_log", "D", "out_proj.weight")}
    after = {
        name: changes[stem + name].values(values) if stem + name in changes else values
        for name, values in before.items()
    }
    return before, after


@pytest.mark.parametrize("model_type", ["mamba", "jamba"])
@settings(deadline=None, max_examples=20)
@given(granularity=st.sampled_from(["layer", "channel"]), seed=st.integers(0, 1000))
def test_fold_of_mamba1_is_exact(
    folders: dict[str, Path], model_type: str, granularity: Granularity, seed: int
) -> None:
    checkpoint = read_checkpoint(source(folders[model_type]))
    key, tensor = next(iter(checkpoint.A_log.items()))
    generator = np.random.default_rng(seed)
    log_s = {
        # Away from 1, so that what is not folded shows.
        name: np.float32(generator.choice([-1, 1]))
        * generator.uniform(0.5, 1, factor_shape(other.shape, granularity)).astype(np.float32)
        for name, other in checkpoint.A_log.items()
    }
    before, after = folded(folders[model_type], ScaleSet("linear", granularity, log_s, "delta"), key)
    inputs = draw_inputs(20, tensor.shape[0], states=tensor.shape[1])
    delta = generator.uniform(0.01, 2, (20, tensor.shape[0]))
    s = np.exp(log_s[key].astype(np.float64))[:, 0]
    true = run_mamba1(*before.values(), delta * s, inputs)
    assert np.abs(true - run_mamba1(*before.values(), delta, inputs)).max() > 1e-2 * np.abs(true).max()
    np.testing.assert_allclose(
        run_mamba1(*after.values(), delta, inputs), true, rtol=0, atol=1e-13 * np.abs(true).max()
    )


@pytest.mark.parametrize(("eps", "tolerance"), [(0.0, 1e-13), (1e-5, 1e-4)])
def test_fold_of_mamba2_is_exact_up_to_the_norms_eps(
    folders: dict[str, Path], eps: float, tolerance: float
) -> None:
    checkpoint = read_checkpoint(source(folders["mamba2"]))
    key = next(iter(checkpoint.A_log))
    log_s = {name: np.full((1,), 0.4, np.float32) for name in checkpoint.A_log}
    before, after = folded(folders["mamba2"], ScaleSet("linear", "layer", log_s, "delta"), key)
    assert np.array_equal(after["out_proj.weight"], before["out_proj.weight"])
    inputs = draw_inputs(20, 4, 32, states=16)
    delta = np.random.default_rng(1).uniform(0.01, 2, (20, 4))
    true = run_mamba2(*before.values(), delta * np.exp(np.float64(np.float32(0.4))), inputs, eps)
    error = np.abs(run_mamba2(*after.values(), delta, inputs, eps) - true).max() / np.abs(true).max()
    assert error < tolerance
    assert (error > 1e-13) == (eps > 0)


@pytest.mark.parametrize(
    ("model_type", "granularity", "reason"),
    [
        ("mamba2", "head", "gated norm"),
        ("qwen3_next", "layer", "no D"),
        ("mamba", "state", "cannot have"),
        ("mamba", "element", "cannot have"),
    ],
)
def test_time_steps_that_cannot_be_folded_are_refused_with_the_reason(
    folders: dict[str, Path], model_type: str, granularity: Granularity, reason: str
) -> None:
    checkpoint = read_checkpoint(source(folders[model_type]))
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    with pytest.raises((LayoutError, UsageError), match=reason):
        plan_changes(checkpoint, ScaleSet.ones(shapes, granularity, "linear", "delta"), "float32")
