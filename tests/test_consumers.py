"""Other people's code on converted folders, on the CPU: stock libraries, mamba_ssm and llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from converter.layouts import read_checkpoint
from converter.scales import Form, auto_granularity
from converter.scales_file import save_scales
from converter.source import resolve
from tests.consumers.fetch import FOLDER, QUANTISED
from tests.consumers.servers import SGLANG_MODELS, sglang_config, sglang_weights
from tests.measured_models import demo_folder, random_tokens
from tests.small_checkpoints import random_scales
from tests.test_inspect import succeed
from tests.tiny_models import tiny_model

DEMOS = ("demo", "demo:mamba")
# Of the rest, kimi_linear's converter knows the names of published files, which are not those that transformers
# writes, and qwen3_5_moe's and qwen4_exp's are qwen3_5's.
HYBRIDS = (
    "falcon_mamba",
    "falcon_h1",
    "granitemoehybrid",
    "nemotron_h",
    "bamba",
    "jamba",
    "qwen3_next",
    "qwen3_5_text",
)
FACTOR = 1.6
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=DEMOS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(request.param, tmp_path_factory.mktemp("converted") / "model", factor=FACTOR)


@pytest.fixture(scope="module")
def for_mamba_ssm(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README says to do: the embedding's old name and the tied head, beside the source's config."""
    folder = tmp_path_factory.mktemp("mamba_ssm")
    demo = "demo" if json.loads((converted / "config.json").read_text())["model_type"] == "mamba2" else "demo:mamba"
    tensors = load_torch_file(converted / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
    torch.save(tensors, folder / "pytorch_model.bin")
    shutil.copy(resolve(demo).folder / "config.json", folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run_consumer(module: str, *words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"tests.consumers.{module}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def needs(name: str) -> pytest.MarkDecorator:
    fetched = (FOLDER / name).is_dir()
    return pytest.mark.skipif(not fetched, reason=f"needs {name}: make consumers")


def test_pipeline_generates(converted: Path) -> None:
    generator = pipeline("text-generation", model=str(converted), dtype=torch.float32, device="cpu")
    [said] = generator("It is a truth universally", max_new_tokens=8, do_sample=False)
    assert said["generated_text"].startswith("It is a truth universally")
    model, tokenizer = load(converted), AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer("It is a truth universally", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert said["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_decoding_after_a_long_prompt_equals_the_full_forward(converted: Path) -> None:
    """The reference code drops its scale while decoding; a baked one cannot."""
    model = load(converted)
    prompt = random_tokens(1, 600, vocabulary=4096)
    with torch.no_grad():
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        full = model(made.sequences[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :]
    stepwise = torch.stack(made.logits)[:, 0]
    assert stepwise.shape == full.shape == (12, 4096)
    torch.testing.assert_close(stepwise, full, rtol=1e-3, atol=2e-3)


def test_safetensors_reads_every_tensor(converted: Path) -> None:
    arrays: dict[str, Any] = {}
    with safe_open(converted / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = load(converted)
    assert arrays.keys() == {name for name, _ in model.named_parameters()}
    A_logs = {name: value for name, value in arrays.items() if name.endswith("A_log")}
    assert A_logs and all(value.dtype == torch.float32 for value in A_logs.values())


def test_safetensors_numpy_reads_a_float32_copy(tmp_path: Path, converted: Path) -> None:
    model = load(converted)
    model.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(arrays[name], parameter.detach().numpy())


@needs("mamba_ssm")
def test_mamba_ssm_loads_the_model_under_its_own_names(
    converted: Path, for_mamba_ssm: Path, tmp_path: Path
) -> None:
    """Its own loader, on its own reference functions in place of the compiled ones, gives the same logits."""
    tokens = random_tokens(1, 60, vocabulary=4096)
    output = tmp_path / "logits.pt"
    words = [str(token) for token in tokens[0].tolist()]
    run_consumer("run_mamba_ssm", str(for_mamba_ssm), str(output), *words)
    found = torch.load(output, weights_only=True)
    with torch.no_grad():
        expected = load(converted)(tokens).logits[0]
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-3, atol=1e-3)


def read_gguf(path: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def write_tiny(model_type: str, folder: Path) -> Path:
    """A tiny random model as llama.cpp's converter expects it, with a tokenizer of the 256 bytes."""
    tiny_model(model_type).save_pretrained(folder)
    if model_type == "falcon_h1":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not SGLANG_MODELS["mamba2"].is_file(), reason="needs sglang: make consumers")
def test_sglang_loads_every_tensor_of_both_layouts(converted: Path, for_mamba_ssm: Path) -> None:
    """Its raw layout is Mamba-1's alone. Mamba-2's parameter is A, which keeps -exp of what its loader takes."""
    model = load(converted)
    tensors, model_type = load_torch_file(converted / "model.safetensors"), model.config.model_type
    served = {name: sglang_name(name, model_type) for name in tensors}
    taken = sglang_weights(model_type, served.values(), tensors)
    assert all(torch.equal(taken[served[name]], value) for name, value in tensors.items())
    config = sglang_config(for_mamba_ssm)
    if model_type == "mamba":
        assert (config.vocab_size, config.hidden_size) == (model.config.vocab_size, model.config.hidden_size)
        assert (config.num_hidden_layers, config.state_size) == (8, model.config.state_size)
        raw = torch.load(for_mamba_ssm / "pytorch_model.bin")
        of_raw = sglang_weights(model_type, taken, raw)
        assert of_raw.keys() == taken.keys() and all(torch.equal(of_raw[name], taken[name]) for name in taken)


def sglang_name(name: str, model_type: str) -> str:
    """What SGLang calls a parameter of stock transformers."""
    name = re.sub("^backbone", "model", name).replace("embeddings", "embed_tokens").replace("norm_f", "norm")
    return name.replace("A_log", "A") if model_type == "mamba2" else name


@needs("llama_cpp")
@pytest.mark.parametrize(
    ("model_type", "form"),
    [*((name, "linear") for name in (*DEMOS, *HYBRIDS)), *((name, "power") for name in DEMOS)],
)
def test_gguf_scaled_in_place_equals_the_gguf_of_the_scaled_folder(
    tmp_path: Path, model_type: str, form: Form
) -> None:
    folder = tmp_path / "base"
    if model_type in DEMOS:
        demo_folder(model_type, folder)
    else:
        write_tiny(model_type, folder)
    A_log = read_checkpoint(resolve(str(folder), compose=True)).A_log
    shapes = {name: tensor.shape for name, tensor in A_log.items()}
    save_scales(tmp_path, random_scales(shapes, auto_granularity(next(iter(shapes.values()))), form), A_log)
    succeed("bake", folder, tmp_path / "scaled", "--scales", tmp_path)
    for name in ("base", "scaled"):
        run_consumer("run_llama_cpp", str(tmp_path / name), str(tmp_path / f"{name}.gguf"))
    succeed("bake", tmp_path / "base.gguf", tmp_path / "out", "--scales", tmp_path)
    expected, found = read_gguf(tmp_path / "scaled.gguf"), read_gguf(tmp_path / "out" / "base.gguf")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6 if name.endswith("ssm_a") else 0, err_msg=name)
    succeed("verify", tmp_path / "out", "--base", tmp_path / "base.gguf")


@needs("quantisers")
def test_quantised_copies_scaled_in_place_equal_those_of_the_scaled_folder(tmp_path: Path) -> None:
    base, scaled = demo_folder("demo", tmp_path / "base"), tmp_path / "scaled"
    A_log = read_checkpoint(resolve(str(base), compose=True)).A_log
    save_scales(tmp_path, random_scales({name: tensor.shape for name, tensor in A_log.items()}, "head"), A_log)
    succeed("bake", base, scaled, "--scales", tmp_path)
    run_consumer("run_quantised", "quantise", str(base), str(scaled))
    pairs = []
    for method in QUANTISED:
        succeed("bake", f"{base}-{method}", tmp_path / method, "--scales", tmp_path)
        pairs += [str(tmp_path / method), f"{scaled}-{method}"]
    run_consumer("run_quantised", "compare", *pairs)


@needs("llama_cpp")
def test_llama_cpp_converts_to_gguf(converted: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    run_consumer("run_llama_cpp", str(converted), str(output))
    tensors = read_gguf(output)
    layers = json.loads((converted / "config.json").read_text())["num_hidden_layers"]
    with safe_open(converted / "model.safetensors", framework="pt") as file:
        for layer in range(layers):
            A_log = file.get_tensor(f"backbone.layers.{layer}.mixer.A_log").double().numpy()
            stored = tensors[f"blk.{layer}.ssm_a"].reshape(A_log.shape)
            np.testing.assert_allclose(stored, -np.exp(A_log), rtol=1e-6)
