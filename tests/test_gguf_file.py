"""GGUF headers against the gguf package's reader and writer, and files made to harm."""

from __future__ import annotations

import contextlib
import io
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from benchmarks.fuzz import mutate_bytes
from converter.errors import CorruptCheckpointError
from converter.gguf_file import GgufShard, check_parts, parts_of, read_gguf_header
from converter.shards import copy_bytes, opening

FORMATS = [kind for kind in GGML_QUANT_SIZES if kind.name not in ("Q8_1", "Q8_K")]


def write(path: Path, alignment: int = 32) -> Path:
    """A file of the package's writer with a tensor of every number format and values of every kind."""
    writer = gguf.GGUFWriter(path, "mamba2")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_context_length(256)
    writer.add_token_list(["a", "b", "ß"])
    writer.add_array("numbers", [1, 2, 3])
    for name in ("uint8", "int8", "uint16", "int16", "int32", "uint64", "int64", "float32", "float64", "bool"):
        getattr(writer, f"add_{name}")(f"as.{name}", 1)
    generator = np.random.default_rng(0)
    for kind in FORMATS:
        elements, size = GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (3, size * (3 if elements == 1 else 1)), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{kind.name}", data, raw_dtype=kind)
    writer.add_tensor("blk.0.ssm_a", -np.arange(1, 8, dtype=np.float32).reshape(7, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=[32, 64])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", request.param)


def shard_of(path: Path) -> GgufShard:
    return GgufShard.open(path.name, opening(path))


def test_every_format_and_value_is_read_as_the_package_reads_it(file: Path) -> None:
    header, reader = shard_of(file).header, gguf.GGUFReader(file)
    assert len(header.tensors) == len(FORMATS) + 1
    for info, expected in zip(header.tensors, reader.tensors, strict=True):
        kind = GGMLQuantizationType(expected.tensor_type).name
        shape = tuple(reversed(expected.shape.tolist()))
        found = (info.name, info.dtype, info.shape, info.nbytes, header.starts[info.name])
        assert found == (expected.name, kind, shape, expected.n_bytes, expected.data_offset)
    for name, value in header.values.items():
        assert value == reader.fields[name].contents(), name
    assert header.values["mamba2.context_length"] == 256 and header.values["as.bool"] is True
    start, kind = header.places["mamba2.context_length"]
    assert struct.unpack_from(kind, file.read_bytes(), start) == (256,)


def test_frame_and_tensors_are_all_bytes_of_the_file(file: Path, tmp_path: Path) -> None:
    shard, target = shard_of(file), tmp_path / "copy.gguf"
    with open(target, "wb", buffering=0) as output:
        shard.begin(output.fileno(), {"mamba2.context_length": 1 << 20})
        for info in shard.tensors:
            output.seek(shard.header.starts[info.name])
            copy_bytes(shard, info, output.fileno())
    expected = bytearray(file.read_bytes())
    struct.pack_into("<I", expected, shard.header.places["mamba2.context_length"][0], 1 << 20)
    assert target.read_bytes() == bytes(expected)
    assert gguf.GGUFReader(target).fields["mamba2.context_length"].contents() == 1 << 20


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def head(*entries: bytes, tensors: tuple[bytes, ...] = (), **counts: int) -> bytes:
    known = {"version": 3, "table": len(tensors), "values": len(entries)} | counts
    fixed = struct.pack("<4sIQQ", b"GGUF", known["version"], known["table"], known["values"])
    return fixed + b"".join(entries) + b"".join(tensors)


def number(name: str, value: int, kind: int = 4) -> bytes:
    return text(name) + struct.pack("<II", kind, value)


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def padded(data: bytes, payload: int) -> bytes:
    return data + bytes(-len(data) % 32 + payload)


HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "ends inside"),
    ("another format", b"PK\x03\x04" + bytes(60), "word GGUF"),
    ("version 1", head(version=1), "of version 1"),
    ("version 0", head(version=0), "of version 0"),
    ("big-endian", head(version=0x03000000), "big-endian"),
    ("2^64 values", head(values=(1 << 64) - 1), "claims 18446744073709551615 entries"),
    ("2^40 tensors", head(table=1 << 40) + bytes(99), "no room"),
    ("endless name", head(struct.pack("<Q", 1 << 62), values=1) + bytes(99), "no room"),
    ("name not UTF-8", head(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(4)) + bytes(99), "not UTF-8"),
    ("value twice", head(number("a", 1), number("a", 2)), "'a' is there twice"),
    ("unknown kind", head(number("a", 1, kind=13)), "unknown kind 13"),
    ("array of arrays", head(text("a") + struct.pack("<IIQ", 9, 9, 1)) + bytes(99), "array of the unknown kind 9"),
    ("endless array", head(text("a") + struct.pack("<IIQ", 9, 0, 1 << 61)) + bytes(99), "no room"),
    ("endless array of texts", head(text("a") + struct.pack("<IIQ", 9, 8, 1 << 61)) + bytes(99), "no room"),
    ("alignment 0", head(number("general.alignment", 0)), "alignment is 0"),
    ("alignment 48", head(number("general.alignment", 48)), "alignment is 48"),
    ("alignment 2^31", head(number("general.alignment", 1 << 31)), "alignment is 2147483648"),
    ("alignment of a float", head(number("general.alignment", 32, kind=6)), "alignment is"),
    ("tensor twice", padded(head(tensors=(tensor(), tensor(offset=32))), 64), "is there twice"),
    ("tensors overlap", padded(head(tensors=(tensor("a"), tensor("b"))), 64), "starts at 0, expected 32"),
    ("gap", padded(head(tensors=(tensor("a"), tensor("b", offset=64))), 96), "starts at 64, expected 32"),
    ("no name", padded(head(tensors=(tensor(""),)), 32), "no valid name"),
    ("a long name", padded(head(tensors=(tensor("n" * 64),)), 32), "no valid name"),
    ("five axes", padded(head(tensors=(tensor(shape=(1,) * 5),)), 32), "has 5 axes"),
    ("unknown format", padded(head(tensors=(tensor(kind=99),)), 32), "unknown number format 99"),
    ("half a block", padded(head(tensors=(tensor(kind=8),)), 34), "cannot be Q8_0"),
    ("2^64 elements", padded(head(tensors=(tensor(shape=(1 << 32, 1 << 32)),)), 32), "cannot be F32"),
    ("cut", padded(head(tensors=(tensor(shape=(9,)),)), 32), "tensors end at byte"),
    ("bytes of nobody", padded(head(tensors=(tensor(),)), 64), "the file at"),
]


@pytest.mark.parametrize(("data", "said"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_header_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=said):
        read_gguf_header(io.BytesIO(data), "file")


def test_the_like_without_harm_is_read() -> None:
    """The pieces that the hostile headers are made of, put together rightly."""
    data = padded(head(number("general.alignment", 32), tensors=(tensor("a"), tensor("b", offset=32))), 64)
    assert [info.name for info in read_gguf_header(io.BytesIO(data), "file").tensors] == ["a", "b"]


def test_a_thousand_mutated_headers_are_read_or_refused(file: Path) -> None:
    generator, whole = random.Random(0), file.read_bytes()
    refused = 0
    for _ in range(1000):
        data = whole
        for _ in range(generator.randint(1, 4)):
            data = mutate_bytes(data, generator)
        with contextlib.suppress(CorruptCheckpointError):
            header = read_gguf_header(io.BytesIO(data), "file")
            refused -= 1
            assert all(start + info.nbytes <= len(data) for info, start in spans(header))
        refused += 1
    assert 300 < refused < 1000


def spans(header: Any) -> list[tuple[Any, int]]:
    return [(info, header.starts[info.name]) for info in header.tensors]


def test_parts_of_a_split_model(file: Path) -> None:
    assert parts_of("model.gguf") == ["model.gguf"]
    assert parts_of("m-00002-of-00003.gguf") == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    shard = shard_of(file)
    check_parts([shard])
    with pytest.raises(CorruptCheckpointError, match="not the parts of one model"):
        check_parts([shard, shard])
