"""Quantised copies: known scales of their base written into them, and calibration on them as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.scales_file import save_scales
from tests.consumers.fetch import FOLDER, QUANTISED
from tests.small_checkpoints import CONFIG, random_scales, source, tensors, write_transformers
from tests.test_consumers import needs, run_consumer
from tests.test_inspect import mmod, succeed
from tests.tiny_folders import novel, tiny_folder

COPIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, {"format": "mlx"}),
    "compressed-tensors": ({"quantization_config": {"quant_method": "compressed-tensors"}}, {"format": "pt"}),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {"format": "pt"}),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"format": "pt"}),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, {"format": "pt"}),
}


def quantised(kind: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as a quantiser of this kind stores it, in its number formats if not in its values."""
    if not name.endswith("_proj.weight"):
        return {name: tensor.bfloat16()} if kind == "mlx" else {name: tensor}
    scale = tensor.float().abs().amax(1, keepdim=True)
    if kind == "compressed-tensors":
        return {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}
    packed = torch.zeros(tensor.shape[0], tensor.shape[1] // 8, dtype=torch.int32)
    stem = name.removesuffix("weight")
    if kind in ("awq", "gptq"):
        return {f"{stem}qweight": packed, f"{stem}scales": scale.half()}
    if kind == "bitsandbytes":
        return {name: packed.view(torch.uint8), f"{name}.absmax": scale}
    return {name: packed.view(torch.uint32), f"{stem}scales": scale.bfloat16()}


def write_copy(kind: str, folder: Path) -> Path:
    extra, metadata = COPIES[kind]
    write_transformers(folder, config={**CONFIG, **extra})
    content: dict[str, torch.Tensor] = {}
    for name, tensor in tensors().items():
        content |= quantised(kind, name, tensor)
    save_file(content, folder / "model.safetensors", metadata=metadata)
    return folder


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    A_log = read_checkpoint(source(write_transformers(tmp_path / "base"))).A_log
    (tmp_path / "scales").mkdir()
    shapes = {name: tensor.shape for name, tensor in A_log.items()}
    return save_scales(tmp_path / "scales", random_scales(shapes, "head"), A_log)


@pytest.mark.parametrize("kind", COPIES)
def test_only_A_log_of_a_quantised_copy_changes(tmp_path: Path, scales: Path, kind: str) -> None:
    copy = write_copy(kind, tmp_path / "copy")
    out = tmp_path / "out"
    told = succeed("bake", copy, out, "--scales", scales)
    assert told["changed_tensors"] == 3 and told["proved"]
    before, after = load_file(copy / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    same = [name for name in before if before[name].dtype == after[name].dtype]
    same = [name for name in same if torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))]
    assert {name for name in before if name not in same} == {name for name in before if name.endswith("A_log")}
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((copy / "config.json").read_text())
    manifest = Manifest.read(out)
    assert manifest is not None and manifest.source.quantisation == kind
    agreement = "rounded to bfloat16" if kind == "mlx" else "A_log is that of the scales' base."
    assert agreement in manifest.notes[0]
    runtime = "mlx-lm" if kind == "mlx" else "stock transformers"
    assert succeed("verify", out, "--base", copy)["not_proved"] == [f"That {runtime} loads it (it was not loaded)."]
    use = (out / "README.md").read_text().split("\n## Use\n")[1]
    assert ("mlx_lm.server" in use, "from_pretrained" in use) == (kind == "mlx", kind != "mlx")


@pytest.mark.parametrize("packed", [True, False])
def test_card_has_the_line_that_loads_packed_weights(tmp_path: Path, scales: Path, packed: bool) -> None:
    copy = write_copy("compressed-tensors", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format"] = "pack-quantized" if packed else "float-quantized"
    (copy / "config.json").write_text(json.dumps(config))
    succeed("bake", copy, tmp_path / "out", "--scales", scales)
    use = (tmp_path / "out" / "README.md").read_text().split("\n## Use\n")[1]
    assert ("import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig\n" in use) == packed
    assert ('/folder", quantization_config=CompressedTensorsConfig(dequantize=True))' in use) == packed


def test_dtype_of_A_log_may_be_kept(tmp_path: Path, scales: Path) -> None:
    copy = write_copy("mlx", tmp_path / "copy")
    succeed("bake", copy, tmp_path / "out", "--scales", scales, "--a-log-dtype", "keep")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in found.items() if name.endswith("A_log")} == {torch.bfloat16}


def test_what_quantisers_say_beside_the_config_goes_along(tmp_path: Path, scales: Path) -> None:
    copy = write_transformers(tmp_path / "copy")
    (copy / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    succeed("bake", copy, tmp_path / "out", "--scales", scales)
    assert (tmp_path / "out" / "hf_quant_config.json").is_file()
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and manifest.source.quantisation == "modelopt"


def test_quantised_A_log_is_refused(tmp_path: Path, scales: Path) -> None:
    content = {
        name: tensor.to(torch.float8_e4m3fn) if name.endswith("A_log") else tensor
        for name, tensor in tensors().items()
    }
    copy = write_transformers(tmp_path / "copy", content=content)
    done = mmod("bake", copy, tmp_path / "out", "--scales", scales)
    assert done.returncode == 1 and "is stored as F8_E4M3" in done.stderr
    assert not (tmp_path / "out").exists()


@needs("quantisers")
def test_quantised_copies_are_calibrated_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, text = tiny_folder("mamba2", tmp_path / "base"), novel(tmp_path, 8000)
    monkeypatch.syspath_prepend(str(FOLDER / "quantisers"))
    run_consumer("run_quantised", "quantise", str(base))
    run_consumer("run_quantised", "descend", str(base), *(f"{base}-{method}" for method in QUANTISED))
    output = tmp_path / "out"
    options = ("--target-len", "64", "--train-len", "16", "--steps", "2", "--windows", "0", "--data", text)
    succeed("convert", f"{base}-{QUANTISED[-1]}", "-o", output, *options)
    succeed("verify", output, "--base", f"{base}-{QUANTISED[-1]}")
