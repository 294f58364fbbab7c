"""A checkpoint of any size without a trained model: a Mamba-2 in the transformers layout, of random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from converter.layouts import Checkpoint
from converter.safetensors_file import TensorInfo, from_float64, header_bytes, in_aligned_order
from converter.scales import ScaleSet

_BLOCK = 1 << 22
TOKENIZER = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


def write_checkpoint(folder: Path, *, hidden: int, layers: int, shards: int, vocabulary: int = 50288) -> None:
    """Write random bf16 weights, A_log included, with config, index and a tokenizer's file.

    Args:
        hidden: 2560 with 64 layers has the shapes of mamba2-2.7b, 5.4 GB.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": 2 * hidden // 64,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    infos = list(_tensors(hidden, layers, vocabulary))
    total, weight_map = sum(info.nbytes for info in infos), {}
    parts: list[list[TensorInfo]] = [[] for _ in range(shards)]
    written = 0
    for info in infos:
        parts[min(written * shards // total, shards - 1)].append(info)
        written += info.nbytes
    block = from_float64(np.random.default_rng(0).standard_normal(_BLOCK // 2), "BF16")
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys([info.name for info in part], name)
        part = in_aligned_order(part)
        with open(folder / name, "wb") as file:
            file.write(header_bytes(part, {"format": "pt"}))
            for info in part:
                for start in range(0, info.nbytes, _BLOCK):
                    file.write(block[: min(_BLOCK, info.nbytes - start)])
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(hidden: int, layers: int, vocabulary: int) -> Iterator[TensorInfo]:
    inner, heads = 2 * hidden, 2 * hidden // 64
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (hidden,),
        "mixer.A_log": (heads,),
        "mixer.D": (heads,),
        "mixer.conv1d.bias": (inner + 256,),
        "mixer.conv1d.weight": (inner + 256, 1, 4),
        "mixer.dt_bias": (heads,),
        "mixer.in_proj.weight": (2 * inner + 256 + heads, hidden),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (hidden, inner),
    }
    yield TensorInfo("backbone.embeddings.weight", "BF16", (vocabulary, hidden))
    for layer in range(layers):
        for name, shape in shapes.items():
            yield TensorInfo(f"backbone.layers.{layer}.{name}", "BF16", shape)
    yield TensorInfo("backbone.norm_f.weight", "BF16", (hidden,))


def constant_scales(checkpoint: Checkpoint, factor: float) -> ScaleSet:
    """One factor for every layer of a checkpoint."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    ones = ScaleSet.ones(shapes, "layer", "linear")
    return ScaleSet(
        "linear", "layer", {name: zero + np.float32(np.log(factor)) for name, zero in ones.log_s.items()}
    )
