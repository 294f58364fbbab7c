"""The safetensors header against the library's reader and writer, number formats against exact arithmetic."""

from __future__ import annotations

import io
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from converter.errors import CorruptCheckpointError
from converter.safetensors_file import (
    DTYPE_BITS,
    TensorInfo,
    from_float64,
    header_bytes,
    in_aligned_order,
    parse_index,
    read_header,
    rounded,
    to_float64,
)
from converter.shards import SafetensorsShard, copy_bytes, opening

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
INFOS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES), max_size=6)


@given(INFOS, st.dictionaries(NAMES, st.text(max_size=10), max_size=2))
def test_header_of_the_library_is_read_as_it_was_meant(
    infos: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    content = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in infos.items()}
    data = save(content, metadata or None)
    header = read_header(io.BytesIO(data), "file")
    assert {info.name: (info.dtype, info.shape) for info in header.tensors} == infos
    assert header.metadata == metadata
    assert sum(info.nbytes for info in header.tensors) + 8 + int.from_bytes(data[:8], "little") == len(data)


@given(INFOS)
def test_library_reads_our_header_and_every_tensor_is_aligned(
    infos: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    order = in_aligned_order([TensorInfo(name, dtype, shape) for name, (dtype, shape) in infos.items()])
    head = header_bytes(order, {"format": "pt"})
    payload = bytes(range(256)) * 8
    data = head + payload[: sum(info.nbytes for info in order)]
    header = read_header(io.BytesIO(data), "file")
    assert header.tensors == tuple(order)
    assert all(header.starts[info.name] % (DTYPE_BITS[info.dtype] // 8) == 0 for info in order)
    loaded = dict(torch_load(data))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {i.name: i.shape for i in order}


def torch_load(data: bytes) -> dict[str, torch.Tensor]:
    """What the library reads from these bytes."""
    from safetensors.torch import load

    return load(data)


def _exactly_rounded(value: float, dtype: str) -> float:
    """Round to nearest, ties to even, found by comparing exact fractions among the format's neighbours."""
    step = {"BF16": np.uint32(1 << 16), "F32": np.uint32(1)}[dtype]
    near = np.array([value], "<f4").view("<u4") // step * step
    candidates = [int(near[0]) + k * int(step) for k in (-1, 0, 1) if int(near[0]) + k * int(step) >= 0]
    floats = [float(np.array([bits], "<u4").view("<f4")[0]) for bits in candidates]
    pairs = [(f, bits // int(step)) for f, bits in zip(floats, candidates, strict=True) if np.isfinite(f)]
    return min(pairs, key=lambda pair: (abs(Fraction(pair[0]) - Fraction(value)), pair[1] % 2))[0]


@given(st.floats(1e-38, 1e38) | st.floats(-10, 10).filter(lambda x: abs(x) > 1e-30))
def test_rounding_to_bf16_and_f32_is_to_nearest_even(value: float) -> None:
    for dtype in ("BF16", "F32"):
        assert rounded(np.array([value]), dtype)[0] == _exactly_rounded(abs(value), dtype) * np.sign(value)


def test_rounding_to_bf16_happens_once() -> None:
    # In two steps, through float32, the last term is lost and the tie goes to 1.
    above_tie = 1 + 2.0**-8 + 2.0**-40
    assert rounded(np.array([above_tie]), "BF16")[0] == 1 + 2.0**-7
    assert rounded(np.array([1 + 2.0**-8]), "BF16")[0] == 1.0
    assert rounded(np.array([1 + 3 * 2.0**-8]), "BF16")[0] == 1 + 2.0**-6
    assert rounded(np.array([-0.0, 1e-50, 1e39, -1e39]), "BF16").tolist() == [-0.0, 0.0, np.inf, -np.inf]


@given(st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80))
def test_bf16_survives_the_way_through_float64(bits: int) -> None:
    data = bits.to_bytes(2, "little")
    values = to_float64(data, "BF16")
    assert from_float64(values, "BF16") == data
    assert values[0] == torch.tensor([bits], dtype=torch.uint16).view(torch.bfloat16).double()[0]


@given(st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7C00 != 0x7C00))
def test_f16_survives_the_way_through_float64(bits: int) -> None:
    data = bits.to_bytes(2, "little")
    assert from_float64(to_float64(data, "F16"), "F16") == data


def test_a_copied_tensor_has_exactly_its_bytes(tmp_path: Path) -> None:
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy"
    sizes = (("a", 3), ("b", 700_001), ("c", 1 << 18))
    bytes_of = {name: torch.frombuffer(bytearray(os.urandom(size)), dtype=torch.uint8) for name, size in sizes}
    path.write_bytes(save(bytes_of))
    shard = SafetensorsShard.open(path.name, opening(path))
    for info in shard.tensors:
        with open(copy, "wb", buffering=0) as write:
            copy_bytes(shard, info, write.fileno())
        assert copy.read_bytes() == bytes_of[info.name].numpy().tobytes()
    os.truncate(path, path.stat().st_size - 1)
    with open(copy, "wb", buffering=0) as write, pytest.raises(CorruptCheckpointError, match="ended while"):
        copy_bytes(shard, shard.tensors[-1], write.fileno())


def test_written_file_is_what_the_library_loads(tmp_path: Path) -> None:
    infos = [TensorInfo("a", "F32", (2,)), TensorInfo("b", "BF16", (3,))]
    data = from_float64(np.array([1.5, -2.0]), "F32") + from_float64(np.array([0.5, 3.0, -4.0]), "BF16")
    (tmp_path / "x.safetensors").write_bytes(header_bytes(infos, {"format": "pt"}) + data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["a"].tolist() == [1.5, -2.0] and loaded["b"].tolist() == [0.5, 3.0, -4.0]
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_pointer_of_git_lfs_in_place_of_a_file_is_named() -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 123456\n".encode()
    with pytest.raises(CorruptCheckpointError, match="is a git-lfs pointer"):
        read_header(io.BytesIO(pointer), "scales.safetensors")


def test_index_gives_the_shards_in_order() -> None:
    weight_map = {"b": "m-2.safetensors", "a": "m-1.safetensors", "c": "m-2.safetensors"}
    index = parse_index(
        json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}).encode(), "index.json"
    )
    assert index.files == ("m-1.safetensors", "m-2.safetensors")
    assert list(index.shards) == ["b", "a", "c"] and index.metadata == {"total_size": 3}
