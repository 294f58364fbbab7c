"""The safetensors format: its header, its number formats, and writing a file's bytes.

A file is 8 bytes with the header's length, a JSON header, and the tensors' bytes without a gap between them
(format of safetensors 0.8). Every header is untrusted: nothing is read or written through one before it has
been checked whole.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from converter.errors import CorruptCheckpointError

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""What torch and config.json call the number formats that a ``.bin`` file may hold."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The number formats that an A_log may have."""

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32
_OTHER_CONTENTS = (
    (rb"\s*(<!|<html|\{|\[)", "a page or message of a server in place of the file", "Download it again."),
    (rb".{8}\{\s*\"", "a safetensors file by its content", "Rename it: model.safetensors."),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a file of PyTorch by its content", "Rename it: pytorch_model.bin."),
    (rb"GGUF", "a GGUF file by its content", "Rename it to end in .gguf."),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "packed", "Unpack it."),
)
LFS_ADVICE = "Fetch the file itself: run `git lfs pull` in the folder that was cloned."


@dataclass(frozen=True)
class TensorInfo:
    """Name, number format (safetensors name, ``BF16``) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        metadata: the ``__metadata__`` entry; empty if there is none.
        tensors: in the order of their bytes in the file.
        starts: name to the position of the tensor's first byte in the file.
        size: bytes before the first tensor.
    """

    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    starts: Mapping[str, int]
    size: int


def read_header(file: BinaryIO, where: str) -> Header:
    """Read and check the header of an open safetensors file.

    Args:
        where: the file's name, for messages.

    Raises:
        CorruptCheckpointError: the header breaks the format, or does not describe every byte of the file once.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        file.seek(0)
        refuse_by_content(file.read(512), where)
        raise _corrupt(where, f"its header claims {length} bytes, and the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(where, f"its header claims {length} bytes; the format allows {MAX_HEADER_BYTES}")
    return parse_header(file.read(length), size, where)


def parse_header(data: bytes, file_size: int, where: str) -> Header:
    """Check the JSON header ``data`` of a file of ``file_size`` bytes. Raises as :func:`read_header`."""
    entries = parse_json_object(data, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(where, "its __metadata__ is not a map of strings")
    payload_start = 8 + len(data)
    spans = [
        (*_checked_span(entry, name, where), _checked_info(entry, name, where)) for name, entry in entries.items()
    ]
    spans.sort(key=lambda span: span[:2])
    position = 0
    for start, end, info in spans:
        if start != position:
            kind = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise _corrupt(where, f"tensor {info.name!r} {kind} (starts at {start}, expected {position})")
        if info.nbytes != end - start:
            raise _corrupt(
                where,
                f"tensor {info.name!r} has {end - start} bytes; {info.dtype} {info.shape} needs {info.nbytes}",
            )
        position = end
    if payload_start + position != file_size:
        raise _corrupt(where, f"its tensors end at byte {payload_start + position}, the file at {file_size}")
    tensors = tuple(info for _, _, info in spans)
    return Header(metadata, tensors, {info.name: payload_start + start for start, _, info in spans}, payload_start)


def _checked_info(entry: Any, name: str, where: str) -> TensorInfo:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(where, f"tensor {name!r} has the unknown number format {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(size) for size in shape):
        raise _corrupt(where, f"tensor {name!r} has no valid shape")
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        raise _corrupt(where, f"tensor {name!r} ends inside a byte")
    return TensorInfo(name, dtype, tuple(shape))


def _checked_span(entry: Any, name: str, where: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _corrupt(where, f"tensor {name!r} has no valid data_offsets")
    if offsets[0] > offsets[1]:
        raise _corrupt(where, f"tensor {name!r} ends before it starts")
    return offsets[0], offsets[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _corrupt(where: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} is damaged: {what}.")


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file with this start is a git-lfs pointer."""
    return start.removeprefix(codecs.BOM_UTF8).startswith(b"version https://git-lfs")


def _refuse_lfs_pointer(start: bytes, where: str) -> None:
    if is_lfs_pointer(start):
        raise CorruptCheckpointError(f"{where} is a git-lfs pointer, not the file itself.", LFS_ADVICE)


def refuse_by_content(start: bytes, where: str) -> None:
    """Say what a weight file is that is not what its name says, where its first bytes tell.

    Raises:
        CorruptCheckpointError: they do.
    """
    _refuse_lfs_pointer(start, where)
    if not start:
        raise CorruptCheckpointError(f"{where} is empty.")
    for sign, what, fix in _OTHER_CONTENTS:
        if re.match(sign, start):
            raise CorruptCheckpointError(f"{where} is {what}.", fix)


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that comes from outside, with or without a byte order mark, refusing duplicate keys.

    Raises:
        CorruptCheckpointError: not UTF-8, half a character, not JSON, not an object, nested too deep, or a key
            given twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise ValueError("a key is given twice")
        return parsed

    _refuse_lfs_pointer(data, where)
    try:
        parsed = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            # Halves of characters that are not beside one another cannot be written again.
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _corrupt(
            where, "it holds half a character, an escape such as \\ud83d without its other half"
        ) from error
    except (ValueError, RecursionError) as error:
        fix = "Save it as UTF-8." if isinstance(error, UnicodeDecodeError) and where.endswith(".json") else ""
        raise CorruptCheckpointError(f"{where} is damaged: {str(error).rstrip('.')}.", fix) from error
    if not isinstance(parsed, dict):
        raise _corrupt(where, "it does not hold a JSON object")
    return parsed


@dataclass(frozen=True)
class Index:
    """A checked index of a sharded checkpoint.

    Attributes:
        metadata: its ``metadata`` entry (``total_size`` and whatever else the writer put there).
        shards: tensor name to file name, in the index's order.
    """

    metadata: Mapping[str, Any]
    shards: Mapping[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """The shards' file names, sorted, each once."""
        return tuple(sorted(set(self.shards.values())))


def parse_index(data: bytes, where: str) -> Index:
    """Check ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.

    Raises:
        CorruptCheckpointError: not an index, or a shard's name is not a plain file name of its kind.
    """
    parsed = parse_json_object(data, where)
    metadata, shards = parsed.get("metadata", {}), parsed.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(shards, dict) or not shards:
        raise _corrupt(where, "it is no index of shards")
    ending = ".bin" if where.endswith(".bin.index.json") else ".safetensors"
    for file in shards.values():
        plain = isinstance(file, str) and file.endswith(ending) and not file.startswith(".")
        if not plain or any(character in file for character in "/\\\0"):
            raise _corrupt(where, f"it names the shard {file!r}, which is no plain {ending} file name")
    return Index(metadata, shards)


def header_bytes(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors in this order: length and header, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in tensors:
        offsets = [position, position + info.nbytes]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    data = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def in_aligned_order(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The tensors with wide elements before narrow ones and otherwise in their own order.

    Readers view the bytes in place, so each tensor must start at a multiple of its element's size; the format
    allows no padding, and this order (the one safetensors itself writes) aligns every tensor.
    """
    return sorted(tensors, key=lambda info: -DTYPE_BITS[info.dtype])


def drop_page_cache(descriptor: int, end: int) -> None:
    """Flush an open file's first ``end`` bytes and drop them from the page cache once they are on the disk.

    Measured, large files are written several times faster so, and other programs' files stay cached.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, end, os.POSIX_FADV_DONTNEED)


def write_all(destination: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` to an open file, which one call may leave undone."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(destination, rest) :]


def to_float64(data: bytes, dtype: str) -> NDArray[np.float64]:
    """The numbers in ``data`` (``F64``, ``F32``, ``F16`` or ``BF16``, little-endian), flat and exact."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def from_float64(values: NDArray[np.float64], dtype: str) -> bytes:
    """``values`` rounded once, to nearest with ties to even, as little-endian bytes of ``dtype``.

    Raises nothing on overflow: the result is infinite then, as IEEE 754 has it.
    """
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        nearest = values.astype("<f4")
    # Rounding to odd in float32 keeps what decides the second rounding, so that the result is rounded once.
    inexact = nearest.astype(np.float64) != values
    bits = nearest.view("<u4") - (np.abs(nearest) > np.abs(values))
    bits = bits | inexact
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & 1)) >> np.uint32(16)).astype("<u2").tobytes()


def rounded(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """``values`` as they are read after being stored as ``dtype``."""
    return to_float64(from_float64(values, dtype), dtype).reshape(values.shape)
