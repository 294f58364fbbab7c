"""From the Hub and back to it with the real commands: bake, push, verify and bake again by Hub ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import converter
from benchmarks.synthetic import TOKENIZER
from converter.commands.cli import app
from converter.manifest import SCALES_NAME, Manifest
from tests.converted_folder import convert
from tests.hub_server import Fault, HubServer
from tests.small_checkpoints import write_state_spaces_source, write_transformers

SOURCE_ID, REPO_ID, SCALES_ID = "bob/tiny", "alice/tiny-8k-hf", "alice/tiny-8k-scales"


def mmod(*arguments: str) -> dict[str, Any]:
    """Run ``mmod`` in this process and return the JSON object that it prints."""
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert isinstance(printed, dict)
    return printed


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path) -> Path:
    """A folder converted from a sharded model on the Hub and pushed back to it."""
    hub.add_repo(SOURCE_ID, write_transformers(tmp_path / "source", shards=4))
    convert(SOURCE_ID, tmp_path / "out", seed=3)
    mmod("card", str(tmp_path / "out"))
    done = mmod("push", str(tmp_path / "out"))
    assert done["repo_id"] == REPO_ID and done["commit"] == hub.repositories[REPO_ID].refs["main"]
    return tmp_path / "out"


def test_pushed_model_is_verified_by_its_id(hub: HubServer, pushed: Path) -> None:
    proof = mmod("verify", REPO_ID, "--no-load")
    assert proof["changed_tensors"] == 3 and proof["base"] == SOURCE_ID
    assert proof["base_revision"] == hub.repositories[SOURCE_ID].refs["main"]
    assert proof["equal_by_hash"] == ["model-00004-of-00004.safetensors"]


def test_verify_notices_a_changed_tensor_on_the_hub(hub: HubServer, pushed: Path) -> None:
    name = "model-00002-of-00004.safetensors"
    content = bytearray(hub.content(REPO_ID, name))
    content[-5] ^= 1
    hub.commit(hub.repositories[REPO_ID], "main", {name: bytes(content)}, "Tampered", "alice")
    done = CliRunner().invoke(app, ["verify", REPO_ID, "--no-load"])
    assert done.exit_code != 0 and "differs from the base's" in str(done.exception)


def test_scales_of_a_pushed_model_bake_the_same_bits(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    mmod("bake", SOURCE_ID, str(again), "--scales", REPO_ID)
    weights = {path.name for path in pushed.iterdir() if path.is_file()} - {"README.md", ".gitattributes"}
    names = weights | {SCALES_NAME}
    assert len([name for name in names if name.endswith(".safetensors")]) == 5
    assert {name: (again / name).read_bytes() for name in names} == {
        name: hub.content(REPO_ID, name) for name in names
    }


def test_pushed_conversion_is_refused_as_a_source(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bake", REPO_ID, str(tmp_path / "twice"), "--scales", REPO_ID])
    assert f"already converted, from {SOURCE_ID}" in str(done.exception)


def test_state_spaces_source_travels_whole(hub: HubServer, tmp_path: Path) -> None:
    source = write_state_spaces_source(tmp_path / "source")
    (source / "tokenizer.json").write_text(TOKENIZER)
    hub.add_repo("bob/original", source)
    convert(str(source), tmp_path / "scales")
    mmod("bake", "bob/original", str(tmp_path / "out"), "--scales", str(tmp_path / "scales"))
    plan = mmod("push", str(tmp_path / "out"), "--dry-run")
    assert "model.safetensors" in plan["upload"]
    assert plan["url"] is None and "alice/original-scaled-hf" not in hub.repositories
    mmod("push", str(tmp_path / "out"))
    assert mmod("verify", "alice/original-scaled-hf", "--no-load")["changed_tensors"] == 3


def test_fresh_process_shows_the_plan_and_errors_with_exit_codes(
    hub: HubServer, pushed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "from converter.__main__ import main; main()", "push", str(pushed)]

    def run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *options],
            env={**environment, **variables},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    shown = run("--repo-id", "alice/new", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "Push to alice/new (new)" in shown.stderr
    assert "At most" in shown.stderr and shown.stdout == ""
    again = run()
    assert again.returncode == 0 and f"{hub.url}/{REPO_ID} holds the same already." in again.stderr
    denied = run("--repo-id", "eve/new")
    assert denied.returncode == 1 and "no member of eve" in denied.stderr and "Traceback" not in denied.stderr
    anonymous = run(HF_TOKEN="")
    assert anonymous.returncode == 1 and "not logged in" in anonymous.stderr and "mmod push" in anonymous.stderr
    wrong = run("--private", "--public")
    assert wrong.returncode == 2 and "exclude each other" in wrong.stderr


def test_interrupted_push_says_how_to_go_on(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    fault = Fault("POST", "/commit/", "slow", seconds=5)
    hub.faults.append(fault)
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    program = [
        sys.executable,
        "-c",
        "from converter.__main__ import main; main()",
        "push",
        str(pushed),
        "--repo-id",
        "x",
    ]
    root = Path(__file__).parent.parent
    with subprocess.Popen(program, env=environment, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while fault.times and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "Traceback" not in told
    assert f"{pushed} is complete. Go on with: mmod push {pushed} --repo-id x" in told


def test_manifest_on_the_hub_is_the_folders(hub: HubServer, pushed: Path) -> None:
    manifest = Manifest.from_json(hub.content(REPO_ID, "mmod.json"))
    assert manifest == Manifest.read(pushed)
    assert manifest.source.revision == hub.repositories[SOURCE_ID].refs["main"]
    assert str(pushed.parent) not in manifest.to_json()


DEMO = Path(converter.__file__).parent / "demo"
COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained(sys.argv[1])("She was not handsome, but", return_tensors="pt").input_ids
logits = []
for place in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    logits.append(model(ids).logits)
assert logits[0].std() > 1 and torch.equal(*logits)
"""


def test_one_command_from_the_hub_and_back(hub: HubServer, tmp_path: Path) -> None:
    """The whole story: convert a model by its id and push it; others then load it by its new id."""
    hub.add_repo("bob/novelist", DEMO / "models" / "tiny-mamba2-256")
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    texts = []
    for option, name in (("--data", "persuasion.txt"), ("--held-out", "northanger-abbey.txt")):
        (tmp_path / name).write_text((DEMO / "texts" / name).read_text()[:40_000])
        texts += [option, str(tmp_path / name)]
    lengths = ["--target-len", "512", "--train-len", "64", "--windows", "1"]
    loose = ["--steps", "2", "--lr", "0.1", "--max-short-loss", "0.5"]
    command = [sys.executable, "-m", "converter", "bob/novelist", *texts, *lengths, *loose, "--push", "--private"]

    def run(*words: str, **variables: str) -> str:
        done = subprocess.run(
            words, cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    planned = run(*command, "--dry-run")
    assert "Would push that to alice/novelist-512-hf." in planned
    assert list(tmp_path.glob("novelist*")) == [] and hub.repositories.keys() == {"bob/novelist"}
    told = run(*command)
    assert f"Pushed to {hub.url}/alice/novelist-512-hf" in told
    assert hub.repositories["alice/novelist-512-hf"].private
    folder = tmp_path / "novelist-512-hf"
    pushed = {path: hub.content("alice/novelist-512-hf", path) for path in hub.paths("alice/novelist-512-hf")}
    for path, content in pushed.items():
        assert path == ".gitattributes" or content == (folder / path).read_bytes()
        assert str(tmp_path).encode() not in content and environment["HF_TOKEN"].encode() not in content
    run(sys.executable, "-c", COMPARE, "alice/novelist-512-hf", str(folder), HF_HOME=str(tmp_path / "other"))


def test_scales_alone_are_a_repository_that_bakes_any_copy(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    done = mmod("push", str(pushed), "--scales-only")
    assert done["repo_id"] == SCALES_ID
    held = set(hub.paths(SCALES_ID)) - {".gitattributes"}
    assert {"README.md", "mmod.json", SCALES_NAME} <= held
    assert not [
        path for path in held if path.endswith((".safetensors", ".json")) and path not in (SCALES_NAME, "mmod.json")
    ]
    card = hub.content(SCALES_ID, "README.md").decode()
    assert "holds no weights" in card and f"mmod bake MODEL_OR_FILE OUTPUT --scales {SCALES_ID}" in card
    assert "base_model_relation: adapter" in card and "from_pretrained" not in card
    mmod("bake", SOURCE_ID, str(tmp_path / "baked"), "--scales", SCALES_ID)
    for path in pushed.glob("*.safetensors"):
        assert (tmp_path / "baked" / path.name).read_bytes() == path.read_bytes()
    manifest = Manifest.read(tmp_path / "baked")
    assert manifest is not None and not manifest.scales_only
    # The same again is nothing to do, and neither kind is written over the other.
    assert mmod("push", str(pushed), "--scales-only")["commit"] is None
    for words in (["--scales-only", "--repo-id", REPO_ID], ["--repo-id", SCALES_ID]):
        refused = CliRunner().invoke(app, ["push", str(pushed), *words])
        assert refused.exit_code == 1 and "holds another conversion" in str(refused.exception)
    other = CliRunner().invoke(app, ["evaluate", SCALES_ID])
    assert "holds scales and no weights" in str(other.exception)
