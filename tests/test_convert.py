"""The main job through the real command, on the bundled checkpoints, with few steps and short lengths."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrator.line_ends import unwrap
from converter.__main__ import convert_main
from converter.manifest import SCALES_NAME, Manifest
from converter.scales import ScaleSet
from tests.small_checkpoints import is_identity

SHORT = ("--train-len", "64", "--target-len", "256", "--steps", "4", "--windows", "1", "--max-short-loss", "0.05")
NOVEL = Path(__file__).parent.parent / "converter" / "demo" / "texts" / "northanger-abbey.txt"


def run(*words: str, cwd: Path, tool: str = "mmod-convert", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / tool), *words]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def run_well(*words: str, cwd: Path, tool: str = "mmod-convert") -> dict[str, Any]:
    result = run(*words, "--json", cwd=cwd, tool=tool)
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("converted")
    printed = run_well("demo", *SHORT, "--output", "mamba2", cwd=folder)
    return folder / "mamba2", printed


@pytest.fixture(scope="module")
def converted_mamba1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    run_well("demo:mamba", *SHORT, "--form", "power", cwd=folder)
    return folder / "demo-mamba-256-hf"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_json_tells_what_was_done(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = converted
    manifest = Manifest.read(folder)
    assert manifest is not None and manifest.perplexity is not None
    assert printed["source"] == "demo" and printed["method"] == "gradient"
    assert printed["output"] == "mamba2" and printed["revision"] == manifest.source.revision
    assert printed["perplexity"] == {"base": manifest.perplexity.base, "converted": manifest.perplexity.converted}
    assert set(printed["perplexity"]["base"]) == {"64", "256", "1024"}
    assert printed["changed_tensors"] == len(manifest.changed) == 6
    assert printed["changed_tensors"] + printed["identical_tensors"] == len(weights(folder))


@pytest.mark.parametrize("fixture", ["converted", "converted_mamba1"])
def test_stock_transformers_runs_the_formula(fixture: str, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(fixture)
    folder = value[0] if isinstance(value, tuple) else value
    name = "tiny-mamba2-256" if fixture == "converted" else "tiny-mamba-256"
    source = torch.load(NOVEL.parents[1] / "models" / name / "pytorch_model.bin", weights_only=True)
    scales = ScaleSet.load(str(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not is_identity(scales)
    for key, parameter in loaded.named_parameters():
        stored = source[key.replace("embeddings", "embedding")]
        if not key.endswith("A_log"):
            assert torch.equal(parameter, stored.float()), key
            continue
        # The decay of the converted model is the source's decay under the factors, by the definition of the forms.
        magnitude, s = np.exp(stored.double().numpy()), np.exp(scales.log_s[key].astype(np.float64))
        expected = magnitude * s if scales.form == "linear" else magnitude**s
        np.testing.assert_allclose(np.exp(parameter.detach().double().numpy()), expected, rtol=1e-6)


def test_perplexity_is_that_of_stock_transformers(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = converted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)(unwrap(NOVEL.read_text())).input_ids[:1024]
    losses = []
    for window in torch.tensor(tokens).view(-1, 256):
        with torch.no_grad():
            losses.append(float(model(window[None], labels=window[None]).loss))
    assert math.isclose(math.exp(np.mean(losses)), printed["perplexity"]["converted"]["256"], rel_tol=1e-4)


def test_evaluate_reads_a_text_as_the_conversion_does(converted: tuple[Path, dict[str, Any]]) -> None:
    """Without its hard line ends, which is said: the two commands give the same figures."""
    folder, printed = converted
    words = ("evaluate", "mamba2", "--lengths", "64,256,1024", "--windows", "1", "--json", "--text", str(NOVEL))
    result = run(*words, cwd=folder.parent, tool="mmod")
    assert "northanger-abbey.txt has hard line ends, which are taken out" in result.stderr
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(printed["perplexity"]["converted"], rel=1e-4)


def test_output_names_no_path_of_this_machine(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = converted
    for name in ("mmod.json", "README.md", "config.json"):
        text = (folder / name).read_text()
        for secret in (str(folder.parent), str(Path.home()), str(NOVEL.parent), os.uname().nodename):
            assert secret not in text, (name, secret)


def test_the_same_command_gives_the_same_bytes(converted_mamba1: Path, tmp_path: Path) -> None:
    run_well("demo:mamba", *SHORT, "--form", "power", "--output", "again", cwd=tmp_path)
    for name in ("model.safetensors", SCALES_NAME, "config.json"):
        digests = [
            hashlib.sha256((folder / name).read_bytes()).digest()
            for folder in (converted_mamba1, tmp_path / "again")
        ]
        assert digests[0] == digests[1], name
    first, second = (
        json.loads((folder / "mmod.json").read_text()) for folder in (converted_mamba1, tmp_path / "again")
    )
    # The one number that differs, and the seal over it.
    assert first.pop("seal") and second.pop("seal")
    assert first["calibration"].pop("seconds") > 0 and second["calibration"].pop("seconds") > 0
    assert first == second


def test_bake_repeats_a_conversion_without_calibrating(
    converted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = converted
    result = run("bake", "demo", "baked", "--scales", str(folder), cwd=tmp_path, tool="mmod")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "baked" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_converted_model_is_refused_unless_composed(
    converted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = converted
    words = (
        str(folder),
        *SHORT,
        "--data",
        str(NOVEL),
        "--held-out",
        str(NOVEL.with_name("persuasion.txt")),
        "-o",
        "twice",
    )
    refused = run(*words, cwd=tmp_path)
    assert refused.returncode == 1 and "converted, from demo" in refused.stderr and not any(tmp_path.iterdir())
    assert run_well(*words, "--compose", cwd=tmp_path)["changed_tensors"] == 6
    manifest = Manifest.read(tmp_path / "twice")
    assert manifest is not None and manifest.source.composed_from is not None
    assert manifest.source.composed_from["source"]["name"] == "demo"


def test_scales_stay_one_where_nothing_helps(tmp_path: Path) -> None:
    words = ("demo", *SHORT, "--form", "power", "--lr", "60", "--steps", "1", "--output", "worse", "--json")
    result = run(*words, cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert "Training length 64 tokens (as given), target length 256." in result.stderr
    printed = json.loads(result.stdout)
    manifest = Manifest.read(tmp_path / "worse")
    assert manifest is not None and manifest.calibration is not None
    assert manifest.calibration.kept_step == 0 and is_identity(ScaleSet.load(str(tmp_path / "worse")))
    assert printed["perplexity"]["base"] == pytest.approx(printed["perplexity"]["converted"], rel=1e-5)


def test_dry_run_writes_nothing_and_tells_of_a_text_too_short_to_judge_by(tmp_path: Path) -> None:
    result = run("demo", "--dry-run", "--json", "--target-len", "48k", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not any(tmp_path.iterdir()) and "6 A_log tensors of 56" in result.stderr
    printed = json.loads(result.stdout)
    assert re.search(r"Factors for 49,152 tokens are judged on \d\d,\d{3} only", result.stderr)
    assert printed["output"] == "demo-48k-hf" and printed["changed_tensors"] == 6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nowhere/at-all/model",), 1, "no folder"),
        (("demo", "--target-len", "0"), 2, "no length"),
        (("demo", "--target-len", "many"), 2, "no length"),
        (("demo", "--train-len", "8k", "--target-len", "4k"), 2, "trained at 8192 tokens"),
        (("demo", "--method", "winsorize", "--train-len", "8k", "--target-len", "4k", "--windows", "0"), 2, "8192"),
        (("demo", "--method", "magic"), 2, "gradient"),
        (("demo", "--form", "cubic"), 2, "'linear'"),
        (("demo", "--granularity", "channel"), 2, "layer, head"),
        (("demo", "--data", "missing.txt"), 1, "missing.txt"),
        (("demo", "--data", "short.txt"), 1, "tokens"),
        (("demo", "--held-out", "short.txt", "--dry-run"), 1, "room for 0 windows"),
        (("demo", "--data", str(NOVEL)), 2, "northanger-abbey.txt (unwrapped) is calibrated on"),
        (("demo", "--data", str(NOVEL.parent), "--target-len", "32k"), 2, "texts (unwrapped) is calibrated on"),
        (("demo", "--target-len", "96k"), 1, "room for 1 windows"),
        (("demo", "--steps", "0"), 2, "--steps"),
        (("demo", "--lr", "0"), 2, "--lr is 0.0"),
        (("demo", "--lr", "nan", "--method", "spsa"), 2, "--lr is nan"),
        (("demo", "--no-such-option"), 2, "--no-such-option"),
        (("demo", "--device", "abacus"), 1, "abacus"),
        (("./no-model", "--data", "tyop.txt"), 1, "There is no text tyop.txt"),
        (("./no-model", "--held-out", "tyop.txt"), 1, "There is no text tyop.txt"),
        (("demo", "--revision", "main"), 2, "--revision"),
        (("demo", "--output", "taken"), 1, "taken"),
        (("demo", "--private"), 2, "--private does nothing without --push"),
        (("demo", "--repo-id", "you/model", "--dry-run"), 2, "--repo-id does nothing"),
        (("demo", "--output", "no/such/parent"), 1, "mkdir -p"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_says_what_to_do_and_writes_nothing(
    words: tuple[str, ...],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("A text of a few words.")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("not to be touched")
    monkeypatch.chdir(tmp_path)
    # The whole program, but in this process, which has imported what it needs.
    for name in ("end_on_signals", "ignore_signals"):
        monkeypatch.setattr(f"converter.commands.ending.{name}", lambda: None)
    for where, name in ((threading, "excepthook"), (sys, "unraisablehook"), (warnings, "showwarning")):
        monkeypatch.setattr(where, name, getattr(where, name))
    monkeypatch.setattr(sys, "argv", ["mmod-convert", *words])
    with pytest.raises(SystemExit) as ended:
        convert_main()
    printed = capsys.readouterr().err
    message = re.sub(r"[^!-~]+", " ", printed)
    assert (ended.value.code, said in message, "Traceback" in message) == (code, True, False), printed
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "short.txt", "taken"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mmod-convert"), "demo", *SHORT, "--output", "out", "--verbose"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 1:"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130 and "Interrupted" in rest and "Traceback" not in rest
    assert not any(tmp_path.iterdir())


def test_evaluation_that_is_told_to_end_leaves_no_copy_of_the_model(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mmod"), "evaluate", "demo"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("mmod-*/working-copy")):
            time.sleep(0.01)
        process.terminate()
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    # torch leaves a cache folder of its own.
    assert process.returncode == 128 + signal.SIGTERM and not list(tmp_path.glob("mmod-*"))


def test_evaluate_measures_a_model_by_length(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = converted
    text = folder.parent / "unwrapped.txt"
    text.write_text(unwrap(NOVEL.read_text()))
    words = ("evaluate", str(folder), "--lengths", "64,256,1k", "--windows", "1", "--text", str(text))
    measured = run_well(*words, cwd=folder.parent, tool="mmod")["perplexity"]
    assert measured == pytest.approx(printed["perplexity"]["converted"], rel=1e-5)
