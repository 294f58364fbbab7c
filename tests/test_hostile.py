"""Checkpoints made to harm: each is refused with the tool's own error, and nothing is written anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.fuzz import mutate
from converter.errors import CorruptCheckpointError, LayoutError, MmodError, SourceError
from converter.layouts import read_checkpoint
from converter.safetensors_file import parse_header, parse_index
from tests.conversions import convert
from tests.small_checkpoints import source, write_state_spaces_source, write_transformers


def refused(folder: Path, tmp_path: Path, error: type[MmodError], said: str) -> None:
    """Converting the folder raises ``error`` with words that match, and leaves the disk as it was."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_symlink()}
    with pytest.raises(error, match=said):
        convert(source(folder), tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert after == before


def safetensors(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header, which may be text or anything that JSON can hold."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + payload


def tensor(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    """A header's entry for the span from ``start`` to ``end``."""
    return entry([end - start] if shape is None else shape, [start, end], dtype)


def entry(shape: Any, data_offsets: Any, dtype: Any = "U8") -> dict[str, Any]:
    """A header's entry, of whatever types."""
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


ONE_BYTE = json.dumps(tensor(0, 1)).encode()
HEADERS: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "is empty"),
    ("short file", b"\x01\0", "and the file has 2"),
    ("header longer than the file", safetensors({}, length=1 << 40), "claims 1099511627776 bytes"),
    ("header of nearly 2^64", safetensors({}, length=(1 << 64) - 1), "claims 18446744073709551615 bytes"),
    ("no JSON", safetensors(b"{not json"), "is damaged"),
    ("not UTF-8", safetensors(b'{"\xff": 1}'), "is damaged"),
    ("no object", safetensors([1, 2]), "does not hold a JSON object"),
    ("deep nesting", safetensors(b'{"a":' + b"[" * 200_000), "is damaged"),
    ("an endless number", safetensors(b'{"a": ' + b"9" * 10_000 + b"}"), "is damaged"),
    ("duplicate key", safetensors(b'{"a":%b,"a":%b}' % (ONE_BYTE, ONE_BYTE), b"x"), "given twice"),
    ("duplicate key inside", safetensors(b'{"a":{"dtype":"U8",' + ONE_BYTE[1:] + b"}", b"x"), "given twice"),
    ("entry no object", safetensors({"a": 5}), "no valid data_offsets"),
    ("offsets past the end", safetensors({"a": tensor(0, 8)}, b"1234"), "the file at"),
    ("bytes of no tensor", safetensors({"a": tensor(0, 2)}, b"1234"), "the file at"),
    ("overlap", safetensors({"a": tensor(0, 3), "b": tensor(2, 4)}, b"1234"), "overlaps"),
    ("same span twice", safetensors({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234"), "overlaps"),
    ("gap", safetensors({"a": tensor(0, 1), "b": tensor(2, 4)}, b"1234"), "leaves a gap"),
    ("starts late", safetensors({"a": tensor(1, 4)}, b"1234"), "leaves a gap"),
    ("negative offset", safetensors({"a": tensor(-4, 0)}, b""), "no valid data_offsets"),
    ("reversed offsets", safetensors({"a": tensor(4, 0, [4])}, b"1234"), "ends before it starts"),
    ("offsets as text", safetensors({"a": entry([1], ["0", "1"])}, b"1"), "no valid data_offsets"),
    ("offsets as truth values", safetensors({"a": entry([1], [False, True])}, b"1"), "no valid data_offsets"),
    ("three offsets", safetensors({"a": entry([1], [0, 1, 1])}, b"1"), "no valid data_offsets"),
    ("huge offsets", safetensors({"a": tensor(0, 1 << 70, [1])}), "no valid data_offsets"),
    ("shape too large for its bytes", safetensors({"a": tensor(0, 4, [1 << 40])}, b"1234"), "needs 1099511627776"),
    ("product past 64 bits", safetensors({"a": tensor(0, 4, [1 << 62] * 30)}, b"1234"), "needs"),
    ("endless shape", safetensors({"a": tensor(0, 4, [2] * 1000)}, b"1234"), "no valid shape"),
    ("negative size", safetensors({"a": tensor(0, 4, [-2, -2])}, b"1234"), "no valid shape"),
    ("fractional size", safetensors({"a": tensor(0, 4, [4.0])}, b"1234"), "no valid shape"),
    ("shape no list", safetensors({"a": entry(4, [0, 4])}, b"1234"), "no valid shape"),
    ("unknown dtype", safetensors({"a": tensor(0, 4, dtype="F31")}, b"1234"), "unknown number format"),
    ("dtype no text", safetensors({"a": tensor(0, 4, dtype=["U8"])}, b"1234"), "unknown number format"),
    ("half a byte", safetensors({"a": tensor(0, 1, [1], "F4")}, b"1"), "ends inside a byte"),
    ("metadata no strings", safetensors({"__metadata__": {"a": 1}}), "not a map of strings"),
    ("metadata no map", safetensors({"__metadata__": ["a"]}), "not a map of strings"),
]


@pytest.mark.parametrize(("content", "said"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_header_that_lies_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, tmp_path, CorruptCheckpointError, said)


def test_header_past_the_formats_limit_is_refused_unread(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)
    refused(folder, tmp_path, CorruptCheckpointError, "the format allows 100000000")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        ".x.safetensors",
        "x\0.safetensors",
        "",
        5,
        None,
        ["a"],
    ],
)
def test_index_that_names_no_plain_file_is_refused(tmp_path: Path, name: Any) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["backbone.norm_f.weight"] = name
    path.write_text(json.dumps(index))
    refused(folder, tmp_path, CorruptCheckpointError, re.escape(f"names the shard {name!r}"))


INDEX_CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("missing shard", lambda i: i["weight_map"].update(a="model-3.safetensors"), "lacks 1 of 3 shards"),
    (
        "tensor in no shard",
        lambda i: i["weight_map"].update(a="model-00001-of-00002.safetensors"),
        "puts tensor a in",
    ),
    ("tensor in no index", lambda i: i["weight_map"].popitem(), "in no file; it is in model-0000"),
    ("no map", lambda i: i.update(weight_map=[]), "is no index of shards"),
    ("empty map", lambda i: i.update(weight_map={}), "is no index of shards"),
    ("metadata no map", lambda i: i.update(metadata=3), "is no index of shards"),
]


@pytest.mark.parametrize(
    ("change", "said"), [case[1:] for case in INDEX_CHANGES], ids=[c[0] for c in INDEX_CHANGES]
)
def test_index_that_lies_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    refused(folder, tmp_path, CorruptCheckpointError, said)


def test_index_with_a_key_twice_and_a_tensor_in_two_shards_are_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", shards=2)
    path = folder / "model.safetensors.index.json"
    text = path.read_text()
    path.write_text(
        text.replace('"weight_map": {', '"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors", ')
    )
    refused(folder, tmp_path, CorruptCheckpointError, "given twice")
    path.write_text(text)
    (folder / "model-00002-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    refused(folder, tmp_path, CorruptCheckpointError, "lies in model-00001-of-00002.safetensors and in model-00002")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "extra.txt"])
@pytest.mark.parametrize("target", ["/etc/hostname", "../outside"])
def test_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, target: str) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "outside").write_text("secret")
    (folder / name).symlink_to(target)
    refused(folder, tmp_path, SourceError, f"{re.escape(name)} is a link that leaves the folder")


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    refused(folder, tmp_path, CorruptCheckpointError, r"config\.json is damaged")


def test_config_that_points_stock_code_to_other_weights_is_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    refused(folder, tmp_path, LayoutError, "weights of another name")


def test_config_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model")
    (folder / "config.json").unlink()
    refused(folder, tmp_path, LayoutError, r"has no config\.json")


# Pickles


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("form", ["torch", "torch-old", "pickle"])
def test_pickle_with_code_is_refused_and_never_runs(tmp_path: Path, form: str) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    weights, payload = folder / "pytorch_model.bin", {"a": torch.ones(1), "b": Payload(tmp_path / "trace")}
    if form == "pickle":
        weights.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, weights, _use_new_zipfile_serialization=form == "torch")
    refused(folder, tmp_path, CorruptCheckpointError, r"never run|not a whole file in the format of PyTorch")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "plain table of tensors"),
        ({"a": 5}, "plain table of tensors"),
        ({5: torch.ones(1)}, "plain table of tensors"),
        ({"a": torch.ones(2).to_sparse()}, "not supported"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "not supported"),
    ],
)
def test_bin_file_of_other_things_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, tmp_path, CorruptCheckpointError, said)


@pytest.mark.parametrize("cut", [0, 1, 100, 5_000, -1, -300])
def test_bin_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    folder = write_state_spaces_source(tmp_path / "model")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder, tmp_path, CorruptCheckpointError, r"pytorch_model\.bin is")


def test_names_that_meet_in_the_converted_copy_are_refused(tmp_path: Path) -> None:
    folder = write_state_spaces_source(tmp_path / "tensors")
    content = torch.load(folder / "pytorch_model.bin", weights_only=True)
    content["backbone.embeddings.weight"] = content["backbone.embedding.weight"]
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, tmp_path, CorruptCheckpointError, r"both be called backbone\.embeddings\.weight")

    folder = write_transformers(tmp_path / "files")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {"pytorch_model-1.bin": list(tensors)[:5], "model-1.bin": list(tensors)[5:]}
    for file, part in names.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in names.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, tmp_path, CorruptCheckpointError, r"both be called model-1\.safetensors")


# Mutations of honest files


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1 << 20))
@example(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 100)
def test_header_parser_knows_no_other_error(data: bytes, size: int) -> None:
    with contextlib.suppress(CorruptCheckpointError):
        parse_header(data, size, "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "metadata", "a"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_parsers_of_json_know_no_other_error(value: Any) -> None:
    for parse in (
        lambda data: parse_header(data, 8 + len(data), "file"),
        lambda data: parse_index(data, "index.json"),
    ):
        with contextlib.suppress(CorruptCheckpointError):
            parse(json.dumps(value).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]),
    st.integers(),
)
def test_mutated_checkpoint_is_converted_and_proved_or_refused(tmp_path: Path, name: str, seed: int) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        write_transformers(folder, shards=2)
        (tmp_path / "honest").write_bytes(b"")
    honest = (folder / name).read_bytes()
    (folder / name).write_bytes(mutate(honest, random.Random(seed)))
    try:
        read_checkpoint(source(folder))
        convert(source(folder), tmp_path / "out", overwrite=True)
    except MmodError:
        pass
    finally:
        (folder / name).write_bytes(honest)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "honest", "out"}
