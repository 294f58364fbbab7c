"""Other people's code on converted folders, on the CPU: stock libraries, mamba_ssm and llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.consumers.fetch import FOLDER
from tests.measured_models import demo_folder, random_tokens

DEMOS = ("demo", "demo:mamba")
FACTOR = 1.6
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=DEMOS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_folder(request.param, tmp_path_factory.mktemp("converted") / "model", factor=FACTOR)


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
def test_mamba_ssm_loads_the_state_spaces_layout(converted: Path, tmp_path: Path) -> None:
    """Its own loader, on its own reference functions in place of the compiled ones, gives the same logits."""
    tokens = random_tokens(1, 60, vocabulary=4096)
    output = tmp_path / "logits.pt"
    words = [str(token) for token in tokens[0].tolist()]
    run_consumer("run_mamba_ssm", str(converted / "state-spaces"), str(output), *words)
    found = torch.load(output, weights_only=True)
    with torch.no_grad():
        expected = load(converted)(tokens).logits[0]
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-3, atol=1e-3)


@needs("llama_cpp")
def test_llama_cpp_converts_to_gguf(converted: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    run_consumer("run_llama_cpp", str(converted), str(output))
    specification = importlib.util.spec_from_file_location("gguf", FOLDER / "llama_cpp" / "gguf" / "__init__.py")
    assert specification is not None and specification.loader is not None
    gguf = importlib.util.module_from_spec(specification)
    sys.modules["gguf"] = gguf
    try:
        specification.loader.exec_module(gguf)
        tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(output).tensors}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[name]
    layers = json.loads((converted / "config.json").read_text())["num_hidden_layers"]
    with safe_open(converted / "model.safetensors", framework="pt") as file:
        for layer in range(layers):
            A_log = file.get_tensor(f"backbone.layers.{layer}.mixer.A_log").double().numpy()
            stored = tensors[f"blk.{layer}.ssm_a"].reshape(A_log.shape)
            np.testing.assert_allclose(stored, -np.exp(A_log), rtol=1e-6)
