"""From the state-spaces layout, which mamba_ssm loads, to the transformers layout: configs and tensor names.

Checked against mamba_ssm 2.3 and transformers 5.23. What transformers cannot express is refused by the name of the
feature.
"""

from __future__ import annotations

import math
from typing import Any

from converter.errors import LayoutError
from converter.layouts.architectures import MAMBA_3
from converter.layouts.config_values import Config, flag, listed, section, whole_number, wrong

EMBEDDING = "backbone.embedding.weight"
LM_HEAD = "lm_head.weight"

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
    multiple = whole_number(config, "pad_vocab_size_multiple", 8)
    common: dict[str, Any] = {
        "architectures": ["MambaForCausalLM" if kind == "Mamba1" else "Mamba2ForCausalLM"],
        "model_type": "mamba" if kind == "Mamba1" else "mamba2",
        "vocab_size": math.ceil(whole_number(config, "vocab_size", 50277) / multiple) * multiple,
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
        **_time_step_limit(ssm.get("dt_limit")),
    }


def special_tokens(token_id: int) -> dict[str, int]:
    """The entries of config.json for a tokenizer with one special token, which begins, ends and pads."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), token_id)


def _time_step_limit(limit: Any) -> dict[str, list[float]]:
    """The bounds of the time step, or nothing if they leave every step as it is."""
    if limit is None:
        return {}
    ends = limit if isinstance(limit, list) else []
    if len(ends) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise wrong("dt_limit", limit, "a pair of numbers")
    return {} if ends == [0, math.inf] else {"time_step_limit": ends}


def _refuse_features(config: Config, ssm: Config, kind: str) -> None:
    if listed(config, "attn_layer_idx", int):
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
