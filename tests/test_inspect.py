"""`mmod inspect`, `mmod bake` and `mmod verify` as commands, in processes of their own where that matters."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import write_checkpoint
from converter.__main__ import main
from converter.digests import sealed
from converter.layouts import read_checkpoint
from converter.manifest import SCALES_NAME, Manifest
from converter.scales_file import save_scales
from tests.conversions import convert
from tests.hub_server import HubServer
from tests.small_checkpoints import CONFIG, random_scales, source, tensors, write_transformers
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "converter" / "demo" / "models" / "tiny-mamba2-256"
MMOD = "import sys; from converter.__main__ import main; sys.argv[0] = 'mmod'; main()"


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def mmod(*arguments: str | Path) -> Done:
    """Run the command's own entry point."""
    out, err, interrupt = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmod", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGINT, interrupt)
    return Done(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> dict[str, Any]:
    """Run a command that must succeed, and return its JSON."""
    done = mmod(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def scales_for(folder: Path, where: Path) -> Path:
    """A scales file with random factors for a model's folder."""
    where.mkdir()
    A_log = read_checkpoint(source(folder)).A_log
    return save_scales(where, random_scales({name: tensor.shape for name, tensor in A_log.items()}), A_log)


# inspect


def test_inspect_tells_what_a_hybrid_is(tmp_path: Path) -> None:
    tiny_model("jamba").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    told = succeed("inspect", tmp_path / "model")
    assert (told["layout"], told["model_type"], told["load_dtype"]) == ("transformers", "jamba", "float32")
    assert [record["shape"] for record in told["A_log"]] == [[128, 8]] * 3
    assert told["A_log"][0] == {
        "name": "model.layers.0.mamba.A_log",
        "source_name": "model.layers.0.mamba.A_log",
        "dtype": "F32",
        "shape": [128, 8],
    }
    assert told["granularities"] == ["layer", "channel", "state", "element"]
    assert told["auto_granularity"] == "element" and told["attention_layers"] == [2]
    assert told["files"] > 2 and told["obstacle"] == "" and told["converted_from"] is None


def test_inspect_tells_a_person(tmp_path: Path) -> None:
    done = mmod("inspect", "demo")
    assert done.returncode == 0 and done.stderr == ""
    for part in ("mamba2 in the state-spaces layout", "backbone.layers.0.mixer.A_log", "auto takes head"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("config", "names", "said"),
    [
        ({"model_type": "gpt2"}, ["h.0.attn.weight"], "gpt2 is not a model with a state transition matrix"),
        (
            {"model_type": "bailing_hybrid", "num_hidden_layers": 6},
            ["model.layers.0.attention.A_log"],
            "safe gate computes",
        ),
        ({"model_type": "novel"}, ["x.0.A_log"], "novel is not known here"),
    ],
)
def test_inspect_tells_why_not(tmp_path: Path, config: dict[str, Any], names: list[str], said: str) -> None:
    folder = write_transformers(tmp_path / "model", config=config, content={name: torch.ones(4) for name in names})
    done = mmod("inspect", folder, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and said in told["obstacle"] and told["tensors"] == 1 and told["A_log"] == []


def test_inspect_names_the_base_of_a_conversion(tmp_path: Path) -> None:
    snapshot = source(write_transformers(tmp_path / "model"))
    convert(snapshot, tmp_path / "out")
    assert succeed("inspect", tmp_path / "out")["converted_from"] == f"model at {snapshot.revision}"


NO_MANIFEST = "is no manifest of this tool"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, NO_MANIFEST) for content in (b"\xff\xfe{}", b"\xe9", b"[" * 100_000, b"[]", b"{}")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 9\n", "is a git-lfs pointer"),
    ],
)
def test_damaged_manifest_is_an_error_without_a_traceback(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "mmod.json").write_bytes(content)
    done = mmod("inspect", folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"Error: mmod.json {said}") and "Traceback" not in done.stderr


def test_damaged_checkpoint_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\1")
    done = mmod("inspect", folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: model.safetensors is damaged") and "Traceback" not in done.stderr


# bake


def test_bake_writes_proves_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    scales = scales_for(folder, tmp_path / "scales")
    told = succeed("bake", folder, tmp_path / "out", "--scales", scales)
    assert (told["changed_tensors"], told["identical_tensors"], told["proved"]) == (3, 26, True)
    assert told["source"] == "model" and told["revision"] == source(folder).revision
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and manifest.calibration is None
    assert manifest.command.startswith("mmod bake model out --scales scales.safetensors")
    assert "nothing was calibrated" in manifest.notes[0]

    succeed("bake", folder, tmp_path / "again", "--scales", tmp_path / "out")
    first, second = (
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("out", "again")
    )
    assert first == second
    done = mmod("bake", folder, tmp_path / "out", "--scales", scales)
    assert done.returncode == 1 and "exists already" in done.stderr
    succeed(
        "bake", folder, tmp_path / "out", "--scales", scales, "--overwrite", "--a-log-dtype", "keep", "--no-proof"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "scales", "out", "again"}


def test_verify_loads_with_stock_transformers_when_asked(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model("mamba2").save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO / name).read_bytes())
    scales = scales_for(model, tmp_path / "scales")

    succeed("bake", model, out, "--scales", scales)
    assert succeed("verify", out, "--base", model)["not_proved"] == []
    # A model that stock transformers cannot load, although all tensors are right.
    for folder in (model, out):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    manifest = Manifest.read(out)
    assert manifest is not None
    record = dataclasses.replace(manifest.source, revision=source(model).revision)
    sealed(dataclasses.replace(manifest, source=record), out).write(out)
    refused = mmod("verify", out, "--base", model)
    assert refused.returncode == 1 and "Stock transformers" in refused.stderr
    assert "it was not loaded" in succeed("verify", out, "--base", model, "--no-load")["not_proved"][0]


def test_bake_from_the_hub_to_a_folder_and_its_proof_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    commit = hub.add_repo("acme/base", folder)
    scales = scales_for(folder, tmp_path / "scales")
    told = succeed("bake", "acme/base", tmp_path / "out", "--scales", scales)
    assert (told["source"], told["revision"]) == ("acme/base", commit)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    hub.add_repo("acme/converted", tmp_path / "out")
    proof = succeed("verify", "acme/converted", "--no-load")
    assert (proof["base"], proof["base_revision"], proof["identical_tensors"]) == ("acme/base", commit, 26)
    quick = succeed("verify", "acme/converted", "--quick")
    assert quick["changed_tensors"] == 3 and "26 other tensors" in quick["not_proved"][0]
    succeed("bake", "acme/base", tmp_path / "again", "--scales", "acme/converted")
    assert (tmp_path / "again" / "mmod.json").read_bytes() == (tmp_path / "out" / "mmod.json").read_bytes()


def test_conversion_is_scaled_again_only_when_told(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    scales = scales_for(folder, tmp_path / "scales")
    succeed("bake", folder, tmp_path / "once", "--scales", scales)
    done = mmod("bake", tmp_path / "once", tmp_path / "twice", "--scales", scales)
    assert done.returncode == 1 and "already converted, from model" in done.stderr
    done = mmod("bake", tmp_path / "once", tmp_path / "twice", "--scales", scales, "--compose")
    assert done.returncode == 2 and "is not the A_log that the scales were found for" in done.stderr
    succeed("bake", tmp_path / "once", tmp_path / "twice", "--scales", scales, "--compose", "--anyway")
    assert succeed("verify", tmp_path / "twice", "--base", tmp_path / "once", "--no-load")["changed_tensors"] == 3
    manifest = Manifest.read(tmp_path / "twice")
    assert manifest is not None and manifest.source.composed_from is not None
    assert manifest.source.composed_from["source"]["name"] == "model"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL", "OUT", "--scales", "acme/nowhere"], "There is no model acme/nowhere on the Hub"),
        (["MODEL", "OUT", "--scales", "./nowhere"], "holds no mmod/scales"),
        (["MODEL", "MODEL/out", "--scales", "SCALES"], "lie in one another"),
        (["OTHER", "OUT", "--scales", "SCALES"], "belong to another model"),
        (["MODEL", "OUT", "--scales", "SCALES", "--a-log-dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_bake_that_cannot_be_done_is_said(hub: HubServer, tmp_path: Path, arguments: list[str], said: str) -> None:
    write_transformers(tmp_path / "MODEL")
    other = {name.replace("layers.2", "layers.0") for name in tensors()}
    config = {**CONFIG, "num_hidden_layers": 1}
    write_transformers(
        tmp_path / "OTHER",
        config=config,
        content={n: t for n, t in tensors().items() if n in other and "layers.1" not in n},
    )
    scales = scales_for(tmp_path / "MODEL", tmp_path / "S")
    words = [str(tmp_path / w) if w.isupper() or w == "MODEL/out" else w for w in arguments]
    words = [str(scales) if word == str(tmp_path / "SCALES") else word for word in words]
    done = mmod("bake", *words)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert said in done.stderr
    assert not {path.name for path in tmp_path.iterdir()} - {"MODEL", "OTHER", "S", "hub-objects", "hub-home"}


# verify


def test_verify_says_by_its_exit_code_what_it_found(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    convert(source(folder), tmp_path / "out")
    done = mmod("verify", tmp_path / "out", "--no-load")
    assert done.returncode == 1 and "Say where it is with --base" in done.stderr
    assert succeed("verify", tmp_path / "out", "--base", folder, "--no-load")["identical_tensors"] == 26
    content = load_file(tmp_path / "out" / "model.safetensors")
    content["backbone.norm_f.weight"][0] += 1
    save_file(content, tmp_path / "out" / "model.safetensors")
    done = mmod("verify", tmp_path / "out", "--base", folder, "--no-load", "--json")
    assert done.returncode == 1 and "norm_f.weight differs" in json.loads(done.stdout)["error"]
    assert "backbone.norm_f.weight differs from the base's" in done.stderr
    (tmp_path / "out" / SCALES_NAME).unlink()
    done = mmod("verify", tmp_path / "out", "--base", folder, "--no-load")
    assert done.returncode == 1 and "Traceback" not in done.stderr


# What the file side may take


# The kernel's own high-water mark of this process; getrusage would count the test's process as well.
WATCH = """
import atexit, re, sys
def report():
    heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
    sys.stderr.write(f"\\nPEAK {peak} {heavy}\\n")
atexit.register(report)
"""


@pytest.mark.parametrize("verb", ["bake", "verify", "inspect"])
def test_safetensors_need_neither_torch_nor_memory(tmp_path: Path, verb: str) -> None:
    # 330 MB: more than the limit, so that a copy held in memory would show.
    write_checkpoint(tmp_path / "model", hidden=1024, layers=16, shards=2)
    scales = scales_for(tmp_path / "model", tmp_path / "scales")
    arguments: dict[str, list[str | Path]] = {
        "bake": ["bake", tmp_path / "model", tmp_path / "out", "--scales", scales],
        "verify": ["verify", tmp_path / "out", "--base", tmp_path / "model", "--no-load"],
        "inspect": ["inspect", tmp_path / "model"],
    }
    if verb == "verify":
        convert(source(tmp_path / "model"), tmp_path / "out")
    command = [sys.executable, "-c", WATCH + MMOD, *map(str, arguments[verb])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, heavy = done.stderr.strip().splitlines()[-1].removeprefix("PEAK ").split(" ", 1)
    assert heavy == "[]"
    assert int(peak) < 250, peak


def test_help_answers_without_torch() -> None:
    command = [sys.executable, "-c", WATCH + MMOD, "bake", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--no-proof" in done.stdout
    assert done.stderr.strip().endswith("[]")
