"""The proof holds for every honest conversion and fails for a single changed bit anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import TOKENIZER
from converter.baking import bake
from converter.digests import sealed
from converter.errors import CorruptCheckpointError, SourceError, VerificationError
from converter.layouts import Tensor, read_checkpoint
from converter.manifest import MANIFEST_NAME, SCALES_NAME, Manifest
from converter.proof import verify
from converter.safetensors_file import TensorInfo, read_header
from converter.scales import FORMS, Form, Granularity, ScaleSet
from converter.scales_file import save_scales
from converter.shards import SafetensorsShard, Shard, copy_bytes, opening
from converter.source import resolve
from tests.conversions import convert, write_records
from tests.converted_folder import PERPLEXITY
from tests.hub_server import HubServer
from tests.small_checkpoints import CONFIG, random_scales, source, tensors, write_transformers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("a_log_dtype", ["float32", "keep"])
@pytest.mark.parametrize("A_log_dtype", [torch.float32, torch.bfloat16])
def test_honest_conversion_is_proved(
    tmp_path: Path, form: Form, a_log_dtype: str, A_log_dtype: torch.dtype
) -> None:
    snapshot = source(write_transformers(tmp_path / "model", 2, content=tensors(A_log_dtype=A_log_dtype)))
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(snapshot).A_log.items()}
    proof = convert(snapshot, tmp_path / "out", random_scales(shapes, "head", form), a_log_dtype=a_log_dtype)
    assert (proof.identical, proof.changed, proof.unproved) == (26, 3, ())


@pytest.mark.parametrize("demo", ["demo:mamba2", "demo:mamba"])
def test_conversion_of_a_state_spaces_checkpoint_is_proved(tmp_path: Path, demo: str) -> None:
    snapshot = resolve(demo)
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(snapshot).A_log.items()}
    assert convert(snapshot, tmp_path / "out", random_scales(shapes)).changed == len(shapes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_the_weights_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    if not folder.exists():
        write_transformers(folder)
        convert(source(folder), out)
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(start, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        weights.write_bytes(flipped)
        with pytest.raises((VerificationError, CorruptCheckpointError)):
            verify(source(out), read_checkpoint(source(folder)))
    finally:
        weights.write_bytes(content)


def test_quick_reads_the_declared_tensors_and_says_what_it_did_not_prove(tmp_path: Path) -> None:
    folder, out = write_transformers(tmp_path / "model"), tmp_path / "out"
    convert(source(folder), out)
    base = read_checkpoint(source(folder))
    proof = verify(source(out), base, quick=True)
    assert (proof.identical, proof.changed) == (0, 3)
    assert "26 other tensors" in proof.unproved[0]
    content = load_file(out / "model.safetensors")
    content["backbone.layers.1.mixer.D"] += 1
    save_file(content, out / "model.safetensors")
    verify(source(out), base, quick=True)
    with pytest.raises(VerificationError, match=r"layers\.1\.mixer\.D differs from the base's and is not declared"):
        verify(source(out), base)
    content["backbone.layers.1.mixer.A_log"] += 1e-3
    save_file(content, out / "model.safetensors")
    with pytest.raises(VerificationError, match=r"A_log is not A_log \+ log s of the base's"):
        verify(source(out), base, quick=True)


def _copy_carelessly(shard: Shard, tensor: TensorInfo, destination: int) -> None:
    """Copy a tensor, with a bit turned in the last one of each file."""
    copy_bytes(shard, tensor, destination)
    if tensor == shard.tensors[-1]:
        last = os.lseek(destination, 0, os.SEEK_CUR) - 1
        os.pwrite(destination, bytes([os.pread(destination, 1, last)[0] ^ 1]), last)


@pytest.mark.parametrize("shards", [1, 3])
def test_what_was_read_back_while_baking_is_all_but_what_changed_and_damage_is_found(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = source(write_transformers(tmp_path / "model", shards))
    checkpoint = read_checkpoint(snapshot)
    scales = random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()})
    (tmp_path / "whole").mkdir()
    report = bake(checkpoint, tmp_path / "whole", scales=scales, read_back=True)
    assert report.read_back == checkpoint.tensors.keys() - checkpoint.A_log.keys()

    monkeypatch.setattr("converter.baking.copy_bytes", _copy_carelessly)
    out = tmp_path / "damaged"
    out.mkdir()
    report = write_records(out, checkpoint, scales, read_back=True)
    assert len(report.read_back) == 26 - shards
    with pytest.raises(VerificationError, match="differs from the base's and is not declared"):
        verify(source(out), checkpoint, read_back=report.read_back)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "is missing in the converted checkpoint"),
        ("added", "is not in the base"),
        ("reshaped", "is expected"),
        ("retyped", "is expected"),
    ],
)
def test_tensors_that_are_other_tensors_are_named(tmp_path: Path, change: str, said: str) -> None:
    folder, out = write_transformers(tmp_path / "model"), tmp_path / "out"
    convert(source(folder), out)
    content = load_file(out / "model.safetensors")
    name = "backbone.norm_f.weight"
    match change:
        case "missing":
            del content[name]
        case "added":
            content["backbone.more"] = torch.ones(1)
        case "reshaped":
            content[name] = content[name].reshape(2, -1)
        case "retyped":
            content[name] = content[name].half()
    save_file(content, out / "model.safetensors")
    with pytest.raises(VerificationError, match=said):
        verify(source(out), read_checkpoint(source(folder)))


def test_manifest_scales_config_and_weights_must_agree(tmp_path: Path) -> None:
    folder, out = write_transformers(tmp_path / "model"), tmp_path / "out"
    convert(source(folder), out)
    base = read_checkpoint(source(folder))
    manifest = Manifest.read(out)
    assert manifest is not None
    scales = ScaleSet.load(str(out))

    dataclasses.replace(manifest, changed=manifest.changed[1:]).write(out)
    with pytest.raises(VerificationError, match=r"mmod\.json and mmod/scales\.safetensors disagree on .*layers\.0"):
        verify(source(out), base)
    manifest.write(out)

    other = {name: values + np.float32(0.01) for name, values in scales.log_s.items()}
    written = (out / SCALES_NAME).read_bytes()
    save_scales(out, dataclasses.replace(scales, log_s=other), base.A_log)
    with pytest.raises(VerificationError, match="is not A_log"):
        verify(source(out), base)
    (out / SCALES_NAME).write_bytes(written)

    config = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps({**json.loads(config), "head_dim": 4}))
    with pytest.raises(VerificationError, match=r"config\.json differs from the base's in head_dim"):
        verify(source(out), base)
    (out / "config.json").write_text(config)

    verify(source(out), base)
    with pytest.raises(VerificationError, match=r"has no mmod\.json"):
        verify(source(folder), base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a file of every kind, and its conversion."""
    place = tmp_path_factory.mktemp("whole")
    config = {**CONFIG, "auto_map": {"AutoModel": "modeling_own.Model"}}
    model = write_transformers(place / "model", shards=2, config=config)
    (model / "tokenizer.json").write_text(TOKENIZER.replace('"a": 0', '"yes": 0, "no": 1'))
    (model / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "modeling_own.py").write_text("class Model: ...")
    (model / "LICENSE").write_text("as is")
    convert(source(model), place / "out")
    return place


def test_manifest_has_the_digest_of_every_file_but_the_card(whole: Path) -> None:
    manifest = Manifest.read(whole / "out")
    assert manifest is not None
    files = {str(path.relative_to(whole / "out")) for path in (whole / "out").rglob("*") if path.is_file()}
    assert manifest.files.keys() == files - {MANIFEST_NAME, "README.md", "LICENSE"}
    for path, digest in manifest.files.items():
        assert digest == hashlib.sha256((whole / "out" / path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tokenizer.json", TOKENIZER.replace('"a": 0', '"yes": 1, "no": 0')),
        ("tokenizer_config.json", '{"model_max_length": 1}'),
        ("special_tokens_map.json", '{"eos_token": "<other>"}'),
        ("generation_config.json", '{"eos_token_id": 1}'),
        ("chat_template.jinja", "{{ other }}"),
        ("modeling_own.py", "class Model: other = 1"),
        ("LICENSE", None),
        ("generation_config.json", None),
        ("processor_config.json", "{}"),
        ("training_args.bin", "x"),
        ("mmod/more.json", "{}"),
        ("model.safetensors.index.json", "a line more"),
    ],
)
def test_file_that_was_changed_added_or_removed_is_named(
    whole: Path, tmp_path: Path, path: str, content: str | None
) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    base = read_checkpoint(source(whole / "model"))
    verify(source(out), base)
    if content is None:
        (out / path).unlink()
    elif path.endswith("index.json"):
        (out / path).write_text((out / path).read_text() + "\n")
    else:
        (out / path).write_text(content)
    said = "is missing" if content is None else "differs from" if (whole / "out" / path).exists() else "was added"
    with pytest.raises(VerificationError, match=rf"{re.escape(path)} {said}"):
        verify(source(out), base)


def test_weights_and_scales_of_another_conversion_are_noticed(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    snapshot = source(whole / "model")
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(snapshot).A_log.items()}
    convert(snapshot, tmp_path / "other", random_scales(shapes, seed=5))
    for path in (*out.glob("*.safetensors"), out / SCALES_NAME):
        path.write_bytes((tmp_path / "other" / path.relative_to(out)).read_bytes())
    with pytest.raises(VerificationError, match=r"mmod/scales\.safetensors is not the file that was written"):
        verify(source(out), read_checkpoint(snapshot))
    with pytest.raises(VerificationError, match=r"mmod/scales\.safetensors is not the file that was written"):
        verify(source(out), read_checkpoint(snapshot), quick=True)


def test_value_that_is_off_by_its_last_bit_is_not_the_formulas(whole: Path, tmp_path: Path) -> None:
    """Even in a folder whose manifest was sealed again with the digests of what lies there."""
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    name = "backbone.layers.1.mixer.A_log"
    for path in out.glob("model*.safetensors"):
        content = load_file(path)
        if name in content:
            content[name][2] = torch.nextafter(content[name][2], torch.tensor(9.0))
            save_file(content, path, metadata={"format": "pt"})
    manifest = Manifest.read(out)
    assert manifest is not None
    sealed(manifest, out).write(out)
    with pytest.raises(VerificationError, match=f"{re.escape(name)} is not A_log \\+ log s"):
        verify(source(out), read_checkpoint(source(whole / "model")))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("perplexity", None, r"mmod\.json was changed"),
        ("notes", ["Nothing to see."], r"mmod\.json was changed"),
        ("form", "power", "disagree on the form"),
        ("granularity", "element", "disagree on the granularity"),
        ("source", {"name": "another"}, r"mmod\.json was changed"),
        ("source", {"revision": "sha256:00"}, r"names revision sha256:00 of the base"),
    ],
)
def test_falsified_manifest_is_noticed(whole: Path, tmp_path: Path, field: str, value: Any, said: str) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    base = read_checkpoint(source(whole / "model"))
    manifest = Manifest.read(out)
    assert manifest is not None
    dataclasses.replace(manifest, perplexity=PERPLEXITY).write(out)
    assert "perplexities are what was measured" in verify(source(out), base).unproved[0]
    content = json.loads((out / MANIFEST_NAME).read_text())
    content[field] = content[field] | value if isinstance(value, dict) else value
    (out / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=said):
        verify(source(out), base)


def test_revision_of_the_base_is_the_one_that_the_manifest_names(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    manifest = Manifest.read(out)
    assert manifest is not None
    other = dataclasses.replace(manifest.source, revision="sha256:00")
    dataclasses.replace(manifest, source=other).write(out)
    with pytest.raises(VerificationError, match=r"names revision sha256:00 of the base"):
        verify(source(out), read_checkpoint(source(whole / "model")))


def test_another_base_is_noticed(tmp_path: Path) -> None:
    folder, out = write_transformers(tmp_path / "model"), tmp_path / "out"
    convert(source(folder), out)
    other = write_transformers(tmp_path / "other", content=tensors(seed=1))
    smaller = write_transformers(tmp_path / "smaller", config={**CONFIG, "max_position_embeddings": 64})
    for base, quick in itertools.product((other, smaller, out), (False, True)):
        # What differs from it is not taken for damage.
        with pytest.raises(VerificationError, match="and this is sha256:"):
            verify(source(out), read_checkpoint(source(base)), quick=quick)


# Scales on the disk


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FORMS), st.sampled_from(["layer", "channel", "element"]), st.integers(0, 1000))
def test_scales_survive_the_disk_bit_for_bit(
    tmp_path: Path, form: Form, granularity: Granularity, seed: int
) -> None:
    scales = random_scales({"b.A_log": (4, 3), "a.A_log": (4, 3)}, granularity, form, seed)
    save_file({name: torch.zeros(4, 3) for name in scales.log_s}, tmp_path / "base.safetensors")
    shard = SafetensorsShard.open("base", opening(tmp_path / "base.safetensors"))
    path = save_scales(tmp_path, scales, {info.name: Tensor(info.name, info, shard) for info in shard.tensors})
    loaded = ScaleSet.load(str(path))
    assert (loaded.form, loaded.granularity) == (form, granularity)
    assert loaded.log_s.keys() == scales.log_s.keys()
    assert all(np.array_equal(loaded.log_s[name], scales.log_s[name]) for name in scales.log_s)
    with open(path, "rb") as file:
        assert {info.dtype for info in read_header(file, "scales").tensors} == {"F32"}


def test_scales_come_from_a_file_a_folder_or_the_hub(hub: HubServer, tmp_path: Path) -> None:
    convert(source(write_transformers(tmp_path / "model")), tmp_path / "out")
    hub.add_repo("acme/converted", tmp_path / "out")
    found = [
        ScaleSet.load(str(place)) for place in (tmp_path / "out", tmp_path / "out" / SCALES_NAME, "acme/converted")
    ]
    for scales in found[1:]:
        assert all(np.array_equal(scales.log_s[name], found[0].log_s[name]) for name in found[0].log_s)


def test_no_name_of_a_factor_is_one_that_a_model_has(tmp_path: Path) -> None:
    convert(source(write_transformers(tmp_path / "model")), tmp_path / "out")
    names = load_file(tmp_path / "out" / SCALES_NAME).keys()
    assert names and names.isdisjoint(load_file(tmp_path / "out" / "model.safetensors"))


def test_what_holds_no_scales_is_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    with pytest.raises(SourceError, match="holds no mmod/scales"):
        ScaleSet.load(str(folder))
    with pytest.raises(CorruptCheckpointError, match="holds no scales"):
        ScaleSet.load(str(folder / "model.safetensors"))
    (tmp_path / "x").write_text("x")
    with pytest.raises(CorruptCheckpointError):
        ScaleSet.load(str(tmp_path / "x"))
    save_scales(tmp_path, ScaleSet("linear", "layer", {}), {})
    assert ScaleSet.load(str(tmp_path)).log_s == {}


# The Hub


def test_files_with_equal_hashes_on_the_hub_are_not_read(hub: HubServer, tmp_path: Path) -> None:
    content = tensors()
    in_order = {name: content[name] for name in sorted(content, key=lambda name: not name.endswith("A_log"))}
    folder = write_transformers(tmp_path / "model", content=in_order)
    names = [name for name in in_order if not name.endswith("A_log")]
    # One shard with every A_log and one without any.
    for file, part in (
        ("model-00001-of-00002.safetensors", [name for name in in_order if name.endswith("A_log")]),
        ("model-00002-of-00002.safetensors", names),
    ):
        save_file({name: in_order[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 if name.endswith('A_log') else 2}-of-00002.safetensors" for name in in_order}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hub.add_repo("acme/base", folder)
    convert(resolve("acme/base"), tmp_path / "out")
    hub.add_repo("acme/converted", tmp_path / "out")
    before = len(hub.log)
    base = read_checkpoint(resolve("acme/base", weights=False))
    proof = verify(resolve("acme/converted", compose=True, weights=False), base)
    assert (proof.identical, proof.changed) == (26, 3)
    quick = verify(resolve("acme/converted", compose=True, weights=False), base, quick=True)
    assert (quick.identical, quick.unproved) == (26, ())
    assert proof.by_hash == (weight_map["backbone.norm_f.weight"],)
    assert (tmp_path / "out" / MANIFEST_NAME).exists() and len(hub.log) > before
