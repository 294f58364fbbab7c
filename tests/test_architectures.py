"""Every architecture of stock transformers with an A_log: converted, loaded, and the decay itself checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from converter.layouts import read_checkpoint
from converter.scales import ScaleSet, factor_shape
from tests.conversions import convert
from tests.small_checkpoints import source
from tests.tiny_models import SETTINGS, VOCABULARY, tiny_model

FACTOR = 1.5
ATTENTION_LAYERS: dict[str, tuple[int, ...]] = {
    "jamba": (2,),
    "zamba": (1, 3),
    "zamba2": (1, 3),
    "bamba": (1,),
    "falcon_h1": (0, 1),
    "granitemoehybrid": (1,),
    "nemotron_h": (2,),
    "qwen3_next": (3,),
    "qwen3_5_text": (3,),
    "qwen3_5_moe_text": (3,),
    "qwen4_exp_text": (3,),
    "olmo_hybrid": (3,),
    "kimi_linear": (1,),
}


def decaying_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that own an A_log."""
    return {
        name: module
        for name, module in model.named_modules()
        if "A_log" in dict(module.named_parameters(recurse=False))
    }


def with_strong_decay(model: PreTrainedModel) -> PreTrainedModel:
    """Make the state count: large inputs, time steps after which it fades, and no way around it (D = 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixer in decaying_modules(model).values():
            for name, parameter in mixer.named_parameters():
                if name.endswith("D"):
                    parameter.zero_()
                elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
                    parameter.fill_(0.5)
                elif parameter.ndim > 1 and not name.endswith("A_log"):
                    parameter.normal_(0, 0.2, generator=generator)
    return model


def run(model: PreTrainedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a short text, and what every module with an A_log returned on the way."""
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    hooks = [module.register_forward_hook(keep) for module in decaying_modules(model).values()]
    tokens = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


def names_beside(folder: Path) -> list[str]:
    """Every tensor in a folder's safetensors files: what a loader reads that goes by no index."""
    return sorted(name for path in folder.glob("*.safetensors") for name in load_file(path))


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_baked_model_decays_as_the_model_whose_spectrum_is_scaled(tmp_path: Path, model_type: str) -> None:
    model = with_strong_decay(tiny_model(model_type))
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    snapshot = source(tmp_path / "model")
    checkpoint = read_checkpoint(snapshot)
    assert len(checkpoint.files) > 3
    assert len(checkpoint.A_log) == len(decaying_modules(model))
    assert checkpoint.attention_layers == ATTENTION_LAYERS.get(model_type, ())
    log_s = {
        name: np.full(factor_shape(tensor.shape, "layer"), np.log(FACTOR), np.float32)
        for name, tensor in checkpoint.A_log.items()
    }
    proof = convert(snapshot, tmp_path / "out", ScaleSet("linear", "layer", log_s))
    assert proof.changed == len(checkpoint.A_log)
    assert names_beside(tmp_path / "out") == names_beside(tmp_path / "model")

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    converted, info = loaded
    assert not any(info.values())
    _, unscaled = run(model)
    with torch.no_grad():
        for module in decaying_modules(model).values():
            module.A_log.copy_(torch.log(torch.exp(module.A_log.double()) * FACTOR))
    expected_logits, expected = run(model)
    logits, outputs = run(converted.eval())
    assert len(outputs) == len(checkpoint.A_log)
    for baked, scaled, before in zip(outputs, expected, unscaled, strict=True):
        size = scaled.abs().max()
        assert (baked - scaled).abs().max() < 1e-5 * size
        assert (before - scaled).abs().max() > 1e-3 * size
    assert (logits - expected_logits).abs().max() < 1e-5 * expected_logits.abs().max()


def test_language_model_inside_a_vision_model_is_found(tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=SETTINGS["qwen3_5_text"], vision_config={**vision, "patch_size": 4})
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    names = json.loads((tmp_path / "model" / "config.json").read_text())
    assert names["model_type"] == "qwen3_5"
    checkpoint = read_checkpoint(source(tmp_path / "model"))
    assert list(checkpoint.A_log) == [
        f"model.language_model.layers.{layer}.linear_attn.A_log" for layer in range(3)
    ]
    assert any(".visual." in name for name in checkpoint.tensors)
    convert(source(tmp_path / "model"), tmp_path / "out")
    loaded: Any = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1].values())
