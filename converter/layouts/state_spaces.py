"""The state-spaces layout, which mamba_ssm loads, against the transformers layout: configs and tensor names.

Both directions were checked against mamba_ssm 2.3 and transformers 5.23. What one side cannot express is
refused by the name of the feature.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from converter.disk import require_space
from converter.errors import LayoutError, VerificationError
from converter.layouts.architectures import MAMBA_3
from converter.layouts.checkpoint import TRANSFORMERS_EMBEDDING, Checkpoint, Tensor, WeightFile
from converter.layouts.config_values import Config, flag, index_list, section, whole_number, wrong
from converter.safetensors_file import parse_json_object
from converter.shards import TorchShard
from converter.source import Snapshot

SUBFOLDER = "state-spaces"
COPIED_CONFIG = f"{SUBFOLDER}/config.json"
COPIED_WEIGHTS = f"{SUBFOLDER}/pytorch_model.bin"
EMBEDDING = "backbone.embedding.weight"
LM_HEAD = "lm_head.weight"

# The fields of MambaConfig, in its order: any other key is a TypeError there.
CONFIG_FIELDS = (
    *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
    *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
)
# Arguments of the mixers that shape initialisation or speed alone.
_WITHOUT_EFFECT = frozenset(
    {"layer", "dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "A_init_range", "conv_init"}
    | {"use_fast_path", "use_mem_eff_path"}
)
_MAPPED = {
    "Mamba1": frozenset({"d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"}),
    "Mamba2": frozenset({"d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"})
    | {"dt_limit", "bias", "conv_bias"},
}
# Features without counterpart in transformers, with the value that means "not used".
_FEATURES_OFF: dict[str, Any] = {
    "rmsnorm": True,
    "norm_before_gate": False,
    "d_ssm": None,
    "D_has_hdim": False,
    "process_group": None,
    "sequence_parallel": True,
}


def is_state_spaces(config: Config) -> bool:
    """Whether config.json is one of mamba_ssm's."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def mixer_kind(config: Config) -> str:
    """``Mamba1`` or ``Mamba2``. Raises LayoutError for any other layer."""
    layer = section(config, "ssm_cfg").get("layer", "Mamba1")
    if layer == "Mamba3":
        raise LayoutError(f"{MAMBA_3}.", "There is no way to convert it.")
    if layer not in _MAPPED:
        raise _refuse(f"ssm_cfg.layer = {layer!r}")
    return str(layer)


def padded_vocab_size(config: Config) -> int:
    """Rows of the embedding table: vocab_size rounded up to pad_vocab_size_multiple."""
    multiple = whole_number(config, "pad_vocab_size_multiple", 8)
    return math.ceil(whole_number(config, "vocab_size", 50277) / multiple) * multiple


def to_transformers_config(config: Config, token_id: int) -> dict[str, Any]:
    """config.json of the transformers layout, without ``dtype``.

    Args:
        config: config.json of the state-spaces layout.
        token_id: the tokenizer's one special token, which begins, ends and pads.

    Raises:
        LayoutError: a feature that transformers cannot express.
    """
    kind, ssm = mixer_kind(config), section(config, "ssm_cfg")
    _refuse_features(config, ssm, kind)
    d_model, expand = whole_number(config, "d_model"), whole_number(ssm, "expand", 2)
    common: dict[str, Any] = {
        "architectures": ["MambaForCausalLM" if kind == "Mamba1" else "Mamba2ForCausalLM"],
        "model_type": "mamba" if kind == "Mamba1" else "mamba2",
        "vocab_size": padded_vocab_size(config),
        "hidden_size": d_model,
        "num_hidden_layers": whole_number(config, "n_layer"),
        "state_size": whole_number(ssm, "d_state", 16 if kind == "Mamba1" else 128),
        "conv_kernel": whole_number(ssm, "d_conv", 4),
        "expand": expand,
        "use_bias": flag(ssm, "bias", False),
        "use_conv_bias": flag(ssm, "conv_bias", True),
        "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": flag(config, "residual_in_fp32", True),
        "tie_word_embeddings": flag(config, "tie_embeddings", True),
        **special_tokens(token_id),
        "use_cache": True,
    }
    if kind == "Mamba1":
        rank = ssm.get("dt_rank", "auto")
        return common | {
            "intermediate_size": expand * d_model,
            "time_step_rank": math.ceil(d_model / 16) if rank == "auto" else whole_number(ssm, "dt_rank"),
        }
    head_dim = whole_number(ssm, "headdim", 64)
    if expand * d_model % head_dim:
        raise LayoutError(f"config.json: heads of {head_dim} do not divide the inner width {expand * d_model}.")
    return common | {
        "head_dim": head_dim,
        "num_heads": expand * d_model // head_dim,
        "n_groups": whole_number(ssm, "ngroups", 1),
        "chunk_size": whole_number(ssm, "chunk_size", 256),
        **_limit("time_step_limit", ssm.get("dt_limit")),
    }


def special_tokens(token_id: int) -> dict[str, int]:
    """The entries of config.json for a tokenizer with one special token, which begins, ends and pads."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), token_id)


def _limit(key: str, limit: Any) -> dict[str, list[float]]:
    """The bounds of the time step under ``key``, or nothing if they leave every step as it is."""
    if limit is None:
        return {}
    # transformers writes infinity as {"__float__": "Infinity"}.
    ends = (
        [math.inf if end == {"__float__": "Infinity"} else end for end in limit] if isinstance(limit, list) else []
    )
    if len(ends) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise wrong(key, limit, "a pair of numbers")
    return {} if ends == [0, math.inf] else {key: ends}


def _refuse_features(config: Config, ssm: Config, kind: str) -> None:
    if index_list(config, "attn_layer_idx"):
        raise _refuse("attention layers (attn_layer_idx)")
    if config.get("d_intermediate", 0) != 0:
        raise _refuse(f"feed-forward layers (d_intermediate = {config['d_intermediate']!r})")
    if not flag(config, "rms_norm", True):
        raise _refuse("LayerNorm in place of RMSNorm (rms_norm = false)")
    for key, value in ssm.items():
        if key in _FEATURES_OFF and value == _FEATURES_OFF[key]:
            continue
        if key not in _WITHOUT_EFFECT | _MAPPED[kind]:
            raise _refuse(f"ssm_cfg.{key} = {value!r}")


def _refuse(feature: str) -> LayoutError:
    return LayoutError(
        f"This checkpoint uses {feature}, which the Mamba models of transformers do not have.",
        "It can only be run by mamba_ssm; there is no way to convert it.",
    )


def to_state_spaces_config(config: Config) -> dict[str, Any]:
    """config.json of the state-spaces layout, with exactly MambaConfig's fields.

    Args:
        config: config.json of a ``mamba`` or ``mamba2`` model of transformers; missing values have its defaults.

    Raises:
        LayoutError: another architecture, or a feature that mamba_ssm cannot express.
    """
    model_type = config.get("model_type")
    if model_type not in ("mamba", "mamba2"):
        raise LayoutError(f"A model of type {model_type!r} has no state-spaces layout.", "Leave --layout out.")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise LayoutError(f"mamba_ssm has no activation {config['hidden_act']!r}.", "Leave --layout out.")
    if config.get("layer_norm_epsilon", 1e-5) != 1e-5:
        raise LayoutError("mamba_ssm has layer_norm_epsilon 1e-5 only.", "Leave --layout out.")
    first = model_type == "mamba"
    d_model = whole_number(config, "hidden_size", 768 if first else 4096)
    ssm: dict[str, Any] = {
        "layer": "Mamba1" if first else "Mamba2",
        "d_state": whole_number(config, "state_size", 16 if first else 128),
        "d_conv": whole_number(config, "conv_kernel", 4),
        "expand": whole_number(config, "expand", 2),
        "bias": flag(config, "use_bias", False),
        "conv_bias": flag(config, "use_conv_bias", True),
    }
    if first:
        rank = config.get("time_step_rank", "auto")
        ssm["dt_rank"] = rank if rank == "auto" else whole_number(config, "time_step_rank")
    else:
        ssm["headdim"] = whole_number(config, "head_dim", 64)
        ssm["ngroups"] = whole_number(config, "n_groups", 8)
        ssm["chunk_size"] = whole_number(config, "chunk_size", 256)
        ssm |= _limit("dt_limit", config.get("time_step_limit"))
    return {
        "d_model": d_model,
        "d_intermediate": 0,
        "n_layer": whole_number(config, "num_hidden_layers", 32 if first else 64),
        "vocab_size": whole_number(config, "vocab_size", 50280 if first else 32768),
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": flag(config, "residual_in_fp32", True),
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": flag(config, "tie_word_embeddings", first),
    }


def to_transformers_name(name: str) -> str:
    """A tensor's name in the transformers layout: every name but the embedding's is the same."""
    return TRANSFORMERS_EMBEDDING if name == EMBEDDING else name


def to_state_spaces_name(name: str) -> str:
    """The inverse of :func:`to_transformers_name`."""
    return EMBEDDING if name == TRANSFORMERS_EMBEDDING else name


def check_expressible(checkpoint: Checkpoint) -> None:
    """Raise LayoutError if the model has a feature that mamba_ssm cannot express."""
    _config_of(checkpoint)


def write_state_spaces(checkpoint: Checkpoint, folder: Path, subfolder: Path) -> None:
    """Write the baked model once more, as mamba_ssm loads it by path: config.json and pytorch_model.bin.

    Args:
        checkpoint: what was baked; its own config.json is kept where it came in this layout.
        folder: the baked copy in the transformers layout.
        subfolder: created here.

    Raises:
        LayoutError: a feature that mamba_ssm cannot express.
        OutputError: not enough room.
    """
    import torch
    from safetensors.torch import load_file

    config = _config_of(checkpoint)
    require_space(folder, checkpoint.total_bytes())
    subfolder.mkdir()
    (subfolder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        to_state_spaces_name(name): tensor
        for file in checkpoint.files
        for name, tensor in load_file(folder / file.name).items()
    }
    if flag(config, "tie_embeddings", True):
        tensors[LM_HEAD] = tensors[EMBEDDING]
    torch.save(tensors, subfolder / "pytorch_model.bin")


def read_copy(converted: Snapshot, base: Checkpoint) -> WeightFile:
    """What :func:`write_state_spaces` wrote, its tensors under their names in the transformers layout.

    A tied head is there as one more tensor with the embedding's name.

    Raises:
        VerificationError: config.json is not what the base's gives, or a tied pair is not whole.
        CorruptCheckpointError: no file of tensors.
    """
    config = _config_of(base)
    if parse_json_object(converted.read(COPIED_CONFIG), COPIED_CONFIG) != config:
        raise VerificationError(f"{COPIED_CONFIG} is not what the base's config.json gives.", "Convert again.")
    path = converted.fetch(COPIED_WEIGHTS)
    shard = TorchShard.open(COPIED_WEIGHTS, path, lambda: converted.open(COPIED_WEIGHTS))
    names = {info.name: to_transformers_name(info.name) for info in shard.tensors}
    if flag(config, "tie_embeddings", True):
        if missing := {EMBEDDING, LM_HEAD} - names.keys():
            raise VerificationError(f"{COPIED_WEIGHTS} has no {min(missing)}.", "Convert again.")
        names[LM_HEAD] = TRANSFORMERS_EMBEDDING
    return WeightFile(COPIED_WEIGHTS, shard, tuple(Tensor(names[info.name], info, shard) for info in shard.tensors))


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a copy in this layout: the source's own where it came in it."""
    if checkpoint.layout == "transformers":
        return to_state_spaces_config(checkpoint.config)
    source = parse_json_object(checkpoint.snapshot.read("config.json"), "config.json")
    return {key: source[key] for key in CONFIG_FIELDS if key in source}
