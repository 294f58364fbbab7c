"""The commands that a card and a manifest name: run as they stand, they repeat and prove the conversion."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch
from typer.testing import CliRunner

from benchmarks.synthetic import TOKENIZER
from converter.command_line import name_of
from converter.commands.cli import app
from converter.manifest import SCALES_NAME, Manifest
from tests.hub_server import HubServer
from tests.small_checkpoints import CONFIG, tensors, write_state_spaces_source, write_transformers

CONSTANT = ("--method", "constant", "--factor", "1.5")


def mmod(*words: str | Path) -> None:
    done = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert done.exit_code == 0, (words, done.output, done.exception)


def manifest_of(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    assert manifest is not None
    return manifest


def card_commands(folder: Path, **places: Path | str) -> list[list[str]]:
    """The `mmod` commands of a card itself, in words, with places for the names to fill in."""
    lines = re.findall(r"^mmod (.*)$", (folder / "README.md").read_text(), re.MULTILINE)
    filled = {"path/to/this/folder": str(folder)} | {name: str(place) for name, place in places.items()}
    # A source that this tool made has a card with such lines, which follows.
    return [[filled.get(word, word) for word in shlex.split(line)] for line in lines[:2]]


def write_half_precise(folder: Path) -> Path:
    return write_transformers(folder, content=tensors(A_log_dtype=torch.bfloat16))


def test_card_of_a_folder_repeats_and_proves_it(tmp_path: Path) -> None:
    folder = write_half_precise(tmp_path / "model")
    for name, options in (("as-float32", ()), ("kept", ("--a-log-dtype", "keep"))):
        out, again = tmp_path / name, tmp_path / f"{name}-again"
        mmod("convert", folder, *CONSTANT, *options, "--output", out)
        bake, verify = card_commands(out, FOLDER_OF_THE_SOURCE=folder, OUTPUT=again)
        mmod(*bake)
        assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        mmod(*verify, "--no-load")


def test_card_of_a_composed_model_of_unknown_kind_with_a_folders_tokenizer(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", config={**CONFIG, "model_type": "novel"})
    words = tmp_path / "words"
    words.mkdir()
    (folder / "tokenizer.json").rename(words / "tokenizer.json")
    mmod("convert", folder, *CONSTANT, "--trust-a-log", "--tokenizer", words, "--output", tmp_path / "once")
    bake, verify = card_commands(
        tmp_path / "once",
        FOLDER_OF_THE_SOURCE=folder,
        OUTPUT=tmp_path / "again",
        FOLDER_OF_THE_TOKENIZER=words,
    )
    mmod(*bake)
    mmod(*verify, "--no-load")
    assert manifest_of(tmp_path / "again") == manifest_of(tmp_path / "once")
    mmod("convert", tmp_path / "once", *CONSTANT, "--trust-a-log", "--compose", "-o", tmp_path / "twice")
    bake, verify = card_commands(
        tmp_path / "twice", FOLDER_OF_THE_SOURCE=tmp_path / "once", OUTPUT=tmp_path / "twice-again"
    )
    mmod(*bake)
    mmod(*verify, "--no-load")


def test_bake_records_every_option_that_it_took(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", config={**CONFIG, "model_type": "novel"})
    other = write_transformers(
        tmp_path / "other", config={**CONFIG, "model_type": "novel"}, content=tensors(seed=1)
    )
    mmod("convert", folder, *CONSTANT, "--trust-a-log", "--output", tmp_path / "once")
    mmod("convert", other, *CONSTANT, "--trust-a-log", "--output", tmp_path / "other-once")
    words = ("--scales", tmp_path / "once", "--trust-a-log", "--compose", "--a-log-dtype", "keep", "--anyway")
    mmod("bake", tmp_path / "other-once", tmp_path / "twice", *words, "--no-proof")
    assert manifest_of(tmp_path / "twice").command == (
        "mmod bake other-once twice --scales once --a-log-dtype keep --trust-a-log --compose --anyway"
    )


def test_command_names_the_commit_of_a_hub_source(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add_repo("acme/model", write_transformers(tmp_path / "model"))
    mmod("convert", "acme/model", *CONSTANT, "--target-len", "4k", "--output", tmp_path / "out")
    line = f"mmod-convert acme/model --target-len 4k --revision {commit} --method constant --factor 1.5"
    assert manifest_of(tmp_path / "out").command == line
    mmod("convert", *shlex.split(line)[1:], "--output", tmp_path / "again")
    assert manifest_of(tmp_path / "again") == manifest_of(tmp_path / "out")


def test_names_take_the_place_of_paths(tmp_path: Path) -> None:
    text = tmp_path / "secret" / "text.txt"
    text.parent.mkdir()
    text.write_text("words")
    assert name_of(str(text)) == name_of(f"{text.parent}/../secret/text.txt") == "text.txt"
    assert name_of(f"{text}=2") == "text.txt=2"
    assert name_of(f"{text.parent}=0.5") == "secret=0.5"
    assert name_of(f"{tmp_path}/gone.txt=2") == "gone.txt=2"
    for name in ("emozilla/pg19:train", "emozilla/pg19:train=2", "demo:mamba", "acme/model"):
        assert name_of(name) == name


def test_no_option_leaves_a_path_in_what_is_published(tmp_path: Path) -> None:
    """Every option of both verbs that takes a path, on folders whose names the output may say."""
    secret = tmp_path / "secret"
    model = write_state_spaces_source(secret / "model")
    (secret / "words").mkdir()
    (secret / "words" / "tokenizer.json").write_text(TOKENIZER)
    (secret / "text.txt").write_text("words")
    words = ("--tokenizer", secret / "words", "--data", f"{secret}/text.txt=2", "--held-out", secret / "text.txt")
    mmod("convert", model, *CONSTANT, *words, "--windows", "0", "--output", secret / "out")
    mmod(
        *("bake", write_half_precise(secret / "half"), secret / "baked"),
        *("--scales", secret / "out" / SCALES_NAME),
    )
    for folder in ("out", "baked"):
        for path in (secret / folder).iterdir():
            if path.suffix in (".json", ".md"):
                assert "secret" not in path.read_text(), path
    assert "--data text.txt=2" in manifest_of(secret / "out").command


def test_scales_from_the_hub_are_pinned_to_their_commit(hub: HubServer, tmp_path: Path) -> None:
    """The command in the manifest takes them again after the repository has moved on."""
    model = write_transformers(tmp_path / "model")
    hub.add_repo("acme/model", model)
    for name, factor in (("first", "1.5"), ("second", "2")):
        mmod("convert", "acme/model", "--method", "constant", "--factor", factor, "--output", tmp_path / name)
    commit = hub.add_repo("acme/scaled", tmp_path / "first")
    A_log = {name: value for name, value in tensors().items() if name.endswith("A_log")}
    other = write_transformers(tmp_path / "other", content=tensors(seed=1) | A_log)
    mmod("bake", other, tmp_path / "out", "--scales", "acme/scaled")
    command = shlex.split(manifest_of(tmp_path / "out").command)
    assert f"acme/scaled@{commit}" in command
    files = {
        path.relative_to(tmp_path / "second").as_posix(): path.read_bytes()
        for path in (tmp_path / "second").rglob("*")
        if path.is_file()
    }
    hub.commit(hub.repositories["acme/scaled"], "main", files, "Another", "acme")
    mmod(*command[1:2], other, tmp_path / "again", *command[4:])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
