"""The public API: scales on a model in memory, and imports that are quick."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import converter
from converter.errors import UsageError
from converter.scales import Form, Granularity, ScaleSet, factor_shape
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("model_type", "granularity", "form"),
    [
        ("mamba", "element", "linear"),
        ("mamba2", "head", "power"),
        ("jamba", "state", "linear"),
        ("zamba", "layer", "linear"),
        ("bamba", "head", "linear"),
    ],
)
def test_model_in_memory_is_the_baked_one_and_then_itself_again(
    model_type: str, granularity: Granularity, form: Form, tmp_path: Path
) -> None:
    tiny_model(model_type).float().save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    shapes = {record.name: record.shape for record in converter.inspect(tmp_path / "model").A_log}
    log_s = {
        name: generator.normal(0, 0.5, factor_shape(tuple(shape), granularity)).astype(np.float32)
        for name, shape in shapes.items()
    }
    scales = ScaleSet(form, granularity, log_s)
    converter.bake(tmp_path / "model", tmp_path / "baked", scales)
    model, baked = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("model", "baked")
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = dict(baked.named_parameters())
    with ScaleSet.load(str(tmp_path / "baked")).applied_to(model):
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    assert len(changed) >= len(log_s)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_scales_of_another_model_are_refused_and_an_error_inside_undoes_them() -> None:
    model = tiny_model("mamba2")
    key = next(name for name, _ in model.named_parameters() if name.endswith("A_log"))
    with (
        pytest.raises(UsageError, match="belong to another model"),
        ScaleSet("linear", "layer", {}).applied_to(model),
    ):
        pass
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("A_log")}
    log_s = {name: np.full(factor_shape(shape, "layer"), 0.5, np.float32) for name, shape in shapes.items()}
    before = model.get_parameter(key).clone()
    with pytest.raises(KeyError), ScaleSet("linear", "layer", log_s).applied_to(model):
        assert not torch.equal(model.get_parameter(key), before)
        raise KeyError
    assert torch.equal(model.get_parameter(key), before)


def test_import_is_quick() -> None:
    def seconds(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - started

    # The best of three, less what Python itself takes, so that other work on the machine does not count.
    assert min(seconds("import converter") - seconds("pass") for _ in range(3)) < 0.15
