"""What ``mmod verify`` reads of models on the Hub: files whose digests differ, one side of them, and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.errors import SourceError, VerificationError
from converter.layouts import read_checkpoint
from converter.proof import verify
from converter.source import resolve
from tests.conversions import convert
from tests.hub_server import Fault, HubServer
from tests.small_checkpoints import tensors, write_state_spaces_source, write_transformers

BASE, CONVERTED = "acme/base", "acme/converted"
SMALL_FILES = 20_000
"""More than config, manifest, scales, tokenizer and the headers of the weights have together."""


def large_model(folder: Path, files: int) -> Path:
    """A model of 25 MB; of three files the first has every A_log."""
    generator = torch.Generator().manual_seed(1)
    content = {name: tensor for name, tensor in tensors().items() if "embeddings" not in name}
    content |= {
        f"backbone.{name}.weight": torch.randn((1024, 4096), generator=generator).bfloat16()
        for name in ("layers.0.mlp", "embeddings", "norm_f.more")
    }
    write_transformers(folder, content=content)
    if files == 1:
        return folder
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-{1 if 'layers' in name else 2 if 'embeddings' in name else 3:05}-of-00003.safetensors"
        for name in content
    }
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in content.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def published(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """The folder of a conversion, which is on the Hub as its base is; nothing of either is in the cache."""
    hub.add_repo(BASE, large_model(tmp_path / "model", getattr(request, "param", 3)))
    convert(resolve(BASE), tmp_path / "out")
    hub.add_repo(CONVERTED, tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    hub.log.clear()
    return tmp_path / "out"


def mmod_verify(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def read_bytes(hub: HubServer) -> int:
    """Bytes of files that were sent since the log was cleared."""
    return sum(entry.sent for entry in hub.log if entry.path.startswith("/object/") or "/resolve/" in entry.path)


def change_a_bit(hub: HubServer, repo: str, file: str) -> None:
    content = bytearray(hub.content(repo, file))
    content[-5] ^= 1
    hub.commit(hub.repositories[repo], "main", {file: bytes(content)}, "Tampered", "acme")


def test_of_shards_the_one_with_A_log_is_read_and_that_once(hub: HubServer, published: Path) -> None:
    proof = mmod_verify(CONVERTED)
    assert (proof["identical_tensors"], proof["changed_tensors"]) == (28, 3)
    assert proof["equal_by_hash"] == [f"model-0000{number}-of-00003.safetensors" for number in (2, 3)]
    assert proof["not_proved"] == ["That stock transformers loads it (it was not loaded)."]
    shard = (published / "model-00001-of-00003.safetensors").stat().st_size
    assert shard < read_bytes(hub) < 1.1 * shard


@pytest.mark.parametrize("published", [1], indirect=True)
def test_one_file_is_read_once_and_with_quick_its_header_and_A_log(hub: HubServer, published: Path) -> None:
    assert mmod_verify(CONVERTED)["identical_tensors"] == 28
    size = (published / "model.safetensors").stat().st_size
    assert size < read_bytes(hub) < 1.1 * size
    hub.log.clear()
    shutil.rmtree(constants.HF_HUB_CACHE)
    proof = mmod_verify(CONVERTED, "--quick")
    assert (proof["identical_tensors"], proof["changed_tensors"]) == (0, 3)
    # A header is read in pieces of 64 KiB.
    assert read_bytes(hub) < SMALL_FILES + 2 * 2**16


def test_side_that_is_here_is_read_in_place_of_the_hubs(hub: HubServer, published: Path, tmp_path: Path) -> None:
    limit = SMALL_FILES + 6 * 2**16
    assert mmod_verify(published, "--no-load")["identical_tensors"] == 28
    assert read_bytes(hub) < limit
    hub.log.clear()
    assert mmod_verify(CONVERTED, "--base", tmp_path / "model")["identical_tensors"] == 28
    assert read_bytes(hub) < limit


def test_bin_file_of_the_base_is_read_and_not_the_converted_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(BASE, write_state_spaces_source(tmp_path / "model"))
    convert(resolve(BASE), tmp_path / "out")
    hub.add_repo(CONVERTED, tmp_path / "out")
    hub.log.clear()
    assert mmod_verify(CONVERTED)["identical_tensors"] == 26
    asked = hub.repositories[CONVERTED].commits[hub.repositories[CONVERTED].refs["main"]].files["model.safetensors"]
    header = 8 + int.from_bytes(hub.content(CONVERTED, "model.safetensors")[:8], "little")
    sent = sum(entry.sent for entry in hub.log if asked.sha256 in entry.path)
    assert header < sent < 2 * asked.size


@pytest.mark.parametrize("side", ["base", "converted", "both"])
def test_changed_bit_is_found_whichever_side_is_read(hub: HubServer, published: Path, side: str) -> None:
    change_a_bit(hub, CONVERTED, "model-00001-of-00003.safetensors")
    change_a_bit(hub, CONVERTED, "model-00003-of-00003.safetensors")
    base = resolve(BASE, weights=side == "base")
    converted = resolve(CONVERTED, compose=True, weights=side == "converted")
    with pytest.raises(VerificationError, match=r"Tensor backbone\.\S+ differs from the base's"):
        verify(converted, read_checkpoint(base))


def test_files_beside_the_weights_are_compared(hub: HubServer, published: Path) -> None:
    change = {"tokenizer.json": b'{"added_tokens": [ ]}'}
    hub.commit(hub.repositories[CONVERTED], "main", change, "Tampered", "acme")
    with pytest.raises(VerificationError, match=r"tokenizer\.json differs from what the base gives"):
        verify(resolve(CONVERTED, compose=True, weights=False), read_checkpoint(resolve(BASE, weights=False)))


def test_answer_of_another_length_is_no_proof(hub: HubServer, published: Path) -> None:
    hub.faults.append(Fault("GET", "/object/", "whole", times=20))
    with pytest.raises(SourceError, match="in place of 65536"):
        read_checkpoint(resolve(CONVERTED, compose=True, weights=False))
