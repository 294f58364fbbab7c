"""A tokenizer that is added to a checkpoint is pinned: recorded, and taken again when a bake is repeated."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.synthetic import TOKENIZER
from converter.commands.cli import app
from converter.errors import MmodError, SourceError, UsageError
from converter.layouts.tokenizer_files import vocabulary_size
from converter.manifest import Manifest, TokenizerRecord
from converter.source import resolve_tokenizer
from tests.hub_server import HubServer
from tests.small_checkpoints import write_state_spaces_source, write_transformers

FIRST = {"tokenizer.json": TOKENIZER.encode(), "tokenizer_config.json": b'{"model_max_length": 2048}'}
SECOND = {
    **FIRST,
    "tokenizer.json": TOKENIZER.replace("{", '{"truncation": null, ', 1).encode(),
    "merges.txt": b"a b",
}


def mmod(*words: str | Path) -> None:
    """Run a command that must succeed."""
    done = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert done.exit_code == 0, (done.output, done.exception)


def refused(*words: str | Path) -> MmodError:
    """Run a command that must fail with an error of the tool's own, and return that."""
    done = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert isinstance(done.exception, MmodError)
    return done.exception


def write_without_tokenizer(folder: Path) -> Path:
    """A checkpoint in the transformers layout with no tokenizer beside it."""
    write_transformers(folder)
    for name in FIRST:
        (folder / name).unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the card and its pictures, which a bake leaves to `mmod card`."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}


def convert(model: Path, out: Path, *words: str | Path) -> Manifest:
    """Convert by a constant factor and return the manifest."""
    mmod("convert", model, "--method", "constant", "--factor", "1.5", "--output", out, *words)
    manifest = Manifest.read(out)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("write", [write_state_spaces_source, write_without_tokenizer])
def test_tokenizer_of_the_hub_stays_at_its_commit_when_a_bake_is_repeated(
    hub: HubServer, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    first = hub.add_repo("acme/words", FIRST)
    model, out = write(tmp_path / "model"), tmp_path / "out"
    manifest = convert(model, out, "--tokenizer", "acme/words")
    assert manifest.tokenizer == TokenizerRecord("acme/words", "hub", first)
    second = hub.commit(hub.repositories["acme/words"], "main", SECOND, "A new version", "acme")
    for number, words in enumerate([(), ("--tokenizer", "acme/words")]):
        mmod("bake", model, tmp_path / f"again-{number}", "--scales", out, *words)
        assert contents(tmp_path / f"again-{number}") == contents(out)
    fresh = convert(model, tmp_path / "fresh", "--tokenizer", "acme/words")
    assert fresh.tokenizer == TokenizerRecord("acme/words", "hub", second)
    assert (tmp_path / "fresh" / "merges.txt").read_bytes() == SECOND["merges.txt"]


def test_newest_commit_is_what_an_unpinned_tokenizer_means(hub: HubServer) -> None:
    first = hub.add_repo("acme/words", FIRST)
    assert resolve_tokenizer("acme/words").record.revision == first
    second = hub.commit(hub.repositories["acme/words"], "main", SECOND, "A new version", "acme")
    assert resolve_tokenizer("acme/words").record.revision == second
    pinned = resolve_tokenizer("acme/words", first)
    assert {path.name: path.read_bytes() for path in pinned.files} == FIRST
    with pytest.raises(SourceError, match="no such revision"):
        resolve_tokenizer("acme/words", "f" * 40)


def test_tokenizer_of_a_folder_is_asked_for_again_and_recognised(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    for name, content in FIRST.items():
        (words / name).write_bytes(content)
    model, out = write_state_spaces_source(tmp_path / "model"), tmp_path / "out"
    manifest = convert(model, out, "--tokenizer", words)
    assert manifest.tokenizer is not None and manifest.tokenizer.kind == "folder"
    assert str(tmp_path) not in manifest.to_json()
    assert "Say where it is with --tokenizer" in refused("bake", model, tmp_path / "no", "--scales", out).fix
    mmod("bake", model, tmp_path / "again", "--scales", out, "--tokenizer", words)
    assert contents(tmp_path / "again") == contents(out)
    # Other files under the same name make another model, of which the old record does not speak.
    (words / "tokenizer.json").write_bytes(SECOND["tokenizer.json"])
    mmod("bake", model, tmp_path / "other", "--scales", out, "--tokenizer", words)
    other = Manifest.read(tmp_path / "other")
    assert other is not None and other.calibration is None
    assert other.tokenizer is not None and other.tokenizer.revision != manifest.tokenizer.revision
    assert "--tokenizer words" in other.command


def test_manifest_without_the_record_is_read_and_completed(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add_repo("acme/words", FIRST)
    model, out = write_state_spaces_source(tmp_path / "model"), tmp_path / "out"
    manifest = convert(model, out, "--tokenizer", "acme/words")
    older = json.loads(manifest.to_json())
    del older["tokenizer"]
    (out / "mmod.json").write_text(json.dumps(older))
    assert Manifest.read(out) == dataclasses.replace(manifest, tokenizer=None)
    mmod("bake", model, tmp_path / "again", "--scales", out, "--tokenizer", "acme/words")
    again = Manifest.read(tmp_path / "again")
    assert again == manifest and again.tokenizer == TokenizerRecord("acme/words", "hub", first)


def test_checkpoint_keeps_its_own_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("acme/words", FIRST)
    model = write_transformers(tmp_path / "model")
    assert convert(model, tmp_path / "out").tokenizer is None
    for words in (("convert", model), ("bake", model, tmp_path / "no", "--scales", tmp_path / "out")):
        error = refused(*words, "--tokenizer", "acme/words")
        assert isinstance(error, UsageError) and "a tokenizer of its own" in error.message


def write_words(folder: Path, end: int, size: int = 8) -> Path:
    """A tokenizer's files with an end-of-text token of that id."""
    folder.mkdir(exist_ok=True)
    vocabulary = {f"word{number}": number for number in range(size)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": end, "content": "</s>", **flags}]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"}
    content = {"version": "1.0", "added_tokens": added, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_added_tokenizer_gives_the_same_copy_as_one_beside_the_model(tmp_path: Path) -> None:
    words = write_words(tmp_path / "words", end=2)
    bare = write_state_spaces_source(tmp_path / "bare")
    beside = Path(shutil.copytree(bare, tmp_path / "beside"))
    shutil.copytree(words, beside, dirs_exist_ok=True)
    out = tmp_path / "out"
    convert(bare, out, "--tokenizer", words)
    convert(beside, tmp_path / "expected")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    mmod("verify", out, "--base", bare, "--no-load")
    mmod("bake", bare, tmp_path / "again", "--scales", out, "--tokenizer", words)
    assert contents(tmp_path / "again") == contents(out)


@pytest.mark.parametrize("verb", ["convert", "bake", "evaluate"])
def test_all_verbs_treat_tokenizers_alike(tmp_path: Path, verb: str) -> None:
    own, bare = write_transformers(tmp_path / "own"), write_state_spaces_source(tmp_path / "bare")
    words, too_many = write_words(tmp_path / "words", end=2), write_words(tmp_path / "too-many", end=32)
    convert(own, tmp_path / "scaled")

    def complaint(model: Path, *tokenizer: str | Path) -> MmodError:
        options: dict[str, tuple[str | Path, ...]] = {
            "convert": ("--method", "constant", "--factor", "1.5", "--output", tmp_path / "no"),
            "bake": (tmp_path / "no", "--scales", tmp_path / "scaled"),
            "evaluate": (),
        }
        return refused(verb, model, *options[verb], *tokenizer)

    error = complaint(own, "--tokenizer", words)
    assert isinstance(error, UsageError) and "a tokenizer of its own" in error.message
    error = complaint(bare, "--tokenizer", too_many)
    assert isinstance(error, UsageError) and "33 tokens" in error.message and "32 rows" in error.message
    assert not (tmp_path / "no").exists()


def test_among_several_models_to_evaluate_it_is_for_those_that_have_none(tmp_path: Path) -> None:
    own, bare = write_transformers(tmp_path / "own"), write_state_spaces_source(tmp_path / "bare")
    error = refused("evaluate", bare, own, "--tokenizer", write_words(tmp_path / "too-many", end=32))
    assert "33 tokens" in error.message
    error = refused("evaluate", own, bare, "--tokenizer", write_words(tmp_path / "words", end=2))
    assert "a tokenizer of its own" not in error.message


def test_only_the_state_spaces_layout_gets_a_tokenizer_unasked_and_that_is_said(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo("EleutherAI/gpt-neox-20b", FIRST)
    other, words = write_without_tokenizer(tmp_path / "other"), ("--method", "constant", "--factor", "1.5")
    assert convert(other, tmp_path / "plain").tokenizer is None
    assert not any("gpt-neox" in entry.path for entry in hub.log)
    assert "--tokenizer" in refused("convert", other, *words, "--held-out", other / "README.md").fix
    assert "--tokenizer" in refused("evaluate", other).fix
    model = write_state_spaces_source(tmp_path / "model")
    done = CliRunner().invoke(app, ["convert", str(model), *words, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0 and "no tokenizer" in done.output and "EleutherAI/gpt-neox-20b" in done.output
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and manifest.tokenizer is not None
    assert manifest.tokenizer.name == "EleutherAI/gpt-neox-20b"


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({}, 0),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 9}}}}, 10),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 4}]}}, 5),
        ({"tokenizer.json": {"model": [], "added_tokens": None}}, 0),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<end>": 2}}, 3),
    ],
)
def test_size_of_a_vocabulary_is_read_from_every_kind_of_file(files: dict[str, object], size: int) -> None:
    encoded = {name: json.dumps(content).encode() for name, content in files.items()}
    assert vocabulary_size(encoded.get) == size


def test_tokenizer_that_is_code_is_refused_where_it_is_needed_and_another_may_be_named(tmp_path: Path) -> None:
    model = write_transformers(tmp_path / "model")
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (model / "tiktoken.model").write_bytes(b"tokens")
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.Words", None]}}))
    (model / "words.py").write_text("raise SystemExit('this code never runs')")
    convert(model, tmp_path / "unread")
    text = tmp_path / "text.txt"
    text.write_text("words " * 9000)
    out = tmp_path / "out"
    words: list[str | Path] = ["convert", model, "--method", "constant", "--factor", "1.5", "--output", out]
    error = refused(*words, "--held-out", text)
    assert "is code of its own" in error.message and "--tokenizer" in error.fix
    (model / "tiktoken.model").unlink()
    assert "is code of its own" in refused(*words, "--held-out", text).message
    (tmp_path / "words").mkdir()
    for name, content in FIRST.items():
        (tmp_path / "words" / name).write_bytes(content)
    manifest = convert(model, out, "--tokenizer", tmp_path / "words")
    assert manifest.tokenizer is not None and manifest.tokenizer.name == "words"
    assert (out / "tokenizer.json").read_bytes() == FIRST["tokenizer.json"]
