"""Rotary positions that a conversion extends: declared, loaded by stock transformers, proved, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calibrator.calibration import prepare_calibration
from calibrator.model import StockModel, load_model
from calibrator.positions import choose_extension
from calibrator.settings import Settings
from calibrator.text import Text
from converter.commands.opening import CALIBRATION_NOVEL
from converter.errors import UsageError, VerificationError
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.proof import verify
from converter.rope import parse_extension, rope_choices, rope_entries
from converter.source import resolve
from tests.stock_models import RememberingReporter, stock_model
from tests.test_inspect import mmod, succeed
from tests.test_served_length import config_of
from tests.tiny_models import SETTINGS, tiny_model

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
    plain, extended = (load_model(model, **where) for _ in range(2))
    extended.extend_positions(rope_entries(checkpoint, "yarn:8"))
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
        ("bamba", "yarn", "reads no text"),
        ("bamba", "yarn:", "no extension"),
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
    for words in ("yarn", "yarn:8"):
        assert mmod("bake", model, tmp_path / "again", "--scales", out, "--rope", words).returncode == 2
    succeed("bake", model, tmp_path / "again", "--scales", out, "--rope", "yarn:4")
    assert config_of(tmp_path / "again") == config_of(out)
    succeed("verify", tmp_path / "again", "--base", model, "--no-load")


def test_words_are_read() -> None:
    assert parse_extension("linear:2.5") == ("linear", 2.5)
    assert parse_extension("yarn") == ("yarn", None)


@pytest.mark.parametrize(("target_len", "farthest"), [(65, 2), (128, 2), (129, 4), (16 << 10, 256)])
def test_factors_to_choose_from_are_powers_of_two_up_to_the_target(
    tmp_path: Path, target_len: int, farthest: int
) -> None:
    model = saved("bamba", tmp_path / "model")
    config = config_of(model) | {"max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(resolve(str(model)))
    choices = rope_choices(checkpoint, "yarn", target_len)
    factors = [entry["rope_parameters"]["factor"] for entry in choices.values()]
    assert factors == [2.0**power for power in range(1, len(factors) + 1)] and factors[-1] == farthest
    assert choices[f"yarn:{farthest}"] == rope_entries(checkpoint, f"yarn:{farthest}")
    assert list(rope_choices(checkpoint, "linear:3", target_len)) == ["linear:3"]
    with pytest.raises(UsageError, match="reach 64 tokens"):
        rope_choices(checkpoint, "yarn", 64)


def written_by(stock: StockModel, texts: int, length: int) -> Text:
    """Texts drawn from what a model predicts, so that no other predicts them better."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (texts, 1))
    with stock.recurrence, torch.no_grad():
        while tokens.shape[1] < length:
            scores = stock.logits(stock.hidden_states(tokens)[:, -1])
            tokens = torch.cat([tokens, torch.multinomial(scores.softmax(-1), 1)], dim=1)
    return Text("text", tuple(tokens))


@pytest.mark.parametrize("truth", [None, "linear:2", "linear:4"])
def test_the_extension_that_the_text_was_written_with_is_chosen(
    truth: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stock = stock_model("bamba")
    with_strong_attention(stock.model)
    entries = {f"linear:{n}": {"rope_parameters": {"rope_type": "linear", "factor": float(n)}} for n in (2, 4, 8)}
    stock.extend_positions(entries[truth] if truth else {})
    text = written_by(stock, 12, 70)
    stock.extend_positions({})
    settings = Settings("gradient", "head", "linear", 16, 64, short_windows=2)
    problem = prepare_calibration(stock, [text], settings, RememberingReporter(), "commit")
    chosen, sentence = choose_extension(problem, entries)
    assert chosen == truth
    assert sentence.endswith(f"So it is {truth}." if truth else "So they stay.")
    assert stock.rope == (entries[truth] if truth else {})


def with_strong_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make positions count: attention that looks at few tokens, and scores far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name and "self_attn" in name:
                parameter.mul_(20)
            elif "embed" in name or "lm_head" in name:
                parameter.mul_(25)
    return model


def test_chosen_extension_is_declared_and_proved(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    sizes = {"vocab_size": 4096, "max_position_embeddings": 64}
    config = AutoConfig.for_model("bamba", **SETTINGS["bamba"] | sizes)
    torch.manual_seed(1)
    with_strong_attention(AutoModelForCausalLM.from_config(config)).save_pretrained(model)
    for file in resolve("demo").folder.glob("tokenizer*"):
        shutil.copy(file, model)
    (tmp_path / "text.txt").write_text(Path(CALIBRATION_NOVEL).read_text()[:30_000])
    where = ("--data", tmp_path / "text.txt", "--train-len", "64", "--target-len", "256", "--device", "cpu")
    succeed("convert", model, "--output", out, "--method", "floor", "--rope", "yarn", "--windows", "0", *where)
    manifest, declared = Manifest.read(out), config_of(out)
    assert manifest is not None and manifest.rope == "yarn:2"
    assert "--rope yarn:2" in manifest.command
    assert all(f"yarn:{factor} " in manifest.notes[0] for factor in (2, 4))
    # Random text to a random model: no factor but 1 is found, and the extension alone is no copy of the source.
    assert not manifest.changed and not manifest.scales_nothing
    assert declared["rope_parameters"]["factor"] == 2 and declared["max_position_embeddings"] == 256
    assert "extends the rotary positions (yarn:2)" in (out / "README.md").read_text()
    succeed("verify", out, "--base", model, "--no-load")
