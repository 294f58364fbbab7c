"""The baked copy: right values rounded once, every other byte kept, loadable, and complete."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from converter.baking import BakeReport, bake
from converter.commands import api
from converter.commands.cli import app
from converter.digests import RunningDigest, sha256_of
from converter.errors import LayoutError, OutputError, UsageError
from converter.layouts import read_checkpoint, with_tokenizer
from converter.manifest import Manifest
from converter.safetensors_file import read_header
from converter.scales import FORMS, Form, ScaleSet, offered_granularities
from converter.source import resolve, resolve_tokenizer
from tests.converted_folder import convert
from tests.small_checkpoints import (
    CONFIG,
    LAYERS,
    random_scales,
    source,
    tensors,
    write_state_spaces_source,
    write_transformers,
)
from tests.tiny_models import tiny_model


def bake_folder(folder: Path, out: Path, scales: ScaleSet | None = None, **options: Any) -> BakeReport:
    """Bake a folder into a new folder, with random factors unless told otherwise."""
    checkpoint = read_checkpoint(source(folder))
    scales = scales or random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()})
    out.mkdir()
    checkpoint = dataclasses.replace(checkpoint, target_len=options.pop("target_len", None))
    return bake(checkpoint, out, scales=scales, **options)


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("A_log_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a_log_dtype", ["float32", "keep"])
@pytest.mark.parametrize("form", FORMS)
def test_A_log_is_the_formula_rounded_once_and_the_rest_is_untouched(
    tmp_path: Path, shards: int, A_log_dtype: torch.dtype, a_log_dtype: Any, form: Form
) -> None:
    folder = write_transformers(tmp_path / "model", shards, content=tensors(A_log_dtype=A_log_dtype))
    checkpoint = read_checkpoint(source(folder))
    scales = random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()}, "head", form)
    report = bake_folder(folder, tmp_path / "out", scales, a_log_dtype=a_log_dtype)
    before, after = raw(folder), raw(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if not name.endswith("A_log"):
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
            continue
        log_s = torch.tensor(scales.log_s[name]).double()
        old = before[name].double()
        exact = old + log_s if form == "linear" else old * log_s.exp()
        assert tensor.dtype == (torch.float32 if a_log_dtype == "float32" else A_log_dtype)
        unit = torch.finfo(tensor.dtype).eps * 2 ** torch.floor(torch.log2(exact.abs()))
        assert bool(((tensor.double() - exact).abs() <= unit / 2 * (1 + 1e-9)).all())
    assert sorted(record.name for record in report.changed) == sorted(checkpoint.A_log)
    assert report.identical == len(before) - LAYERS


def test_shards_metadata_index_and_every_other_file_are_kept(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", 3, content=tensors(A_log_dtype=torch.bfloat16))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("kept")
    (folder / "model.gguf").write_text("unscaled")
    report = bake_folder(folder, tmp_path / "out", target_len=1024)
    out = tmp_path / "out"
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
        path.relative_to(folder) for path in folder.rglob("*") if path.name != "model.gguf"
    )
    assert report.left_out == ("model.gguf",)
    for name in (
        "config.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates/tools.jinja",
    ):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, folder))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in raw(out).values())
    assert index["metadata"]["note"] == "kept"


def test_factor_that_makes_A_infinite_is_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    words = ["convert", str(folder), "--method", "constant", "--factor", "1e300", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, LayoutError) and "A = -exp of it infinite" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_bytes_stay_where_they_were_when_no_format_changes(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    bake_folder(folder, tmp_path / "out")
    before, after = ((f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "out"))
    with open(folder / "model.safetensors", "rb") as file:
        header = read_header(file, "source")
    spans = [
        range(header.starts[info.name], header.starts[info.name] + info.nbytes)
        for info in header.tensors
        if info.name.endswith("A_log")
    ]
    differing = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    assert differing and all(any(i in span for span in spans) for i in differing)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


def test_scales_of_one_give_the_source_back(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    checkpoint = read_checkpoint(source(folder))
    ones = ScaleSet.ones({name: tensor.shape for name, tensor in checkpoint.A_log.items()}, "head", "linear")
    report = bake_folder(folder, tmp_path / "out", ones)
    assert report.changed == [] and report.identical == len(checkpoint.tensors)
    before, after = raw(folder), raw(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", 2)
    bake_folder(folder, tmp_path / "a", target_len=4096)
    bake_folder(folder, tmp_path / "b", target_len=4096)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


@pytest.mark.parametrize("part_bytes", [1, 700, 1 << 28])
@pytest.mark.parametrize("shards", [1, 2])
def test_digests_are_those_of_the_files_however_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, part_bytes: int
) -> None:
    monkeypatch.setattr("converter.concurrent_parts.PART_BYTES", part_bytes)
    report = bake_folder(write_transformers(tmp_path / "model", shards), tmp_path / "out")
    assert report.digests == {path.name: sha256_of(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert [record.name for record in report.changed] == [f"backbone.layers.{n}.mixer.A_log" for n in range(LAYERS)]


def test_wait_for_a_span_that_never_comes_ends_with_the_run(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"12")
    with pytest.raises(KeyboardInterrupt):
        RunningDigest().add(tmp_path / "file", 1, 2, stop)


def test_context_length_of_the_tokenizer_only_grows(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    bake_folder(folder, tmp_path / "longer", target_len=32768)
    bake_folder(folder, tmp_path / "shorter", target_len=512)
    lengths = [
        json.loads((tmp_path / name / "tokenizer_config.json").read_text())["model_max_length"]
        for name in ("longer", "shorter")
    ]
    assert lengths == [32768, 2048]


def test_fine_tune_takes_the_length_of_the_scales_too(tmp_path: Path) -> None:
    base = write_transformers(tmp_path / "base")
    convert(str(base), tmp_path / "converted")
    content = {name: t if name.endswith("A_log") else t * 2 for name, t in tensors().items()}
    tuned = write_transformers(tmp_path / "tuned", content=content)
    api.bake(tuned, tmp_path / "out", str(tmp_path / "converted"))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 8192
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and (manifest.calibration, manifest.target_len) == (None, 8192)


def test_effective_factors_are_those_of_the_dtype_the_model_is_loaded_in(tmp_path: Path) -> None:
    content = {name: t.fill_(5.0) if name.endswith("A_log") else t for name, t in tensors().items()}
    folder = write_transformers(tmp_path / "model", content=content)
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(source(folder)).A_log.items()}
    small = ScaleSet("linear", "layer", {name: np.full((1,), math.log(1.01), np.float32) for name in shapes})
    record = bake_folder(folder, tmp_path / "bf16", small).changed[0]
    assert record.requested["mean"] == pytest.approx(1.01, rel=1e-6)
    assert record.effective == {"min": 1.0, "mean": 1.0, "max": 1.0}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    record = bake_folder(folder, tmp_path / "fp32", small).changed[0]
    assert record.effective["mean"] == pytest.approx(1.01, rel=1e-6)


# Sources in .bin files


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_become_safetensors_with_strided_and_shared_tensors_whole(tmp_path: Path, shards: int) -> None:
    folder = write_transformers(tmp_path / "model")
    content = raw(folder)
    content["backbone.layers.0.mixer.in_proj.weight"] = (
        content["backbone.layers.0.mixer.in_proj.weight"].t().contiguous().t()
    )
    content["lm_head.weight"] = content["backbone.embeddings.weight"]
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(shards):
        part = dict(list(content.items())[shard::shards])
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    bake_folder(folder, tmp_path / "out")
    after = raw(tmp_path / "out")
    assert after.keys() == content.keys()
    for name in content:
        assert name.endswith("A_log") or torch.equal(after[name], content[name])
    names = {path.name for path in (tmp_path / "out").glob("model*")}
    if shards == 1:
        assert names == {"model.safetensors"}
    else:
        assert names == {
            *(
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            )
        }
        written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert written == {
            name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            for name, file in weight_map.items()
        }


def test_index_counts_neither_a_tied_head_nor_the_old_size_of_A_log(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    whole = torch.load(folder / "pytorch_model.bin", weights_only=True)
    whole = {name: tensor.bfloat16() for name, tensor in whole.items()}
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for number in (0, 1):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        part = dict(list(whole.items())[number::2])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in whole.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    bake_folder(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in raw(tmp_path / "out").values())


def test_state_spaces_source_becomes_a_stock_model(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(resolve("demo"))
    out = tmp_path / "out"
    out.mkdir()
    bake(dataclasses.replace(checkpoint, target_len=8192), out, scales=None)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    source_tensors = torch.load(checkpoint.snapshot.folder / "pytorch_model.bin", weights_only=True)
    loaded = model.state_dict()
    assert torch.equal(loaded["backbone.embeddings.weight"], source_tensors["backbone.embedding.weight"])
    assert torch.equal(loaded["lm_head.weight"], source_tensors["lm_head.weight"])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def test_tokenizer_is_added_where_none_lies_beside(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    extra = write_transformers(tmp_path / "other")
    checkpoint = with_tokenizer(read_checkpoint(source(folder)), resolve_tokenizer(str(extra)))
    (tmp_path / "out").mkdir()
    bake(checkpoint, tmp_path / "out", scales=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (extra / name).read_bytes()


# What does not fit


def test_every_offered_granularity_is_baked(tmp_path: Path) -> None:
    model = tiny_model("zamba")
    model.save_pretrained(tmp_path / "model")
    checkpoint = read_checkpoint(source(tmp_path / "model"))
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    for granularity in offered_granularities(next(iter(shapes.values()))):
        scales = random_scales(shapes, granularity)
        bake_folder(tmp_path / "model", tmp_path / granularity, scales)
        after = raw(tmp_path / granularity)
        for name, tensor in checkpoint.A_log.items():
            assert np.array_equal(after[name].numpy(), scales.bake(name, tensor.read()).astype(np.float32))


def test_scales_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(source(folder)).A_log.items()}
    good = random_scales(shapes)
    name = next(iter(shapes))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**good.log_s, "another.A_log": good.log_s[name]}, "belong to another model"),
        ({key: value for key, value in good.log_s.items() if key != name}, "belong to another model"),
        ({**good.log_s, name: np.zeros((2,), np.float32)}, "have the shape"),
        ({**good.log_s, name: np.array([np.nan], np.float32)}, "NaN or infinity"),
    ]
    for number, (log_s, said) in enumerate(wrong):
        with pytest.raises(UsageError, match=said):
            bake_folder(folder, tmp_path / str(number), ScaleSet("linear", "layer", log_s))
        assert not any((tmp_path / str(number)).iterdir())


def test_overflow_of_the_kept_format_is_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", content=tensors(A_log_dtype=torch.float16))
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(source(folder)).A_log.items()}
    huge = ScaleSet("power", "head", {name: np.float32([0.1, 0.1, 20.0, 0.1]) for name in shapes})
    with pytest.raises(LayoutError, match="leaves the range of float16"):
        bake_folder(folder, tmp_path / "out", huge, a_log_dtype="keep")


def test_quantised_checkpoint_is_baked_when_its_A_log_is_not_quantised(tmp_path: Path) -> None:
    content = tensors()
    packed = {
        "backbone.layers.0.mixer.in_proj.qweight": torch.randint(0, 1 << 31, (4, 8), dtype=torch.int32),
        "backbone.layers.0.mixer.in_proj.scales": torch.rand(4, 8).half(),
        "backbone.layers.1.mixer.in_proj.weight": torch.randn(16, 16).to(torch.float8_e4m3fn),
        "backbone.layers.2.mixer.in_proj.weight": torch.randint(0, 255, (64, 1), dtype=torch.uint8),
    }
    del content["backbone.layers.0.mixer.in_proj.weight"]
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = write_transformers(tmp_path / "model", 2, config, {**content, **packed})
    bake_folder(folder, tmp_path / "out")
    after = raw(tmp_path / "out")
    for name, tensor in packed.items():
        assert after[name].dtype == tensor.dtype and torch.equal(
            after[name].view(torch.uint8), tensor.view(torch.uint8)
        )
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path) -> None:
    # A .bin file may claim far more than it holds: a tensor of one number, repeated.
    folder = write_transformers(tmp_path / "model")
    content = {**raw(folder), "backbone.huge": torch.zeros(1).expand(1 << 50)}
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(OutputError, match=r"4503599\.6 GB are needed"):
        bake_folder(folder, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_safetensors_source_is_never_written_to(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", 2)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    bake_folder(folder, tmp_path / "out", target_len=1 << 20)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_formats_of_any_alignment_load_after_A_log_grew(tmp_path: Path) -> None:
    content = {
        **tensors(A_log_dtype=torch.bfloat16),
        "odd": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(2).double(),
    }
    folder = write_transformers(tmp_path / "model", content=content)
    bake_folder(folder, tmp_path / "out")
    after = raw(tmp_path / "out")
    assert torch.equal(after["odd"], content["odd"]) and torch.equal(after["wide"], content["wide"])
    save_file(after, tmp_path / "again.safetensors")
