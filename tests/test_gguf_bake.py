"""Known scales written into GGUF files: which bytes change, to what, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from converter.gguf_file import GgufShard
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.scales import Form, Granularity, ScaleSet
from converter.scales_file import save_scales
from converter.shards import opening
from tests.small_checkpoints import CONFIG, HEADS, LAYERS, random_scales, source, tensors, write_transformers
from tests.test_inspect import mmod, succeed

Values = np.ndarray[Any, Any]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
# How llama.cpp's converter of Qwen3.5 orders four value heads of two key heads.
TILED = [0, 2, 1, 3]


def A_log(layer: int) -> Values:
    return tensors()[f"backbone.layers.{layer}.mixer.A_log"].double().numpy()


def write_gguf(
    path: Path,
    order: list[int] | None = None,
    architecture: str = "mamba2",
    of_layer: Callable[[int], Values] = A_log,
    split: int = 0,
) -> Path:
    """The model of ``tests.small_checkpoints`` as llama.cpp's converter would write it, its matrices in Q8_0."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(256)
    writer.add_ssm_group_count(2)
    writer.add_token_list([f"<{number}>" for number in range(32)])
    generator = np.random.default_rng(0)
    for layer in range(LAYERS):
        a = -np.exp(of_layer(layer))[order or list(range(HEADS))]
        writer.add_tensor(f"blk.{layer}.ssm_a", a.astype(np.float32).reshape(HEADS, 1))
        writer.add_tensor(
            f"blk.{layer}.ssm_in.weight", generator.integers(0, 99, (7, 34), np.uint8), raw_dtype=Q8_0
        )
        writer.add_tensor(f"blk.{layer}.ssm_norm.weight", generator.random(33, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scales_of_base(folder: Path, granularity: Granularity = "head", form: Form = "linear") -> ScaleSet:
    checkpoint = read_checkpoint(source(write_transformers(folder / "base")))
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    scales = random_scales(shapes, granularity, form)
    (folder / "scales").mkdir()
    save_scales(folder / "scales", scales, checkpoint.A_log)
    return scales


def read(path: Path) -> dict[str, Values]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def changed_bytes(one: Path, other: Path) -> set[int]:
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other))
    return set(np.flatnonzero(before != after).tolist())


def places(path: Path, *names: str) -> set[int]:
    """Positions of the bytes of tensors, and of the stated length where ``names`` has it."""
    shard = GgufShard.open(path.name, opening(path))
    found: set[int] = set()
    for info in shard.tensors:
        if info.name.endswith(names):
            found |= set(range(shard.header.starts[info.name], shard.header.starts[info.name] + info.nbytes))
    for name, (start, _) in shard.header.places.items():
        found |= set(range(start, start + 4)) if name.endswith(names) else set()
    return found


def refused(file: Path, folder: Path, *words: str) -> str:
    """Baking the file fails, and nothing is written; returns what was said."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = mmod("bake", file, folder / "out", "--scales", folder / "scales", *words)
    assert done.returncode in (1, 2), done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return done.stderr


@pytest.mark.parametrize("form", ["linear", "power"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_ssm_a_changes_and_no_other_byte(tmp_path: Path, form: Form, granularity: Granularity) -> None:
    scales = scales_of_base(tmp_path, granularity, form)
    file = write_gguf(tmp_path / "model.gguf")
    told = succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")
    assert (told["changed_tensors"], told["identical_tensors"], told["proved"]) == (3, 6, True)
    baked = tmp_path / "out" / "model.gguf"
    changed = changed_bytes(file, baked)
    assert changed and changed <= places(file, ".ssm_a")
    before, after = read(file), read(baked)
    for layer in range(LAYERS):
        a, s = before[f"blk.{layer}.ssm_a"].astype(float), scales.factors(f"backbone.layers.{layer}.mixer.A_log")
        expected = a * s.reshape(-1, 1) if form == "linear" else -(np.abs(a) ** s.reshape(-1, 1))
        np.testing.assert_allclose(after[f"blk.{layer}.ssm_a"], expected, rtol=1e-7)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and manifest.notes[0].endswith("A_log is that of the scales' base.")
    for record in manifest.changed:
        assert record.effective == pytest.approx(record.requested, rel=1e-5)
    told = succeed("verify", tmp_path / "out", "--base", file)
    assert (told["changed_tensors"], told["identical_tensors"]) == (3, 6)
    assert succeed("card", tmp_path / "out") is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# model-scaled-gguf" in card and "written into `ssm_a`" in card and "A_log + log s" not in card
    assert "llama-server -m path/to/this/folder/model.gguf" in card
    assert "mmod bake FILE_OF_THE_SOURCE OUTPUT --scales path/to/this/folder\n" in card
    # The scale set that lies beside it is the base's, and may be taken for another copy.
    again = ScaleSet.load(str(tmp_path / "out"))
    assert all(np.array_equal(again.log_s[name], scales.log_s[name]) for name in scales.log_s)


def test_same_factors_in_a_gguf_file_as_in_its_base(tmp_path: Path) -> None:
    """The file that is scaled in place equals the conversion of the base that was scaled first."""
    scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf")
    succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")
    succeed("bake", tmp_path / "base", tmp_path / "folder", "--scales", tmp_path / "scales")
    baked = read_checkpoint(source(tmp_path / "folder")).A_log
    converted = write_gguf(
        tmp_path / "converted.gguf", of_layer=lambda layer: baked[f"backbone.layers.{layer}.mixer.A_log"].read()
    )
    found, expected = read(tmp_path / "out" / "model.gguf"), read(converted)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=5e-7 if name.endswith("ssm_a") else 0, err_msg=name)


@pytest.mark.parametrize("architecture", ["qwen35", "mamba2"])
def test_value_heads_in_another_order_are_known_by_their_values(tmp_path: Path, architecture: str) -> None:
    scales = scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf", TILED, architecture)
    succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")
    before, after = read(file), read(tmp_path / "out" / "model.gguf")
    for layer in range(LAYERS):
        factors = scales.factors(f"backbone.layers.{layer}.mixer.A_log")[TILED]
        name = f"blk.{layer}.ssm_a"
        np.testing.assert_allclose(after[name], before[name] * factors.reshape(-1, 1), rtol=1e-6)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and "value heads in llama.cpp's order" in manifest.notes[0]
    assert succeed("verify", tmp_path / "out", "--base", file)["changed_tensors"] == 3


def test_heads_in_an_unknown_order_are_refused(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf", [1, 0, 2, 3], "qwen35")
    assert "blk.0.ssm_a is not the A_log that the scales were found for" in refused(file, tmp_path)


def test_heads_whose_order_cannot_be_told_are_refused(tmp_path: Path) -> None:
    content = {name: torch.zeros_like(t) if name.endswith("A_log") else t for name, t in tensors().items()}
    checkpoint = read_checkpoint(source(write_transformers(tmp_path / "base", content=content)))
    shapes = {name: tensor.shape for name, tensor in checkpoint.A_log.items()}
    file = write_gguf(tmp_path / "model.gguf", of_layer=lambda layer: np.zeros(HEADS))
    (tmp_path / "scales").mkdir()
    save_scales(tmp_path / "scales", random_scales(shapes, "head"), checkpoint.A_log)
    assert "their order cannot be told" in refused(file, tmp_path)
    save_scales(tmp_path / "scales", random_scales(shapes, "layer"), checkpoint.A_log)
    assert succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")["changed_tensors"] == 3


def test_another_models_file_is_refused_unless_told(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf", of_layer=lambda layer: A_log(layer) + 0.004 * (layer == 1))
    said = refused(file, tmp_path)
    assert "blk.1.ssm_a is not the A_log that the scales were found for: they differ by up to 0.004" in said
    told = succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales", "--anyway")
    assert told["changed_tensors"] == 3
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and "that of the scales' base to within 0.004" in manifest.notes[0]


def test_A_log_rounded_on_the_way_is_accepted_and_said(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    file = write_gguf(
        tmp_path / "model.gguf", of_layer=lambda layer: torch.from_numpy(A_log(layer)).bfloat16().double().numpy()
    )
    succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and "rounded to bfloat16" in manifest.notes[0]


def test_scales_that_do_not_know_their_base_are_refused(tmp_path: Path) -> None:
    scales = scales_of_base(tmp_path)
    save_scales(tmp_path / "scales", scales, {})
    assert "factors and A_log of different tensors" in refused(write_gguf(tmp_path / "model.gguf"), tmp_path)


def test_split_files(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    write_gguf(tmp_path / "model.gguf", split=4)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    succeed("bake", parts[1], tmp_path / "out", "--scales", tmp_path / "scales")
    for part in parts:
        assert changed_bytes(part, tmp_path / "out" / part.name) <= places(part, ".ssm_a")
    assert succeed("verify", tmp_path / "out", "--base", parts[0])["identical_tensors"] == 6
    parts[2].unlink()
    assert f"{parts[2].name} is not beside it" in mmod("inspect", parts[0]).stderr


@pytest.mark.parametrize(("architecture", "length"), [("mamba2", 1 << 20), ("qwen35", 256)])
def test_stated_length(tmp_path: Path, architecture: str, length: int) -> None:
    base = write_transformers(tmp_path / "base")
    succeed(
        "convert", base, "-o", tmp_path / "scales", "--method", "constant", "--factor", "2", "--target-len", "1M"
    )
    file = write_gguf(tmp_path / "model.gguf", architecture=architecture)

    def stated(folder: str, *words: str) -> int:
        succeed("bake", file, tmp_path / folder, "--scales", tmp_path / "scales", *words)
        succeed("verify", tmp_path / folder, "--base", file)
        baked = tmp_path / folder / "model.gguf"
        assert changed_bytes(file, baked) <= places(file, ".ssm_a", "context_length")
        found = gguf.GGUFReader(baked).fields[f"{architecture}.context_length"].contents()
        assert isinstance(found, int)
        return found

    assert stated("out") == length
    assert stated("raised", "--raise-position-limit") == 1 << 20


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".ssm_in.weight", "ssm_in.weight differs from the base's"),
        (".ssm_a", "ssm_a is not ssm_a * s"),
        ("padding", "outside of its tensors"),
        ("group_count", "The header differs from the base's in mamba2.ssm.group_count"),
        ("context_length", "The header differs from the base's in mamba2.context_length"),
    ],
)
def test_verify_finds_one_other_byte(tmp_path: Path, place: str, said: str) -> None:
    scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf")
    succeed("bake", file, tmp_path / "out", "--scales", tmp_path / "scales")
    baked = tmp_path / "out" / "model.gguf"
    tensors_end = max(places(file, ".ssm_norm.weight")) + 1
    position = tensors_end if place == "padding" else max(places(file, place))
    with open(baked, "r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        os.pwrite(opened.fileno(), bytes([byte ^ 1]), position)
    done = mmod("verify", tmp_path / "out", "--base", file)
    assert done.returncode == 1 and said in done.stderr, done.stderr


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    file = write_gguf(tmp_path / "model.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.gguf is damaged" in refused(file, tmp_path)
    file.write_bytes(b"GGML" + whole[4:])
    assert "does not begin with the word GGUF" in refused(file, tmp_path)
    file = write_gguf(tmp_path / "model.gguf", of_layer=lambda layer: np.full(HEADS, np.inf))
    assert "NaN or infinity" in refused(file, tmp_path)


def test_ssm_a_of_another_kind_is_refused(tmp_path: Path) -> None:
    scales_of_base(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "half.gguf", "mamba2")
    writer.add_tensor("blk.0.ssm_a", np.ones((4, 1), np.float16))
    positive = gguf.GGUFWriter(tmp_path / "positive.gguf", "mamba2")
    for layer in range(LAYERS):
        positive.add_tensor(f"blk.{layer}.ssm_a", np.ones((4, 1), np.float32))
    for one in (writer, positive):
        one.write_header_to_file()
        one.write_kv_data_to_file()
        one.write_tensors_to_file()
        one.close()
    assert "blk.0.ssm_a is F16" in refused(tmp_path / "half.gguf", tmp_path)
    assert "are not negative" in refused(tmp_path / "positive.gguf", tmp_path)


def test_inspect_reads_the_header_and_names_rounded_ssm_tensors(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    told = succeed("inspect", file)
    assert (told["layout"], told["model_type"], told["tensors"]) == ("gguf", "mamba2", 9)
    assert told["rounded_ssm"] == {"ssm_in.weight": {"Q8_0": 3}}
    assert told["stated_lengths"] == {"mamba2.context_length": 256}
    assert [record["name"] for record in told["A_log"]] == [f"blk.{layer}.ssm_a" for layer in range(LAYERS)]
    said = mmod("inspect", file).stdout
    assert "not in F32: ssm_in.weight (3 in Q8_0)" in said


def test_folder_with_several_models_asks_for_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    assert succeed("inspect", tmp_path)["layout"] == "gguf"
    write_gguf(tmp_path / "b.gguf")
    assert "holds 2 GGUF models: a.gguf, b.gguf" in mmod("inspect", tmp_path).stderr


@pytest.mark.parametrize("command", [("convert",), ("evaluate",)])
def test_gguf_is_neither_calibrated_nor_measured(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = mmod(*command, write_gguf(tmp_path / "model.gguf"))
    assert done.returncode == 1 and "mmod bake" in done.stderr, done.stderr


def test_fine_tune_is_taken_where_A_log_agrees(tmp_path: Path) -> None:
    scales_of_base(tmp_path)

    def tuned(by: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(9)
        return {
            name: t + (by if name.endswith("A_log") else torch.randn(t.shape, generator=generator).to(t.dtype))
            for name, t in tensors().items()
        }

    near = write_transformers(tmp_path / "near", content=tuned(0.005), config={**CONFIG, "torch_dtype": "float32"})
    succeed("bake", near, tmp_path / "of-near", "--scales", tmp_path / "scales")
    manifest = Manifest.read(tmp_path / "of-near")
    assert manifest is not None and "base to within 0.005" in manifest.notes[0]
    far = write_transformers(tmp_path / "far", content=tuned(0.05))
    assert "they differ by up to 0.05" in refused(far, tmp_path)
    told = succeed("bake", far, tmp_path / "out", "--scales", tmp_path / "scales", "--anyway")
    assert told["changed_tensors"] == 3
