"""A tokenizer that is added to a checkpoint is pinned: recorded, and taken again when a bake is repeated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from converter.cli import app
from converter.errors import MmodError, SourceError, UsageError
from converter.manifest import Manifest, TokenizerRecord
from converter.source import resolve_tokenizer
from tests.hub_server import HubServer
from tests.small_checkpoints import write_state_spaces_source, write_transformers

FIRST = {"tokenizer.json": b'{"added_tokens": []}', "tokenizer_config.json": b'{"model_max_length": 2048}'}
SECOND = {**FIRST, "tokenizer.json": b'{"added_tokens": [], "version": "2"}', "merges.txt": b"a b"}


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
