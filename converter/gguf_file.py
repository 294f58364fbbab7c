"""The GGUF format: its header, its number formats, and which of its bytes are no tensor's.

A file is the magic word, version and two counts; named values; a table of tensors; and the tensors' bytes, each
begun at a multiple of the alignment (versions 2 and 3, little-endian; format of llama.cpp's ggml/src/gguf.cpp).
Every header is untrusted: nothing is read or written through one before it has been checked whole.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from converter.errors import CorruptCheckpointError
from converter.safetensors_file import DTYPE_BITS, MAX_HEADER_BYTES, Header, TensorInfo, write_all
from converter.shards import SafetensorsShard

Value = int | float | bool | str

# Number formats by their number in the file: name, elements of a block, bytes of a block. Q8_1 and Q8_K, which
# llama.cpp computes with and never stores, are not among them.
_FORMATS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
_BLOCKS = {name: (elements, size) for name, elements, size in _FORMATS.values()}
# Kinds of values by their number in the file, as struct spells them.
_SCALARS: Mapping[int, str] = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_AXES, _MAX_NAME, _MAX_ALIGNMENT = 4, 63, 1 << 20
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class BlockInfo(TensorInfo):
    """A tensor in one of GGUF's quantised formats, stored by blocks of elements."""

    @property
    def nbytes(self) -> int:
        elements, size = _BLOCKS[self.dtype]
        return math.prod(self.shape) // elements * size


@dataclass(frozen=True)
class GgufHeader(Header):
    """A checked header.

    Attributes:
        values: the named values except for arrays.
        places: name of a number among them to the position of its bytes and how struct spells it.
        file_size: bytes of the whole file.
    """

    values: Mapping[str, Value]
    places: Mapping[str, tuple[int, str]]
    file_size: int


def read_gguf_header(file: BinaryIO, where: str) -> GgufHeader:
    """Read and check the header of an open GGUF file.

    Args:
        where: the file's name, for messages.

    Raises:
        CorruptCheckpointError: it breaks the format, has a version or byte order that is no longer written, or
            does not describe every byte of the file once.
    """
    cursor = _Cursor(file, where)
    if cursor.take(4) != b"GGUF":
        raise _corrupt(where, "it does not begin with the word GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        kind = "big-endian" if version and not version & 0xFFFF else f"of version {version}"
        raise CorruptCheckpointError(
            f"{where} is {kind}; little-endian GGUF of version 2 or 3 is read.", "Convert the model again."
        )
    tensor_count, value_count = cursor.count(24), cursor.count(13)
    values, places = _read_values(cursor, value_count)
    alignment = values.get("general.alignment", 32)
    is_power = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and not alignment & (alignment - 1)
    if places.get("general.alignment", (0, "<I"))[1] != "<I" or not is_power:
        raise _corrupt(where, f"its alignment is {alignment!r}")
    entries = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_start = position = _padded(cursor.position, int(alignment))
    starts: dict[str, int] = {}
    for info, offset in entries:
        if info.name in starts:
            raise _corrupt(where, f"tensor {info.name!r} is there twice")
        if data_start + offset != position:
            raise _corrupt(where, f"tensor {info.name!r} starts at {offset}, expected {position - data_start}")
        starts[info.name] = position
        end = position + info.nbytes
        position = _padded(end, int(alignment))
    if entries and not end <= cursor.file_size <= position:
        raise _corrupt(where, f"its tensors end at byte {end}, the file at {cursor.file_size}")
    tensors = tuple(info for info, _ in entries)
    size = min(data_start, cursor.file_size)
    return GgufHeader({}, tensors, starts, size, values, places, cursor.file_size)


def _read_values(cursor: _Cursor, count: int) -> tuple[dict[str, Value], dict[str, tuple[int, str]]]:
    values: dict[str, Value] = {}
    places: dict[str, tuple[int, str]] = {}
    seen = set()
    for _ in range(count):
        name, kind = cursor.text(), cursor.number("<I")
        if name in seen:
            raise _corrupt(cursor.where, f"the value {name!r} is there twice")
        seen.add(name)
        if kind in _SCALARS:
            places[name] = (cursor.position, _SCALARS[kind])
            values[name] = cursor.number(_SCALARS[kind])
        elif kind == _STRING:
            values[name] = cursor.text()
        elif kind == _ARRAY:
            cursor.skip_array(name)
        else:
            raise _corrupt(cursor.where, f"the value {name!r} is of the unknown kind {kind}")
    return values, places


def _read_tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    """One entry of the table: the tensor, and where it begins behind the header."""
    name, axes = cursor.text(), cursor.number("<I")
    if not 0 < len(name.encode()) <= _MAX_NAME or axes > _MAX_AXES:
        raise _corrupt(cursor.where, f"tensor {name[:80]!r} has {axes} axes or no valid name")
    # The file has the fastest axis first.
    shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in _FORMATS:
        raise _corrupt(cursor.where, f"tensor {name!r} has the unknown number format {kind}")
    dtype, elements, _ = _FORMATS[kind]
    if math.prod(shape) >= 1 << 63 or (shape[-1] if shape else 1) % elements:
        raise _corrupt(cursor.where, f"tensor {name!r} of the shape {shape} cannot be {dtype}")
    return (TensorInfo if dtype in DTYPE_BITS else BlockInfo)(name, dtype, shape), offset


class _Cursor:
    """Reads a header piece by piece, never past the end of the file."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        self.file_size = file.seek(0, os.SEEK_END)
        self.position = file.seek(0)
        self._file = file
        self._end = min(self.file_size, MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        self._claim(count)
        data = self._file.read(count)
        if len(data) != count:
            raise _corrupt(self.where, "it ends inside its header")
        return data

    def number(self, kind: str) -> Any:
        [value] = struct.unpack(kind, self.take(struct.calcsize(kind)))
        return value

    def count(self, least: int) -> int:
        """A number of things of at least so many bytes, for all of which there is room."""
        count: int = self.number("<Q")
        if count * least > self._end - self.position:
            raise _corrupt(self.where, f"its header claims {count} entries, for which it has no room")
        return count

    def text(self) -> str:
        try:
            return self.take(self.count(1)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _corrupt(self.where, "a name in it is not UTF-8") from error

    def skip_array(self, name: str) -> None:
        """Pass over an array; arrays of arrays are refused."""
        kind = self.number("<I")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self._skip(self.count(size) * size)
        elif kind == _STRING:
            for _ in range(self.count(8)):
                self._skip(self.count(1))
        else:
            raise _corrupt(self.where, f"the value {name!r} is an array of the unknown kind {kind}")

    def _skip(self, count: int) -> None:
        self._claim(count)
        self._file.seek(count, os.SEEK_CUR)

    def _claim(self, count: int) -> None:
        if count > self._end - self.position:
            raise _corrupt(self.where, "it ends inside its header")
        self.position += count


def _padded(position: int, alignment: int) -> int:
    return position + -position % alignment


def _corrupt(where: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} is damaged: {what}.", "Download or copy the file again.")


@dataclass(frozen=True)
class GgufShard(SafetensorsShard):
    """A GGUF file, on this machine or read by ranges from the Hub."""

    header: GgufHeader = field(repr=False)
    _read_header = staticmethod(read_gguf_header)

    def frame(self, values: Mapping[str, Value]) -> Iterator[tuple[int, bytes]]:
        ends = [self.header.size, *(self.header.starts[info.name] + info.nbytes for info in self.tensors)]
        starts = [*(self.header.starts[info.name] for info in self.tensors), self.header.file_size]
        [(_, plain)] = super().frame({})
        header = bytearray(plain)
        for name in values.keys() & self.header.places.keys():
            start, kind = self.header.places[name]
            struct.pack_into(kind, header, start, values[name])
        yield 0, bytes(header)
        for end, start in zip(ends, starts, strict=True):
            if end < start:
                with self.open_file(end, start - end) as file:
                    yield end, file.read(start - end)

    def begin(self, destination: int, values: Mapping[str, Value]) -> None:
        """Give an empty open file this one's length and all its bytes but the tensors'."""
        os.ftruncate(destination, self.header.file_size)
        for start, data in self.frame(values):
            os.lseek(destination, start, os.SEEK_SET)
            write_all(destination, data)


def parts_of(name: str) -> list[str]:
    """The names of all files of the model that one file is of: itself, or the parts it was split into."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def check_parts(shards: Sequence[GgufShard]) -> None:
    """Compare split files with their headers. Raises CorruptCheckpointError."""
    numbers: Iterable[tuple[Value | None, Value | None]] = [
        (shard.header.values.get("split.no"), shard.header.values.get("split.count")) for shard in shards
    ]
    expected = [(number, len(shards)) for number in range(len(shards))]
    if len(shards) > 1 and list(numbers) != expected:
        raise CorruptCheckpointError(
            f"{shards[0].name} and the files beside it are not the parts of one model.", "Get all parts again."
        )
