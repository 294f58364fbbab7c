"""Recognising layouts and architectures, mapping configs, and refusing by the name of the feature."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.commands.opening import is_loadable
from converter.errors import CorruptCheckpointError, LayoutError
from converter.layouts import read_checkpoint
from converter.layouts.architectures import ARCHITECTURES
from converter.layouts.state_spaces import to_transformers_config
from converter.source import resolve
from tests.small_checkpoints import (
    CONFIG,
    STATE_SPACES_CONFIG,
    source,
    tensors,
    write_state_spaces_source,
    write_transformers,
)

# The mapping of configs

# What mamba_ssm and transformers call an argument of the mixer, and its default.
SSM_FIELDS: dict[str, list[tuple[str, str, Any]]] = {
    "mamba": [
        *(("d_state", "state_size", 16), ("d_conv", "conv_kernel", 4), ("expand", "expand", 2)),
        *(("dt_rank", "time_step_rank", "auto"), ("bias", "use_bias", False), ("conv_bias", "use_conv_bias", True)),
    ],
    "mamba2": [
        *(("d_state", "state_size", 128), ("d_conv", "conv_kernel", 4), ("expand", "expand", 2)),
        *(("headdim", "head_dim", 64), ("ngroups", "n_groups", 1), ("chunk_size", "chunk_size", 256)),
        *(("bias", "use_bias", False), ("conv_bias", "use_conv_bias", True)),
        ("dt_limit", "time_step_limit", [0.0, math.inf]),
    ],
}


@st.composite
def state_spaces_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs that mamba_ssm accepts and transformers can express."""
    kind = draw(st.sampled_from(["Mamba1", "Mamba2"]))
    ssm: dict[str, Any] = {"layer": kind} if kind == "Mamba2" or draw(st.booleans()) else {}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "d_state": st.sampled_from([16, 64, 128]),
        "d_conv": st.integers(2, 4),
        "expand": st.integers(1, 4),
        "bias": st.booleans(),
        "conv_bias": st.booleans(),
        "dt_min": st.floats(1e-4, 1e-2),
        "dt_max": st.floats(1e-2, 1),
    }
    if kind == "Mamba1":
        optional |= {"dt_rank": st.just("auto") | st.integers(1, 64), "dt_scale": st.floats(0.1, 2)}
    else:
        optional |= {
            "headdim": st.sampled_from([16, 32]),
            "ngroups": st.integers(1, 8),
            "chunk_size": st.sampled_from([64, 256]),
            "dt_limit": st.sampled_from([[0.0, math.inf], [0.001, 0.1], [0.0, 1.0]]),
            "rmsnorm": st.just(True),
            "norm_before_gate": st.just(False),
            "D_has_hdim": st.just(False),
        }
    for key, values in optional.items():
        if draw(st.booleans()):
            ssm[key] = draw(values)
    config = {
        "d_model": 64 * draw(st.integers(1, 8)),
        "n_layer": draw(st.integers(1, 64)),
        "vocab_size": draw(st.integers(1, 60000)),
        "ssm_cfg": ssm,
    }
    for key, values in {
        "rms_norm": st.just(True),
        "residual_in_fp32": st.booleans(),
        "fused_add_norm": st.booleans(),
        "tie_embeddings": st.booleans(),
        "pad_vocab_size_multiple": st.sampled_from([1, 8, 16]),
        "attn_layer_idx": st.just([]),
        "d_intermediate": st.just(0),
    }.items():
        if draw(st.booleans()):
            config[key] = draw(values)
    return config


@settings(deadline=None)
@given(state_spaces_configs())
def test_stock_config_classes_take_the_mapped_config(config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    mapped = to_transformers_config(config, 0)
    stock = AutoConfig.for_model(**{key: value for key, value in mapped.items() if key != "architectures"})
    assert stock.hidden_size == config["d_model"]
    assert stock.vocab_size >= config["vocab_size"]
    assert stock.vocab_size % config.get("pad_vocab_size_multiple", 8) == 0
    assert stock.tie_word_embeddings is config.get("tie_embeddings", True)
    assert stock.num_hidden_layers == config["n_layer"]
    assert stock.residual_in_fp32 is config.get("residual_in_fp32", True)
    for ours, theirs, default in SSM_FIELDS[stock.model_type]:
        wanted = config["ssm_cfg"].get(ours, default)
        if wanted == "auto":
            wanted = math.ceil(config["d_model"] / 16)
        found = getattr(stock, theirs)
        assert (list(found) if ours == "dt_limit" else found) == wanted, theirs


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"attn_layer_idx": [3]}, "attn_layer_idx"),
        ({"d_intermediate": 512}, "d_intermediate"),
        ({"rms_norm": False}, "rms_norm"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "ssm_cfg.d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "ssm_cfg.layer = 'Mamba9'"),
        ({"ssm_cfg": {"layer": "Mamba1", "headdim": 64}}, "ssm_cfg.headdim"),
    ],
)
def test_state_spaces_feature_without_counterpart_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], feature: str
) -> None:
    folder = write_state_spaces_source(tmp_path / "model", {**STATE_SPACES_CONFIG, **change})
    with pytest.raises(LayoutError, match=f"uses .*{re.escape(feature)}"):
        read_checkpoint(source(folder))


# Reading


def test_state_spaces_checkpoint_is_read_as_its_copy_will_be(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(source(write_state_spaces_source(tmp_path / "model")))
    assert (checkpoint.layout, checkpoint.model_type, checkpoint.load_dtype) == (
        "state-spaces",
        "mamba2",
        "bfloat16",
    )
    assert checkpoint.config["vocab_size"] == 32 and checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.files[0].name == "model.safetensors"
    assert "backbone.embeddings.weight" in checkpoint.tensors and "lm_head.weight" not in checkpoint.tensors
    checkpoint.check_values()


def test_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    content["lm_head.weight"] = content["lm_head.weight"] + 1
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(LayoutError, match="ties lm_head to the embedding, but the two differ"):
        read_checkpoint(source(folder)).check_values()
    (folder / "config.json").write_text(json.dumps({**STATE_SPACES_CONFIG, "tie_embeddings": False}))
    untied = read_checkpoint(source(folder))
    untied.check_values()
    assert "lm_head.weight" in untied.tensors and untied.config["tie_word_embeddings"] is False


def test_special_token_is_the_tokenizers(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<end>"}]}))
    config = read_checkpoint(source(folder)).config
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [7, 7, 7]
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.json is damaged"):
        read_checkpoint(source(folder))


def test_vocabulary_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "model", {**STATE_SPACES_CONFIG, "vocab_size": 100})
    with pytest.raises(LayoutError, match=r"should have the shape \(112, 16\)"):
        read_checkpoint(source(folder))


def test_dtype_is_the_configs_else_the_one_most_weights_have(tmp_path: Path) -> None:
    named = read_checkpoint(
        source(write_transformers(tmp_path / "named", config={**CONFIG, "torch_dtype": "float16"}))
    )
    assert named.load_dtype == "float16" and "dtype" not in named.config
    without = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    for name, config in (("missing", without), ("null", {**without, "dtype": None})):
        counted = read_checkpoint(source(write_transformers(tmp_path / name, config=config)))
        assert counted.load_dtype == "bfloat16" and counted.config["dtype"] == "bfloat16"


# Which layers have an A_log


def fake_checkpoint(folder: Path, config: dict[str, Any], names: list[str], shape: tuple[int, ...] = (4,)) -> Path:
    """A checkpoint of nothing but these tensors."""
    content = {name: torch.ones(shape) for name in [*names, "model.norm.weight"]}
    return write_transformers(folder, config=config, content=content)


def A_logs(pattern: str, layers: list[int]) -> list[str]:
    """Names of A_log tensors in the layers given."""
    return [pattern.format(layer) + ".A_log" for layer in layers]


QWEN, MAMBA = "model.layers.{}.linear_attn", "model.layers.{}.mamba"
PUBLISHED: list[tuple[dict[str, Any], str, tuple[int, ...], list[int], list[int]]] = [
    # Spellings of published config.json files: config, key, shape, layers with A_log, attention layers.
    (
        {"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 8, "attn_layer_offset": 4},
        *(MAMBA, (4, 2), [0, 1, 2, 3, 5, 6, 7], [4]),
    ),
    (
        {"model_type": "bamba", "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
        *(MAMBA, (4,), [0, 2], [1, 3]),
    ),
    (
        {"model_type": "nemotron_h", "num_hidden_layers": 5, "hybrid_override_pattern": "M-M*E"},
        *("backbone.layers.{}.mixer", (4,), [0, 2], [3]),
    ),
    (
        {"model_type": "granitemoehybrid", "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
        *(MAMBA, (4,), [0, 2], [1]),
    ),
    (
        {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4},
        *(QWEN, (4,), [0, 1, 2, 4, 5, 6], [3, 7]),
    ),
    (
        {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "num_hidden_layers": 4}},
        *("model.language_model.layers.{}.linear_attn", (4,), [0, 1, 2], [3]),
    ),
    (
        {
            "model_type": "kimi_linear",
            "num_hidden_layers": 4,
            "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4]},
        },
        *("model.layers.{}.self_attn", (1, 1, 4, 1), [0, 1, 2], [3]),
    ),
    (
        {"model_type": "bailing_hybrid", "num_hidden_layers": 6, "layer_group_size": 3, "kda_safe_gate": False},
        *("model.layers.{}.attention", (4,), [0, 1, 3, 4], [2, 5]),
    ),
    (
        {
            "model_type": "glm5_next",
            "text_config": {
                "model_type": "glm5_next_text",
                "num_hidden_layers": 4,
                "linear_attn_config": {"safe_gate": False, "gate_lower_bound": None},
            },
        },
        *("model.language_model.layers.{}.self_attn", (4,), [0, 1, 2], [3]),
    ),
]


@pytest.mark.parametrize(
    ("config", "pattern", "shape", "layers", "attention"),
    PUBLISHED,
    ids=[str(case[0]["model_type"]) for case in PUBLISHED],
)
def test_published_spellings_of_configs_promise_the_right_layers(
    tmp_path: Path,
    config: dict[str, Any],
    pattern: str,
    shape: tuple[int, ...],
    layers: list[int],
    attention: list[int],
) -> None:
    checkpoint = read_checkpoint(
        source(fake_checkpoint(tmp_path / "model", config, A_logs(pattern, layers), shape))
    )
    assert list(checkpoint.A_log) == A_logs(pattern, layers)
    assert checkpoint.attention_layers == tuple(attention)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_layer_kinds_are_those_of_the_stock_config_class(model_type: str) -> None:
    from transformers import AutoConfig

    stock = AutoConfig.for_model(model_type)
    stock = stock.get_text_config()
    config = {"num_hidden_layers": stock.num_hidden_layers}
    kinds = [kind.replace("indexed_", "full_") for kind in stock.layer_types]
    ours = ARCHITECTURES[model_type].kinds(config)
    assert [kind if kind != "other" else "" for kind in ours] == [
        kind if kind not in ("moe", "mlp") else "" for kind in kinds
    ]


@pytest.mark.parametrize(
    ("layers", "said"), [([0, 2], r"missing in layers: \[1\]"), ([0, 1, 2, 3], r"unexpected in layers: \[3\]")]
)
def test_layers_and_keys_must_agree(tmp_path: Path, layers: list[int], said: str) -> None:
    names = A_logs("backbone.layers.{}.mixer", layers)
    with pytest.raises(LayoutError, match=said):
        read_checkpoint(source(fake_checkpoint(tmp_path / "model", CONFIG, names)))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "glm5_next"},
        {"model_type": "bailing_hybrid"},
        {"model_type": "kimi_linear", "linear_attn_config": {"safe_gate": True}},
        {"model_type": "kimi_linear", "linear_attn_config": {"gate_lower_bound": -5.0}},
        {"model_type": "kda", "use_safe_gate": True},
    ],
)
def test_safe_gate_is_refused_with_the_reason(tmp_path: Path, config: dict[str, object]) -> None:
    config = {**config, "num_hidden_layers": 4}
    folder = fake_checkpoint(tmp_path / "model", config, A_logs("model.layers.{}.self_attn", [0, 1, 2]))
    with pytest.raises(LayoutError, match="safe gate computes lower_bound"):
        read_checkpoint(source(folder))


def test_unknown_architecture_asks_for_trust(tmp_path: Path) -> None:
    names = [*A_logs("net.blocks.{}.ssm", [0, 10, 9]), "net.catalog_A_log_notes"]
    folder = fake_checkpoint(tmp_path / "model", {"model_type": "novel"}, names)
    with pytest.raises(LayoutError, match="novel is not known here, but has 3 tensors named A_log") as caught:
        read_checkpoint(source(folder))
    assert "--trust-a-log" in caught.value.fix
    trusted = read_checkpoint(source(folder), trust_a_log=True)
    assert list(trusted.A_log) == A_logs("net.blocks.{}.ssm", [0, 9, 10])


@pytest.mark.parametrize("trust", [False, True])
def test_model_without_A_log_is_refused(tmp_path: Path, trust: bool) -> None:
    folder = fake_checkpoint(tmp_path / "model", {"model_type": "gpt2"}, ["h.0.attn.weight"])
    with pytest.raises(LayoutError, match="gpt2 is not a model with a state transition matrix"):
        read_checkpoint(source(folder), trust_a_log=trust)


def test_known_model_without_any_such_layer_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}
    with pytest.raises(LayoutError, match="no layer with an A_log"):
        read_checkpoint(source(fake_checkpoint(tmp_path / "model", config, ["x"])))


def test_A_log_where_the_architecture_has_none_is_refused(tmp_path: Path) -> None:
    names = [*A_logs("backbone.layers.{}.mixer", [0, 1, 2]), "backbone.extra.A_log"]
    with pytest.raises(LayoutError, match=r"keeps no A_log under the name backbone\.extra\.A_log"):
        read_checkpoint(source(fake_checkpoint(tmp_path / "model", CONFIG, names)))


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ({"torch_dtype": "torch.float16"}, {"torch_dtype": "float16"}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"torch_dtype": "auto"}, {"torch_dtype": None, "dtype": "bfloat16"}),
        ({"text_config": {**CONFIG, "dtype": "torch.float16"}}, {"text_config": {**CONFIG, "dtype": "float16"}}),
    ],
)
def test_dtype_in_other_words_is_written_as_stock_code_reads_it(
    tmp_path: Path, named: dict[str, Any], taken: dict[str, Any]
) -> None:
    without = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    checkpoint = read_checkpoint(source(write_transformers(tmp_path / "model", config={**without, **named})))
    assert checkpoint.config == {**without, **taken} and not is_loadable(checkpoint)
    assert checkpoint.load_dtype == ("bfloat16" if "auto" in named.values() else "float16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'; a positive whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
        ({"layer_types": "mamba"}, "layer_types = 'mamba'; a list of words"),
        ({"layer_types": [1, 2, 3]}, "layer_types = "),
        ({"model_type": 5}, "names no model_type"),
        ({"model_type": None}, "names no model_type"),
        ({"text_config": [1]}, "text_config = "),
        ({"chunk_size": 0}, "chunk_size = 0; a positive whole number"),
        ({"chunk_size": "64"}, "chunk_size = '64'"),
        ({"torch_dtype": 16}, "dtype = 16"),
        ({"torch_dtype": "int8"}, "dtype = 'int8'"),
    ],
)
def test_config_with_wrong_types_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_transformers(tmp_path / "model", config={**CONFIG, **change})
    with pytest.raises(LayoutError, match=re.escape(said)):
        read_checkpoint(source(folder))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("A_log", torch.zeros(4, dtype=torch.int32), "stored as I32"),
        ("A_log", torch.zeros(4, dtype=torch.float8_e4m3fn), "stored as F8_E4M3"),
        ("A_log", torch.zeros(4, 4), r"has the shape \(4, 4\)"),
        ("A_log", torch.zeros(0), r"has the shape \(0,\)"),
        ("A_log", torch.zeros(5), r"has the shape"),
        ("A_log", torch.tensor([0.0, math.nan, 0.0, 0.0]), "holds NaN or infinity"),
        ("A_log", torch.tensor([0.0, -math.inf, 0.0, 0.0]), "holds NaN or infinity"),
    ],
)
def test_A_log_that_cannot_be_one_is_refused(tmp_path: Path, name: str, value: torch.Tensor, said: str) -> None:
    content = {**tensors(), f"backbone.layers.1.mixer.{name}": value}
    folder = write_transformers(tmp_path / "model", content=content)
    with pytest.raises(LayoutError, match=said):
        read_checkpoint(source(folder)).check_values()


def test_demo_layers_are_all_found() -> None:
    assert [len(read_checkpoint(resolve(demo)).A_log) for demo in ("demo:mamba2", "demo:mamba")] == [6, 8]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba3"}, "Mamba-3 computes A from its input"),
        ({"d_model": 64, "n_layer": 2, "vocab_size": 256, "ssm_cfg": {"layer": "Mamba3"}}, "Mamba-3 computes A"),
        ({"model_type": "rwkv7"}, "RWKV computes its decay"),
        ({"model_type": "minimax_m1"}, "MiniMax decays by fixed slopes"),
        (
            {"model_type": "mixtral", "architectures": ["MiniMaxText01ForCausalLM"]},
            "MiniMax decays by fixed slopes",
        ),
        ({"model_type": "bailing_moe_linear"}, "Ling and Ring decay by fixed slopes"),
        (
            {"model_type": "granite", "architectures": ["GraniteForCausalLM"]},
            "attention throughout",
        ),
    ],
)
def test_families_without_an_A_log_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    folder = write_transformers(tmp_path / "model", config=config)
    with pytest.raises(LayoutError, match=reason):
        read_checkpoint(source(folder))


@pytest.mark.parametrize(
    ("config", "prefix", "name"),
    [
        ({"model_type": "plamo2", "auto_map": {}}, "model.layers.layers.0.mixer", "PLaMo-2"),
        ({"model_type": "phi4flash", "auto_map": {}}, "model.layers.0.attn", "Phi-4-mini-flash"),
        ({"model_type": "gdn2"}, "model.layers.0.attn", "GDN-2"),
        ({"model_type": "another", "auto_map": {}}, "model.layers.0.mixer", "another"),
    ],
)
def test_models_whose_own_code_would_have_to_run_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], prefix: str, name: str
) -> None:
    content = {f"{prefix}.A_log": torch.zeros(4), f"{prefix}.D": torch.ones(4)}
    folder = write_transformers(tmp_path / "model", config=config, content=content)
    with pytest.raises(LayoutError, match=f"^{name} needs code of its own, which is not run") as refused:
        read_checkpoint(source(folder))
    assert "--trust-a-log" in refused.value.fix
    assert list(read_checkpoint(source(folder), trust_a_log=True).A_log) == [f"{prefix}.A_log"]


def test_layers_that_predict_ahead_with_an_A_of_their_own_are_refused(tmp_path: Path) -> None:
    content = tensors() | {"mtp.layers.0.mixer.A_log": torch.zeros(4)}
    folder = write_transformers(tmp_path / "model", content=content)
    with pytest.raises(LayoutError, match=r"predict several tokens at once .*mtp\.layers\.0"):
        read_checkpoint(source(folder))
