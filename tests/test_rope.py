"""Rotary positions that a conversion extends: declared, loaded by stock transformers, proved, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibrator.model import load_model
from converter.errors import UsageError, VerificationError
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.proof import verify
from converter.rope import RopeExtension, rope_entries
from converter.source import resolve
from tests.test_inspect import mmod, succeed
from tests.test_served_length import config_of
from tests.tiny_models import tiny_model

CONSTANT = ("--method", "constant", "--factor", "1.5")


def saved(model_type: str, folder: Path) -> Path:
    tiny_model(model_type).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["bamba", "falcon_h1", "qwen3_next"])
@pytest.mark.parametrize("extension", ["yarn:4", "linear:2.5"])
def test_extended_positions_are_those_that_stock_transformers_loads(
    tmp_path: Path, model_type: str, extension: str
) -> None:
    model = saved(model_type, tmp_path / "model")
    length = config_of(model)["max_position_embeddings"]
    out = tmp_path / "out"
    wanted = ("--rope", extension, "--target-len", "1M")
    succeed("convert", model, "--output", out, *CONSTANT, *wanted)
    manifest = Manifest.read(out)
    assert manifest is not None and manifest.rope == extension
    assert f"extended by {extension}" in "".join(manifest.notes)
    assert f"--rope {extension}" in manifest.command
    assert f"extends the rotary positions ({extension})" in (out / "README.md").read_text()
    config = config_of(out)
    kind, factor = extension.split(":")
    rope = config.pop("rope_parameters")
    assert (rope["rope_type"], rope["factor"]) == (kind, float(factor))
    assert config.pop("max_position_embeddings") == 1 << 20
    assert rope.get("original_max_position_embeddings") == (length if kind == "yarn" else None)
    source = config_of(model)
    assert config == {
        key: source[key] for key in source if key not in ("rope_parameters", "max_position_embeddings")
    }
    succeed("verify", out, "--base", model, "--no-load")
    ids = torch.arange(40)[None] % 50
    before, after = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (model, out))
    assert not torch.equal(before, after)


def test_model_is_measured_with_the_positions_it_was_published_with(tmp_path: Path) -> None:
    model = saved("bamba", tmp_path / "model")
    for file in resolve("demo").folder.glob("tokenizer*"):
        shutil.copy(file, model)
    checkpoint = read_checkpoint(resolve(str(model)))
    where = {"keys": tuple(checkpoint.A_log), "device": torch.device("cpu")}
    (rope,) = rope_entries(checkpoint, "yarn:8").values()
    plain, extended = (load_model(model, **where, rope=rope) for rope in (None, rope))
    ids = torch.arange(60)[None] % 50
    with torch.no_grad():
        due, other = plain.hidden_states(ids), extended.hidden_states(ids)
        with extended.as_published():
            published = extended.hidden_states(ids)
        again = extended.hidden_states(ids)
    assert torch.equal(due, published) and torch.equal(other, again)
    assert not torch.equal(due, other)


@pytest.mark.parametrize(
    ("model_type", "words", "said"),
    [
        ("mamba2", "yarn:4", "no rotary positions"),
        ("jamba", "yarn:4", "no rotary positions"),
        ("granitemoehybrid", "linear:4", "no rotary positions"),
        ("bamba", "yarn", "no extension"),
        ("bamba", "yarn:1", "no extension"),
        ("bamba", "yarn:nan", "no extension"),
        ("bamba", "longrope:4", "no extension"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, model_type: str, words: str, said: str) -> None:
    model = saved(model_type, tmp_path / "model")
    refused = mmod("convert", model, "--output", tmp_path / "out", *CONSTANT, "--rope", words, "--target-len", "1M")
    assert refused.returncode == 2 and said in refused.stderr
    assert not (tmp_path / "out").exists()


def test_extension_is_not_extended_again(tmp_path: Path) -> None:
    model = saved("bamba", tmp_path / "model")
    config = config_of(model)
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="extended already"):
        rope_entries(read_checkpoint(resolve(str(model))), "yarn:4")


def test_older_configs_are_extended_under_their_own_key(tmp_path: Path) -> None:
    """Published configs of transformers 4 have ``rope_theta`` beside ``rope_scaling: null``."""
    model = saved("bamba", tmp_path / "model")
    config = config_of(model)
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (model / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    succeed("convert", model, "--output", out, *CONSTANT, "--rope", "yarn:4", "--target-len", "1M")
    assert config_of(out)["rope_scaling"]["factor"] == 4.0
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.rope_parameters["rope_type"] == "yarn"
    succeed("verify", out, "--base", model, "--no-load")


def test_another_extension_than_the_declared_is_no_proof(tmp_path: Path) -> None:
    model = saved("falcon_h1", tmp_path / "model")
    out = tmp_path / "out"
    succeed("convert", model, "--output", out, *CONSTANT, "--rope", "yarn:4", "--target-len", "1M")
    config = config_of(out)
    config["rope_parameters"]["factor"] = 5.0
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="rope_parameters"):
        verify(resolve(str(out), compose=True), read_checkpoint(resolve(str(model))))


def test_scales_are_baked_with_the_extension_they_were_found_with(tmp_path: Path) -> None:
    model = saved("bamba", tmp_path / "model")
    out = tmp_path / "out"
    succeed("convert", model, "--output", out, *CONSTANT, "--rope", "yarn:4", "--target-len", "1M")
    refused = mmod("bake", model, tmp_path / "again", "--scales", out)
    assert refused.returncode == 2 and "--rope yarn:4" in refused.stderr
    succeed("bake", model, tmp_path / "again", "--scales", out, "--rope", "yarn:4")
    assert config_of(tmp_path / "again") == config_of(out)
    succeed("verify", tmp_path / "again", "--base", model, "--no-load")


def test_words_are_read() -> None:
    assert RopeExtension.parse("linear:2.5") == RopeExtension("linear", 2.5)
