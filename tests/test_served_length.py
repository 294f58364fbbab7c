"""How long a text a converted folder says it takes, by its config and by the servers' own functions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from converter.errors import UsageError, VerificationError
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.proof import verify
from tests.consumers.servers import SGLANG, VLLM, sglang_length, vllm_length
from tests.small_checkpoints import source
from tests.test_inspect import mmod, succeed
from tests.tiny_folders import tiny_folder
from tests.tiny_models import tiny_model

TARGET = 1 << 21
# Whether attention has position embeddings, so that the length stays unless it is asked for.
MODELS = {
    "mamba": False,
    "mamba2": False,
    "falcon_mamba": False,
    "jamba": False,
    "nemotron_h": False,
    "granitemoehybrid": False,
    "falcon_h1": True,
    "qwen3_next": True,
    "zamba2": False,
    "bamba": True,
}


def convert(folder: Path, output: Path, *words: str) -> Path:
    constant = ("--method", "constant", "--factor", "1.5", "--target-len", "2M")
    succeed("convert", folder, "--output", output, *constant, *words)
    return output


def config_of(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed


@pytest.mark.parametrize("model_type", MODELS)
def test_length_is_stated_where_no_position_depends_on_it(tmp_path: Path, model_type: str) -> None:
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    before = config_of(model).get("max_position_embeddings")
    out = convert(model, tmp_path / "out")
    manifest = Manifest.read(out)
    assert manifest is not None
    stated = {key: value for key, value in config_of(out).items() if config_of(model).get(key) != value}
    assert stated == manifest.entries == ({} if MODELS[model_type] else {"max_position_embeddings": TARGET})
    assert any("--raise-position-limit" in note for note in manifest.notes) is MODELS[model_type]
    succeed("verify", out, "--base", model, "--no-load")
    if MODELS[model_type]:
        raised = convert(model, tmp_path / "raised", "--raise-position-limit")
        assert config_of(raised)["max_position_embeddings"] == TARGET
        manifest = Manifest.read(raised)
        assert manifest is not None
        assert f"raised from {before:,} to {TARGET:,} tokens" in "".join(manifest.notes)
        succeed("verify", raised, "--base", model, "--no-load")
    for fetched, length in ((VLLM, vllm_length), (SGLANG, sglang_length)):
        if fetched.is_file():
            assert length(out) == (before if MODELS[model_type] else TARGET)


@pytest.mark.skipif(not (VLLM.is_file() and SGLANG.is_file()), reason="needs vllm and sglang: make consumers")
def test_servers_do_not_know_the_length_of_the_source(tmp_path: Path) -> None:
    """What the stated length is for: without it SGLang assumes 2,048 tokens and vLLM knows no length."""
    tiny_model("mamba2").save_pretrained(tmp_path)
    assert (sglang_length(tmp_path), vllm_length(tmp_path)) == (2048, float("inf"))


def test_longer_length_stays(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("jamba").save_pretrained(model)
    config = config_of(model) | {"max_position_embeddings": 2 * TARGET, "max_seq_len": 512}
    (model / "config.json").write_text(json.dumps(config))
    out = convert(model, tmp_path / "out")
    assert config_of(out) == config | {"max_seq_len": TARGET}


def test_proof_knows_raised_lengths_and_no_other_change(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model("mamba2").save_pretrained(model)
    convert(model, out)
    base, manifest = read_checkpoint(source(model)), Manifest.read(out)
    assert manifest is not None
    config = config_of(out)

    def claim(entries: dict[str, int], change: dict[str, Any]) -> str:
        dataclasses.replace(manifest, entries=entries).write(out)
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(VerificationError) as refused:
            verify(source(out), base)
        return str(refused.value)

    longer = {"max_position_embeddings": TARGET}
    assert "differs from the base's in max_position_embeddings" in claim({}, {})
    assert "differs from the base's in max_position_embeddings" in claim(longer, {"max_position_embeddings": 7})
    assert "declares hidden_size = 4096" in claim({**longer, "hidden_size": 4096}, {"hidden_size": 4096})
    assert "differs from the base's in hidden_size" in claim(longer, {"hidden_size": 4096})
    assert "declares max_position_embeddings = 0" in claim({"max_position_embeddings": 0}, {})


def test_inspect_says_the_stated_length(tmp_path: Path) -> None:
    tiny_model("falcon_h1").save_pretrained(tmp_path)
    stated = config_of(tmp_path)["max_position_embeddings"]
    assert f"max_position_embeddings = {stated:,}" in mmod("inspect", tmp_path).stdout


def test_given_factors_are_baked_again_without_the_limit_that_was_raised_for_them(tmp_path: Path) -> None:
    model = tiny_folder("bamba", tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 512}))
    scaled = convert(model, tmp_path / "scaled", "--raise-position-limit")
    succeed("bake", model, tmp_path / "out", "--scales", scaled)
    succeed("verify", tmp_path / "out", "--base", model, "--no-load")
    manifest = Manifest.read(tmp_path / "out")
    # Factors of this method are for no length, which only the raised limit told.
    assert manifest is not None and manifest.length == TARGET and not manifest.entries
    [note] = [note for note in manifest.notes if "stated length" in note]
    assert "--raise-position-limit raises it" in note


def test_limit_is_not_raised_to_a_length_that_is_not_known(tmp_path: Path) -> None:
    model = tiny_folder("bamba", tmp_path / "model")
    scaled = convert(model, tmp_path / "scaled")
    done = mmod("bake", model, tmp_path / "out", "--scales", scaled, "--raise-position-limit")
    assert done.returncode == UsageError.exit_code and "for what length" in done.stderr
    assert not (tmp_path / "out").exists()
