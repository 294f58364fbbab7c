"""Moves tensors of a forward pass to host memory until the backward pass, while the GPU computes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from converter.errors import CalibrationError

# Host memory comes in blocks of a power of two, since PyTorch's allocator of pinned memory rounds up to one.
BLOCK_BYTES = 1 << 26
# How many tensors may be on their way at once, in either direction.
IN_FLIGHT = 2


@dataclass(eq=False)
class _Stored:
    """One tensor: on the device, in host memory, or both while it is being copied."""

    index: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    on_device: Tensor | None
    blocks: list[Tensor] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class HostStore:
    """Takes the tensors of one forward pass in order and gives them back in the opposite order.

    Copies run on a stream of their own. A tensor leaves the device when the second one after it is put in, and
    is on its way back when the one after it is taken out, so that at most a few are on the device at any time.
    """

    def __init__(self) -> None:
        self._stored: list[_Stored] = []
        self._free: list[Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> _Stored:
        """Store a tensor; returns the handle for :meth:`take`."""
        stored = _Stored(len(self._stored), tensor.shape, tensor.dtype, tensor.device, tensor.detach())
        self._stored.append(stored)
        if stored.index >= IN_FLIGHT:
            self._leave(self._stored[stored.index - IN_FLIGHT])
        self._send(stored)
        return stored

    def take(self, stored: _Stored) -> Tensor:
        """The tensor on its device again, for work on the current stream."""
        for index in range(stored.index, max(-1, stored.index - IN_FLIGHT), -1):
            self._fetch(self._stored[index])
        assert stored.on_device is not None and stored.copied is not None
        torch.cuda.current_stream(stored.device).wait_event(stored.copied)
        tensor, stored.on_device = stored.on_device, None
        return tensor

    def clear(self) -> None:
        """Drop all stored tensors; the host memory is reused."""
        for stored in self._stored:
            self._free += stored.blocks
        self._stored.clear()

    def _send(self, stored: _Stored) -> None:
        """Start the copy to the host behind the work that makes the tensor."""
        assert stored.on_device is not None
        stream = self._stream(stored.device)
        stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(stream):
            for part in stored.on_device.contiguous().view(-1).view(torch.uint8).split(BLOCK_BYTES):
                block = self._free.pop() if self._free else _new_block()
                block[: len(part)].copy_(part, non_blocking=True)
                stored.blocks.append(block)
            stored.copied = stream.record_event()

    def _leave(self, stored: _Stored) -> None:
        """Let go of the tensor on the device; its memory is used again only after the copy."""
        assert stored.copied is not None
        torch.cuda.current_stream(stored.device).wait_event(stored.copied)
        stored.on_device = None

    def _fetch(self, stored: _Stored) -> None:
        """Start the copy back, into memory that the current stream's work has done with."""
        if stored.on_device is not None:
            return
        stored.on_device = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        stream = self._stream(stored.device)
        stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(stream):
            parts = stored.on_device.view(-1).view(torch.uint8).split(BLOCK_BYTES)
            for part, block in zip(parts, stored.blocks, strict=True):
                part.copy_(block[: len(part)], non_blocking=True)
            stored.copied = stream.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _new_block() -> Tensor:
    try:
        return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise CalibrationError(
            "Host memory for the layers' inputs ran out.", "Use a shorter --target-len."
        ) from error
