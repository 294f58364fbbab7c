"""Names and shapes are held against the stock class before anything is written; wrappers in names are taken off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibrator.model import load_tokenizer
from calibrator.stock_match import match_stock
from converter.commands.bake import bake_scales
from converter.commands.convert import convert
from converter.commands.requests import BakeRequest, ConvertRequest
from converter.errors import CalibrationError, LayoutError
from converter.reporting import Reporter
from tests.tiny_models import SETTINGS, tiny_model

Tensors = dict[str, Tensor]
ROOT = Path(__file__).parent.parent


def rename(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def plus(**added: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in added.items()}


def write(folder: Path, model_type: str, change: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> Path:
    """A tiny model whose tensors were changed, without a tokenizer."""
    tiny_model(model_type).save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def shapes_of(folder: Path) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in load_file(folder / "model.safetensors").items()}


def winsorize(model: Path, output: Path) -> None:
    convert(ConvertRequest(str(model), output, target_len=512, method="winsorize"), Reporter())


def test_settings_of_generation_that_stop_the_loader_stop_the_conversion(tmp_path: Path) -> None:
    write(tmp_path / "model", "mamba2")
    (tmp_path / "model" / "generation_config.json").write_text("[]")
    with pytest.raises(CalibrationError, match="cannot load it") as stopped:
        winsorize(tmp_path / "model", tmp_path / "out")
    assert "generation_config.json" in stopped.value.fix and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", SETTINGS)
def test_every_stock_model_matches_itself_and_not_without_a_tensor(tmp_path: Path, model_type: str) -> None:
    shapes = shapes_of(write(tmp_path, model_type))
    match_stock(tmp_path, shapes).check()
    gone = next(name for name in shapes if name.endswith("norm.weight") or name.endswith("norm_f.weight"))
    left = {name: shape for name, shape in shapes.items() if name != gone}
    assert len(match_stock(tmp_path, left).missing) == 1
    other = match_stock(tmp_path, shapes | {gone: [5]})
    assert len(other.mismatched) == 1
    with pytest.raises(LayoutError, match="has other shapes for"):
        other.check()


@pytest.mark.parametrize(
    "change",
    [
        rename(lambda name: f"_orig_mod.{name}"),
        rename(lambda name: f"module.{name}"),
        rename(lambda name: f"module._orig_mod.{name}"),
        rename(lambda name: name.replace(".mixer.", "._orig_mod.mixer.")),
    ],
)
def test_names_of_wrappers_are_taken_off_and_the_copy_loads(
    tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    winsorize(write(tmp_path / "model", "mamba2", change), tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


CAUSES = [
    ("mamba2", rename(lambda name: f"net.{name}"), r"All names begin with net\."),
    ("mamba2", without("lm_head"), "saved without its head"),
    ("mamba2", plus(v_head__summary__weight=torch.ones(1, 64)), "value or reward head"),
    ("mamba2", plus(backbone__layers__0__mixer__in_proj__lora_A__weight=torch.ones(2, 64)), "adapter"),
    ("mamba2", without("layers.1.norm"), r"misses backbone\.layers\.1\.norm\.weight"),
    ("mamba", plus(backbone__embeddings__weight=torch.ones(99, 64)), "has other shapes for backbone.embeddings"),
    ("jamba", without("router"), r"misses model\.layers\.\d\.feed_forward\.router"),
]


@pytest.mark.parametrize(("model_type", "change", "said"), CAUSES)
def test_what_stock_code_would_fill_with_noise_is_refused_with_its_cause(
    tmp_path: Path, model_type: str, change: Callable[[Tensors], Tensors], said: str
) -> None:
    model = write(tmp_path / "model", model_type, change)
    with pytest.raises(LayoutError, match=said):
        winsorize(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bake_refuses_by_a_process_of_its_own_and_stays_without_torch(tmp_path: Path) -> None:
    winsorize(write(tmp_path / "model", "mamba2"), tmp_path / "scaled")
    write(tmp_path / "model", "mamba2", without("lm_head"))
    request = BakeRequest(str(tmp_path / "model"), tmp_path / "out", str(tmp_path / "scaled"), anyway=True)
    with pytest.raises(LayoutError, match="saved without its head"):
        bake_scales(request, Reporter())
    command = f"mmod bake {tmp_path / 'model'} {tmp_path / 'out'} --anyway --scales {tmp_path / 'scaled'}"
    script = (
        "import sys, converter.__main__ as program\n"
        f"sys.argv = {command.split()}\n"
        "try: program.main()\n"
        "finally: print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "saved without its head" in done.stderr and done.stdout == "[]\n", done


def test_byte_order_mark_in_a_tokenizers_file_is_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("\ufeff{}")
    with pytest.raises(CalibrationError) as refused:
        load_tokenizer(tmp_path)
    assert refused.value.fix == "Save tokenizer.json, tokenizer_config.json without a byte order mark."


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_tokenizer_that_stock_code_cannot_load_stops_a_bake(tmp_path: Path, content: str) -> None:
    winsorize(write(tmp_path / "model", "mamba2"), tmp_path / "scaled")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    words = [str(tmp_path / "model"), str(tmp_path / "out"), "--scales", str(tmp_path / "scaled")]
    script = "import sys; from converter.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "bake", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot load the tokenizer" in done.stderr, done
    assert {path.name for path in tmp_path.iterdir()} == {"model", "scaled"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "no such function"}, "cannot build this model"),
        ({"num_heads": 5}, "cannot load config.json: .*[Hh]idden|cannot load config.json: .*num_heads"),
        ({"layer_norm_epsilon": "1e-5"}, "cannot load config.json: .*layer_norm_epsilon"),
    ],
)
def test_config_that_stock_code_cannot_build_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    model = write(tmp_path / "model", "mamba2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CalibrationError, match=said):
        winsorize(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("named", "said"),
    [({"quant_method": "nonesuch"}, "no quantiser nonesuch"), ({"bits": 4}, "cannot load this quant")],
)
def test_quantiser_that_stock_code_lacks_is_refused_where_the_model_is_to_run(
    tmp_path: Path, named: dict[str, object], said: str
) -> None:
    model = write(tmp_path, "mamba2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": named}))
    with pytest.raises(CalibrationError, match=said) as refused:
        match_stock(model, shapes_of(model))
    assert "mmod bake" in refused.value.fix
    match_stock(model, None).check()
