"""Small Mamba-2 checkpoints made of plain files, for tests of the file side that need no model to run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.synthetic import TOKENIZER
from converter.scales import Form, Granularity, ScaleSet, factor_shape
from converter.source import Snapshot, resolve

HIDDEN, HEADS, STATE, LAYERS, VOCABULARY = 16, 4, 4, 3, 32
CONFIG: dict[str, Any] = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "hidden_size": HIDDEN,
    "num_heads": HEADS,
    "head_dim": 8,
    "state_size": STATE,
    "n_groups": 1,
    "conv_kernel": 4,
    "expand": 2,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
STATE_SPACES_CONFIG: dict[str, Any] = {
    "d_model": HIDDEN,
    "n_layer": LAYERS,
    "vocab_size": 29,
    "ssm_cfg": {"layer": "Mamba2", "d_state": STATE, "headdim": 8},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
}


def tensors(
    dtype: torch.dtype = torch.bfloat16, A_log_dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tensors of a Mamba-2 model with three layers, in the transformers layout."""
    generator = torch.Generator().manual_seed(seed)
    inner, conv = 2 * HIDDEN, 2 * HIDDEN + 2 * STATE
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        mixer = f"backbone.layers.{layer}.mixer"
        shapes |= {
            f"backbone.layers.{layer}.norm.weight": (HIDDEN,),
            f"{mixer}.A_log": (HEADS,),
            f"{mixer}.D": (HEADS,),
            f"{mixer}.conv1d.bias": (conv,),
            f"{mixer}.conv1d.weight": (conv, 1, 4),
            f"{mixer}.dt_bias": (HEADS,),
            f"{mixer}.in_proj.weight": (inner + conv + HEADS, HIDDEN),
            f"{mixer}.norm.weight": (inner,),
            f"{mixer}.out_proj.weight": (HIDDEN, inner),
        }
    shapes["backbone.norm_f.weight"] = (HIDDEN,)
    return {
        name: torch.randn(shape, generator=generator).to(A_log_dtype if name.endswith("A_log") else dtype)
        for name, shape in shapes.items()
    }


def write_transformers(
    folder: Path,
    shards: int = 1,
    config: Mapping[str, Any] = CONFIG,
    content: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A folder in the transformers layout with safetensors files, a README and a tokenizer; returns the folder.

    Args:
        shards: whole layers lie in each, as in real checkpoints; of four the last has no A_log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "README.md").write_text("# A model\n")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 2048}')
    content = tensors() if content is None else content
    if shards == 1:
        save_file(dict(content), folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
        return folder
    weight_map = {name: f"model-{_shard(name, shards) + 1:05}-of-{shards:05}.safetensors" for name in content}
    for file in sorted(set(weight_map.values())):
        part = {name: tensor for name, tensor in content.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in content.values())
    index = {"metadata": {"total_size": total, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shard(name: str, shards: int) -> int:
    """The embedding lies with the first layers, and what follows the layers in the last shard."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is None:
        return 0 if "embeddings" in name else shards - 1
    return int(layer[1]) * min(shards, LAYERS) // LAYERS


def write_state_spaces_source(folder: Path, config: Mapping[str, Any] = STATE_SPACES_CONFIG) -> Path:
    """A folder as mamba_ssm saves it: MambaConfig's fields, one .bin file, the tied head stored too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    content = tensors()
    embedding = content.pop("backbone.embeddings.weight")
    torch.save(
        {"backbone.embedding.weight": embedding, **content, "lm_head.weight": embedding},
        folder / "pytorch_model.bin",
    )
    return folder


def source(folder: Path) -> Snapshot:
    """The snapshot of a folder."""
    return resolve(str(folder), compose=True)


def random_scales(
    shapes: Mapping[str, tuple[int, ...]], granularity: Granularity = "layer", form: Form = "linear", seed: int = 0
) -> ScaleSet:
    """Factors spread around 1.5."""
    generator = np.random.default_rng(seed)
    log_s = {
        name: (0.4 + 0.2 * generator.standard_normal(factor_shape(shape, granularity))).astype(np.float32)
        for name, shape in shapes.items()
    }
    return ScaleSet(form, granularity, log_s)


def is_identity(scales: ScaleSet) -> bool:
    """Whether every factor is exactly 1."""
    return not any(values.any() for values in scales.log_s.values())
