"""Tiny random models of every architecture of stock transformers that has an A_log."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 256

_HIDDEN = {"vocab_size": VOCABULARY, "hidden_size": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
_GATED_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA2_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32}
_QWEN = {**_HIDDEN, **_TOKENS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **_GATED_DELTA}

SETTINGS: dict[str, dict[str, Any]] = {
    "mamba": {**_HIDDEN, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        **_HIDDEN,
        **_TOKENS,
        "num_hidden_layers": 2,
        "state_size": 16,
        "head_dim": 32,
        "num_heads": 4,
        "n_groups": 1,
        "chunk_size": 32,
    },
    "falcon_mamba": {**_HIDDEN, "num_hidden_layers": 2, "state_size": 8},
    "jamba": {
        **_HIDDEN,
        **_ATTENTION,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "zamba": {
        **_HIDDEN,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **_HIDDEN,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "chunk_size": 32,
        "use_mamba_kernels": False,
    },
    "bamba": {**_HIDDEN, **_ATTENTION, **_MAMBA2_HEADS, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {**_HIDDEN, **_ATTENTION, **_MAMBA2_HEADS, "num_hidden_layers": 2, "mamba_d_ssm": 128},
    "granitemoehybrid": {
        **_HIDDEN,
        **_TOKENS,
        **_ATTENTION,
        **_MAMBA2_HEADS,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        **_HIDDEN,
        **_ATTENTION,
        "head_dim": 16,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 32,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {**_QWEN, **_EXPERTS, "num_hidden_layers": 4, "intermediate_size": 128},
    "qwen3_5_text": {**_QWEN, "num_hidden_layers": 4, "intermediate_size": 128},
    "qwen3_5_moe_text": {**_QWEN, **_EXPERTS, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        **_QWEN,
        **_EXPERTS,
        "num_hidden_layers": 4,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "olmo_hybrid": {
        **_HIDDEN,
        **_TOKENS,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
    },
    "kimi_linear": {
        **_HIDDEN,
        **_TOKENS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "intermediate_size": 128,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
"""The smallest settings of each architecture that run, by the model type that config.json gets."""


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of at most four layers, in evaluation mode, with every A_log different from the next."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **SETTINGS[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1.0, 2.0)
    return model.to(dtype).eval()
