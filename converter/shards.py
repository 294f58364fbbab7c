"""One weight file of a checkpoint: which tensors it holds, and how to read or copy their bytes.

Two kinds exist, safetensors files (NumPy alone) and the pickled ``.bin`` files of PyTorch (torch, imported when
one is opened).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, TypeAlias

from converter.errors import CorruptCheckpointError, system_errors
from converter.safetensors_file import TORCH_NAMES, Header, TensorInfo, read_header, refuse_by_content, write_all

_CHUNK_BYTES = 1 << 18


class OpenFile(Protocol):
    """Opens a file for reading from ``start`` on, of which at most ``count`` bytes are read."""

    def __call__(self, start: int = 0, count: int | None = None) -> BinaryIO: ...


def opening(path: Path) -> OpenFile:
    """Opens a file of this machine."""

    def open_file(start: int = 0, count: int | None = None) -> BinaryIO:
        file = path.open("rb")
        file.seek(start)
        return file

    return open_file


def read_bytes(shard: Shard, tensor: TensorInfo) -> bytes:
    """All bytes of one tensor."""
    return b"".join(shard.chunks(tensor))


def copy_bytes(shard: Shard, tensor: TensorInfo, destination: int) -> None:
    """Write the bytes of one tensor to an open file, at its position."""
    for chunk in shard.chunks(tensor):
        write_all(destination, chunk)


@dataclass(frozen=True)
class SafetensorsShard:
    """A safetensors file, on this machine or read by ranges from the Hub.

    Args:
        name: the file's name in the checkpoint's folder.
        open_file: opens the file for reading, from its start or for so many bytes from a position on.
    """

    name: str
    open_file: OpenFile = field(repr=False)
    header: Header = field(repr=False)

    _read_header = staticmethod(read_header)

    @classmethod
    def open(cls, name: str, open_file: OpenFile) -> Self:
        """Read and check the header. Raises CorruptCheckpointError."""
        with open_file() as file:
            return cls(name, open_file, cls._read_header(file, name))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own metadata."""
        return self.header.metadata

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Its tensors in the order of their bytes."""
        return self.header.tensors

    def chunks(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of 256 KiB (the last shorter); a piece is valid until the next one.

        A small buffer stays in the processor's cache.
        """
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, tensor.nbytes)))
        with self.open_file(self.header.starts[tensor.name], tensor.nbytes) as file:
            for start in range(0, tensor.nbytes, _CHUNK_BYTES):
                piece = buffer[: min(_CHUNK_BYTES, tensor.nbytes - start)]
                with system_errors(f"{self.name} cannot be read", CorruptCheckpointError, "See to its disk."):
                    count = file.readinto(piece)  # type: ignore[attr-defined]
                if count != len(piece):
                    raise CorruptCheckpointError(f"{self.name} ended while it was read.", "Check the disk.")
                yield piece

    def frame(self, values: Mapping[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Start and content of the bytes outside of tensors: the header, and in a GGUF file the padding.

        Args:
            values: numbers of a GGUF header that are replaced in it; of others nothing is done.
        """
        with self.open_file(0, self.header.size) as file:
            yield 0, file.read(self.header.size)

    def pieces(self) -> Iterator[bytes | TensorInfo]:
        """All of the file in its order: bytes outside of tensors, and tensors."""
        found: dict[int, bytes | TensorInfo] = dict(self.frame({}))
        found |= {self.header.starts[info.name]: info for info in self.tensors}
        return (found[start] for start in sorted(found))


@dataclass(frozen=True)
class TorchShard:
    """A ``.bin`` file of PyTorch, unpickled by torch's weights-only loader and mapped into memory.

    Args:
        name: as of :class:`SafetensorsShard`, whose ``metadata``, ``tensors`` and ``chunks`` it has.
        path: where the file lies; its bytes are read from there, its table of tensors from ``open_file``.
    """

    name: str
    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @classmethod
    def open(cls, name: str, path: Path, open_file: Callable[[], BinaryIO]) -> TorchShard:
        """Read the table of tensors, and none of their bytes.

        Raises:
            CorruptCheckpointError: no file of tensors, or a pickle that asks for more than tensors.
        """
        import torch

        with open_file() as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                if not (start := file.read(512)).startswith((b"PK", b"\x80")):
                    refuse_by_content(start, name)
                raise CorruptCheckpointError(
                    f"{name} is not a whole file in the format of PyTorch 1.6 or newer.",
                    "Download it again, or load and save it with a current PyTorch.",
                )
            file.seek(0)
            loaded = _load_tensors(name, file, map_location="meta")
        dtypes = {getattr(torch, torch_name): dtype for dtype, torch_name in TORCH_NAMES.items()}
        infos = []
        for key, value in loaded.items():
            if value.dtype not in dtypes or value.layout != torch.strided:
                raise CorruptCheckpointError(
                    f"{name}: tensor {key!r} is {value.dtype}, {value.layout}: not supported."
                )
            infos.append(TensorInfo(key, dtypes[value.dtype], tuple(value.shape)))
        return cls(name, path, tuple(infos))

    @cached_property
    def _mapped(self) -> Mapping[str, Any]:
        return _load_tensors(self.name, self.path, map_location="cpu", mmap=True)

    def chunks(self, tensor: TensorInfo) -> Iterator[memoryview]:
        import torch

        value = self._mapped[tensor.name].detach().contiguous()
        data = memoryview(value.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, tensor.nbytes, _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


Shard: TypeAlias = SafetensorsShard | TorchShard
"""One weight file."""


def _load_tensors(name: str, file: Path | BinaryIO, **options: Any) -> Mapping[str, Any]:
    """The table of tensors in a ``.bin`` file. Raises CorruptCheckpointError."""
    import pickle

    import torch

    try:
        loaded = torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{name} is no plain file of tensors, and the code that a pickle asks for is never run: "
            f"{str(error).partition(chr(10))[0]}",
            "Get the checkpoint as safetensors.",
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(
            f"{name} is damaged: {str(error).partition(chr(10))[0]}", "Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise CorruptCheckpointError(f"{name} does not hold a plain table of tensors.", "Get it as safetensors.")
    return loaded
