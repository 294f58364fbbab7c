"""Sources: folders, demos and a Hub on loopback become snapshots; what is missing or closed is said clearly."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from typer.testing import CliRunner

from converter.baking import bake
from converter.commands.cli import app
from converter.errors import CorruptCheckpointError, MmodError, SourceError, UsageError
from converter.inspection import inspect
from converter.layouts import read_checkpoint
from converter.manifest import Manifest, SourceRecord
from converter.source import resolve, resolve_tokenizer
from tests.hub_server import Fault, HubServer
from tests.small_checkpoints import VOCABULARY, source, tensors, write_transformers
from tests.tiny_folders import bare_manifest, novel, tiny_folder


def write_manifest(folder: Path) -> None:
    """Make the folder a conversion of acme/base."""
    bare_manifest(SourceRecord("acme/base", "hub", "c0ffee", "transformers", "mamba2")).write(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointer_of_git_lfs_in_place_of_a_file_is_refused_by_that_name(tmp_path: Path, name: str) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 123456\n")
    with pytest.raises(SourceError, match=rf"git-lfs in place of files: {name}") as refusal:
        resolve(str(folder))
    assert "git lfs pull" in refusal.value.fix


def test_folder_is_sorted_into_weights_and_files_that_go_along(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    for name in ("model.gguf", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    for name in (".git/config", ".cache/huggingface/x", ".gitattributes", "LICENSE", "chat_template.jinja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"file")
    snapshot = resolve(str(folder))
    assert (snapshot.name, snapshot.kind) == ("model", "folder")
    assert snapshot.weights == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert snapshot.index == "model.safetensors.index.json"
    assert snapshot.carried == (
        *("LICENSE", "README.md", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"),
    )
    assert snapshot.left_out == ("consolidated.safetensors", "model.gguf", "onnx/model.onnx", "pytorch_model.bin")
    assert snapshot.has_tokenizer()


LEFTOVERS = (
    *("training_args.bin", "optimizer.bin", "scheduler.pt", "weights.npz", "trainer_state.json", "notes.txt"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "runs/a/events.out.tfevents.1", "checkpoint-5/config.json"),
    *("original/model.safetensors", "runs/LICENSE", "train.py", ".env", "wandb/tokenizer.json"),
)


def test_what_training_left_is_not_carried_and_named(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    for name in LEFTOVERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"file")
    assert set(source(folder).left_out) == set(LEFTOVERS)
    words = ["convert", str(folder), "--method", "constant", "--factor", "1.5", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "Not copied, since no loader reads it: .env, checkpoint-5/" in done.stderr
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert "tokenizer.json" in written and not written & set(LEFTOVERS)


def test_code_that_a_config_names_is_carried_with_what_it_imports(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "configuration_x.X", "AutoModel": "acme/elsewhere--modeling_y.Y"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "configuration_x.py").write_text("import json\nfrom .inner import value\nfrom .gone import other\n")
    for name in ("inner", "tokenization_x", "modeling_y", "train"):
        (folder / f"{name}.py").write_text("value = 1\n")
    snapshot = source(folder)
    assert [path for path in snapshot.carried if path.endswith(".py")] == [
        *("configuration_x.py", "inner.py", "tokenization_x.py")
    ]
    assert snapshot.left_out == ("modeling_y.py", "train.py")


def test_adapter_is_recognised_with_the_line_that_merges_it(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "acme/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"adapter \(LORA, for acme/base\) beside whole weights") as caught:
        source(folder)
    assert "merge_and_unload" in caught.value.fix and "move adapter_config.json" in caught.value.fix
    (folder / "model.safetensors").unlink()
    hub.add_repo("acme/adapter", folder)
    for name in (str(folder), "acme/adapter"):
        with pytest.raises(SourceError, match=r"is an adapter \(LORA, for acme/base\)") as caught:
            resolve(name)
        assert "merge_and_unload" in caught.value.fix
    (folder / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match="is an adapter"):
        source(folder)


def test_revision_of_a_folder_follows_config_and_not_the_place(tmp_path: Path) -> None:
    first, second = write_transformers(tmp_path / "a"), tmp_path / "b"
    shutil.copytree(first, second)
    assert source(first).revision == source(second).revision
    assert source(first).revision.startswith("sha256:")
    (second / "config.json").write_text((second / "config.json").read_text() + " ")
    assert source(first).revision != source(second).revision


@pytest.mark.parametrize("name", ["backbone.embeddings.weight", "backbone.layers.1.mixer.A_log"])
@pytest.mark.parametrize("place", [0, -1])
def test_revision_of_a_folder_follows_its_weights(tmp_path: Path, name: str, place: int) -> None:
    content = tensors() | {"backbone.embeddings.weight": torch.zeros(VOCABULARY, 4096)}
    first = write_transformers(tmp_path / "a", content=content)
    content[name] = content[name].clone()
    content[name].view(-1)[place] += 1
    second = write_transformers(tmp_path / "b", content=content)
    assert source(first).revision != source(second).revision


def test_scales_of_one_folder_are_not_described_as_anothers_of_the_same_shapes(tmp_path: Path) -> None:
    """The manifest beside the scales, with its table, speaks of the folder they were found for alone."""
    names = [
        write_transformers(tmp_path / name, content=tensors(seed=seed)) for seed, name in enumerate(("a", "b"))
    ]
    runner = CliRunner()
    words = ["convert", str(names[0]), "--method", "constant", "--factor", "1.5", "-o", str(tmp_path / "o1")]
    assert runner.invoke(app, [*words, "-q"]).exit_code == 0
    names[0].rename(tmp_path / "elsewhere")
    names[1].rename(names[0])
    words = ["bake", str(names[0]), str(tmp_path / "o2"), "--scales", str(tmp_path / "o1"), "-q"]
    assert isinstance(runner.invoke(app, words).exception, UsageError)
    assert runner.invoke(app, [*words, "--anyway"]).exit_code == 0
    manifest = Manifest.read(tmp_path / "o2")
    assert manifest is not None and manifest.calibration is None


@pytest.mark.parametrize("model", ["demo", "demo:mamba2", "demo:mamba"])
def test_demo_is_a_state_spaces_checkpoint_like_any_other(model: str) -> None:
    snapshot = resolve(model)
    assert (snapshot.name, snapshot.kind, snapshot.weights) == (model, "demo", ("pytorch_model.bin",))
    assert read_checkpoint(snapshot).layout == "state-spaces"


def test_change_underneath_is_noticed(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    snapshot = source(folder)
    snapshot.check_unchanged()
    stat = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(SourceError, match=r"model\.safetensors of model changed"):
        snapshot.check_unchanged()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match="changed while it was being read"):
        bake(read_checkpoint(snapshot), out, scales=None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read any more"):
        snapshot.check_unchanged()


def test_converted_source_is_refused_by_the_name_of_its_base(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    write_manifest(folder)
    with pytest.raises(SourceError, match="already converted, from acme/base at c0ffee") as caught:
        resolve(str(folder))
    assert "--compose" in caught.value.fix
    snapshot = resolve(str(folder), compose=True)
    assert snapshot.manifest is not None and snapshot.manifest.source.name == "acme/base"
    for name in ("mmod_plots/a.png", "state-spaces/config.json", "mmod_scales.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert resolve(str(folder), compose=True).carried == snapshot.carried
    assert snapshot.carried == ("README.md", "config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "There is no folder ./nowhere"),
        ("/nowhere/at/all", "There is no folder /nowhere/at/all"),
        ("FILE", "is a file"),
        ("nowhere.gguf", "There is no file nowhere.gguf"),
        ("EMPTY", "holds no weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(SourceError, match=message):
        resolve(str(tmp_path / model) if model.isupper() else model)


SHARD = "model-00001-of-00002.safetensors"
INDEX = '{"weight_map": {"a": "%s"}}'


@pytest.mark.parametrize(
    ("files", "said", "fix"),
    [
        (
            {"pytorch_model.pt": ""},
            r"pickled weights, which are not opened \(pytorch_model\.pt\)",
            "save_pretrained",
        ),
        ({"last.ckpt": "", "a.pth": ""}, r"pickled weights, .* \(a\.pth and 1 more\)", "save_pretrained"),
        ({"tf_model.h5": ""}, "weights in another format", "save_pretrained"),
        ({"weights.npz": ""}, "weights in another format", "save_pretrained"),
        (
            {"model.bin": "", "training_args.bin": ""},
            r"another name \(model\.bin\)",
            "rename it to pytorch_model.bin",
        ),
        ({"consolidated.safetensors": ""}, "another name", "rename it to model.safetensors"),
        ({SHARD: ""}, "shards without their index", "index.json"),
        ({"checkpoint-5/model.safetensors": ""}, "in a folder below", "checkpoint-5"),
        ({"training_args.bin": "", "optimizer.pt": ""}, "holds no weights", "whole checkpoint"),
        ({"model.safetensors.index.json": INDEX % SHARD}, "lacks 1 of 1 shards", "again"),
        (
            {
                "model.safetensors.index.json": INDEX % SHARD,
                "pytorch_model.bin.index.json": INDEX % "pytorch_model-1-of-1.bin",
                "pytorch_model-1-of-1.bin": "",
            },
            "lacks 1 of 1 shards of model.safetensors.index.json",
            "so that pytorch_model.bin.index.json is read",
        ),
    ],
)
def test_what_lies_there_in_place_of_weights_is_told(
    tmp_path: Path, files: dict[str, str], said: str, fix: str
) -> None:
    for name, content in {**files, "config.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(MmodError, match=said) as refused:
        resolve(str(tmp_path))
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    ("name", "content", "said", "fix"),
    [
        ("model.safetensors", b"<!DOCTYPE html>", "page or message of a server", "Download it again"),
        (
            "model.safetensors",
            b'{"error": "no such repository"}',
            "page or message of a server",
            "Download it again",
        ),
        ("model.safetensors", b"PK\3\4" + bytes(99), "file of PyTorch", "pytorch_model.bin"),
        ("model.safetensors", b"\x1f\x8b" + b"\xff" * 99, "is packed", "Unpack"),
        ("pytorch_model.bin", b'\x09\0\0\0\0\0\0\0{"a": {}  }', "safetensors file", "model.safetensors"),
        ("pytorch_model.bin", b"<html>", "page or message of a server", "Download it again"),
        ("pytorch_model.bin", b"", "is empty", "again"),
        ("config.json", '{"a": "é"}'.encode("latin-1"), "can't decode byte", "Save it as UTF-8"),
        ("config.json", b'{"a": "\\ud83d"}', "half a character", "again"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_told_apart(
    tmp_path: Path, name: str, content: bytes, said: str, fix: str
) -> None:
    folder = write_transformers(tmp_path / "model")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=said) as refused:
        read_checkpoint(source(folder))
    assert fix in refused.value.fix


def test_tokenizer_is_named_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="is a file") as refused:
        resolve_tokenizer(str(tmp_path / "tokenizer.json"))
    assert refused.value.fix == "Name the folder that holds the tokenizer."


def test_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    with pytest.raises(UsageError, match="no --revision"):
        resolve(str(folder), revision="main")


def test_links_may_lead_to_the_hub_cache_and_nowhere_else(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "cache" / "snapshots" / "c0ffee")
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir()
    os.rename(folder / "model.safetensors", blobs / "aa")
    (folder / "model.safetensors").symlink_to("../../blobs/aa")
    assert source(folder).weights == ("model.safetensors",)
    for target in ("/etc/passwd", "../../../secret", "/etc"):
        (tmp_path / "secret").write_text("x")
        (folder / "notes").symlink_to(target)
        with pytest.raises(SourceError, match="notes is a link that leaves the folder"):
            source(folder)
        (folder / "notes").unlink()
    for target in ("nowhere", "notes"):
        (folder / "notes").symlink_to(target)
        with pytest.raises(SourceError, match="notes is a link that leads to no file: "):
            source(folder)
        (folder / "notes").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(SourceError, match="no regular file"):
        source(folder)


# The Hub


def test_hub_id_is_resolved_to_its_commit_and_only_what_is_needed_is_fetched(
    hub: HubServer, tmp_path: Path
) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub.add_repo("acme/model", {**files, "pytorch_model.bin": b"old", "model.gguf": b"other"})
    snapshot = resolve("acme/model")
    assert (snapshot.kind, snapshot.name, snapshot.revision) == ("hub", "acme/model", commit)
    present = {path.name for path in snapshot.folder.iterdir()}
    assert present == set(files)
    assert snapshot.left_out == ("model.gguf", "pytorch_model.bin")
    assert all(snapshot.file(name).sha256 for name in snapshot.weights)
    assert read_checkpoint(snapshot).A_log.keys() == read_checkpoint(source(folder)).A_log.keys()
    snapshot.check_unchanged()


def test_hub_revision_is_a_branch_tag_or_commit(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    first = hub.add_repo("acme/model", folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    repo = hub.repositories["acme/model"]
    second = hub.commit(repo, "main", {"config.json": (folder / "config.json").read_bytes()}, "Edit", "acme")
    assert resolve("acme/model").revision == second
    assert resolve("acme/model", revision=first).revision == first
    with pytest.raises(SourceError, match="no such revision"):
        resolve("acme/model", revision="v9")


def test_inspecting_a_hub_id_reads_headers_by_range(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    hub.add_repo("acme/model", folder)
    inspection = inspect(resolve("acme/model", weights=False))
    assert inspection.obstacle == "" and len(inspection.A_log) == 3
    assert not any(path.suffix == ".safetensors" for path in (tmp_path / "hub-home").rglob("snapshots/*/*"))


def test_inspecting_a_hub_id_with_a_bin_file_reads_its_table_alone(hub: HubServer) -> None:
    demo = resolve("demo")
    hub.add_repo("acme/tiny", demo.folder)
    inspection = inspect(resolve("acme/tiny", weights=False))
    assert inspection.layout == "state-spaces" and len(inspection.A_log) == 6
    sent = sum(entry.sent for entry in hub.log if entry.path.startswith("/object/"))
    assert sent < demo.file("pytorch_model.bin").size


def test_connection_lost_while_reading_by_range_is_said(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("acme/model", write_transformers(tmp_path / "model"))
    snapshot = resolve("acme/model", weights=False)
    hub.faults.append(Fault("GET", "/object/", "status", status=403, times=50))
    with pytest.raises(SourceError, match="Hub refused a request for acme/model"):
        read_checkpoint(snapshot)


def test_converted_hub_model_is_refused_before_its_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    write_manifest(folder)
    hub.add_repo("acme/converted", folder)
    with pytest.raises(SourceError, match="already converted, from acme/base"):
        resolve("acme/converted")
    assert not any(entry.path.startswith("/object/") for entry in hub.log)


def test_hub_refusals_keep_the_servers_words(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    hub.add_repo("acme/gated", folder, gated=True)
    hub.add_repo("acme/hidden", folder, private=True)
    with pytest.raises(SourceError, match="no model acme/nothing on the Hub that you can see"):
        resolve("acme/nothing")
    with pytest.raises(SourceError, match="no model acme/hidden on the Hub that you can see"):
        resolve("acme/hidden")
    with pytest.raises(SourceError, match="acme/gated is gated") as caught:
        resolve("acme/gated")
    assert "hf auth login" in caught.value.fix and "restricted" in caught.value.message
    with pytest.raises(SourceError, match="no name that the Hub takes"):
        resolve("bad--name/x")


def test_hub_out_of_reach_is_said_and_the_cache_serves_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_repo("acme/model", write_transformers(tmp_path / "model"))
    snapshot_download("acme/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot be reached for acme/model") as caught:
        resolve("acme/model")
    assert "HF_HUB_OFFLINE" in caught.value.fix
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = resolve("acme/model")
    assert (snapshot.kind, snapshot.revision) == ("hub", commit)
    with pytest.raises(SourceError, match="not in the local cache"):
        resolve("acme/other")


def test_hub_that_accepts_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.hub.ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SourceError, match="timed out") as caught:
            resolve("acme/model", weights=False)
    assert "network" in caught.value.fix


def test_what_this_tool_downloaded_serves_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"the weights again, which are not downloaded")
    commit = hub.add_repo("acme/model", folder)
    hub.add_repo("acme/headers", folder)
    downloaded = resolve("acme/model")
    resolve("acme/headers", weights=False)
    assert not (downloaded.folder / "pytorch_model.bin").exists()
    tokenizer = resolve_tokenizer("acme/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        cached = resolve("acme/model", revision=revision)
        assert (cached.folder, cached.weights, cached.revision) == (downloaded.folder, downloaded.weights, commit)
        assert resolve_tokenizer("acme/model", revision) == tokenizer
    with pytest.raises(SourceError, match=f"acme/model at {'0' * 40} is not in the local cache"):
        resolve("acme/model", revision="0" * 40)
    with pytest.raises(SourceError, match=r"holds a part of acme/headers only: .*no weights"):
        resolve("acme/headers")


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (folder / "sub").mkdir()
    (folder / "latest").symlink_to("sub")
    assert resolve(str(folder)).weights == ("model.safetensors",)


def test_hub_error_in_the_middle_is_no_traceback(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("acme/model", write_transformers(tmp_path / "model"))
    said = "No entry at https://cdn.example/blob?Signature=door for hf_secret"
    hub.faults.append(Fault("GET", "/api/models/acme/model", "status", status=403, message=said, times=20))
    with pytest.raises(MmodError, match=r"acme/model: No entry at https://cdn\.example/blob for hf_") as caught:
        resolve("acme/model")
    assert "door" not in caught.value.message and "secret" not in caught.value.message


def test_hub_file_names_that_lead_out_are_refused(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo("acme/bad", {**files, "../escape.txt": b"x"})
    with pytest.raises(CorruptCheckpointError, match="leads out of its folder"):
        resolve("acme/bad")


def test_without_a_table_no_held_out_text_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    folder = tiny_folder("mamba2", tmp_path / "model")
    hub.log.clear()
    words = ["convert", str(folder), "--data", str(novel(tmp_path, 60_000)), "--windows", "0", "--steps", "1"]
    words += ["--target-len", "256", "--train-len", "64", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert hub.log == []


def test_tokenizer_comes_from_a_folder_or_the_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    hub.add_repo("acme/model", folder)
    for name in (str(folder), "acme/model"):
        assert [path.name for path in resolve_tokenizer(name).files] == ["tokenizer.json", "tokenizer_config.json"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        resolve_tokenizer(str(folder))
    with pytest.raises(SourceError, match="no model acme/none"):
        resolve_tokenizer("acme/none")


def test_demo_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.source.__file__", str(tmp_path / "source.py"))
    with pytest.raises(SourceError, match="copy-mamba2-512 is not in this installation") as missing:
        resolve("demo:recall")
    assert "clone" in missing.value.fix
