"""Frozen weights in host memory: a layer's are copied to the GPU while the layer before it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from converter.errors import CalibrationError, UsageError

MemoryMode = Literal["auto", "keep", "checkpoint", "offload", "stream"]
# Of the free memory of a GPU; the rest is for activations.
LARGEST_SHARE = 0.8
# Smaller tensors, every A_log, and what several layers share stay on the device.
SMALLEST_STREAMED = 1 << 16
ALIGNMENT, PAGE = 512, 4096


def outermost_layers(model: nn.Module) -> list[Any]:
    """The layers that stock code can run again in the backward pass, none of them inside another."""
    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in outermost_layers(child)]


def is_streamed(model: nn.Module, device: torch.device, mode: MemoryMode) -> bool:
    """Whether weights stay in host memory: where that is asked for, or where they leave too little of the GPU.

    Raises:
        UsageError: there is no GPU to bring them to.
    """
    if device.type != "cuda":
        if mode == "stream":
            raise UsageError("--memory stream brings weights to a GPU, and there is none.", "Use checkpoint.")
        return False
    needed = sum(parameter.nbytes for parameter in model.parameters())
    return mode == "stream" or (mode == "auto" and needed > LARGEST_SHARE * torch.cuda.mem_get_info(device)[0])


class WeightStream:
    """Keeps the large weights of a model's layers in host memory, and at most two layers' on the device.

    A layer's weights come when it is entered and stay until the next one is entered. In a backward pass that runs
    the layers again that is after the layer's own gradient. The weights of the layer that follows, in either
    direction, are on their way meanwhile. So every layer must keep its input only, and whoever runs it again must
    call :meth:`enter`; see :class:`calibrator.activations.Activations`.

    Args:
        model: in host memory; all else of it is moved to the device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layers = outermost_layers(model)
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
        self._hosts = [
            _HostLayer([p for n, p in layer.named_parameters() if owners[id(p)] == 1 and _is_large(n, p)], device)
            for layer in layers
        ]
        self._on_device: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._last = -1
        model.to(device)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self.enter, index))

    @property
    def nbytes(self) -> int:
        """Size of the weights in host memory."""
        return sum(host.flat.numel() for host in self._hosts)

    def close(self) -> None:
        """Free the host memory; the model cannot run any more."""
        if self._copying:
            self._copying.synchronize()
        self._on_device.clear()
        for host in self._hosts:
            host.close()

    def enter(self, index: int, *_: Any) -> None:
        """Bring a layer's weights for work on the current stream, and start on those of the next layer."""
        if index == self._last < len(self._hosts) - 1:
            return
        following = self._following(index)
        for other in [other for other in self._on_device if other not in (index, following)]:
            self._hosts[other].leave()
            self._waited(other)
            del self._on_device[other]
        self._fetch(index)
        self._hosts[index].use(self._waited(index))
        self._fetch(following)
        self._last = index

    def _following(self, index: int) -> int:
        """The layer that is entered after this one, forwards or backwards."""
        end = len(self._hosts) - 1
        if index == 0:
            return min(1, end)
        if index < end:
            return index + 1 if index > self._last else index - 1
        # A gradient begins with the last layer again, another forward pass with the first.
        if not torch.is_grad_enabled():
            return 0
        return end - 1 if self._last == end else end

    def _fetch(self, index: int) -> None:
        """Start the copy to the device, into memory that the current stream's work has done with."""
        if index in self._on_device:
            return
        flat = self._hosts[index].flat
        buffer, copied = torch.empty(flat.shape, dtype=torch.uint8, device=self._device), None
        if self._copying is None:
            buffer.copy_(flat)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copying):
                buffer.copy_(flat, non_blocking=True)
                copied = self._copying.record_event()
        self._on_device[index] = buffer, copied

    def _waited(self, index: int) -> Tensor:
        """A layer's weights on the device, for work on the current stream."""
        buffer, copied = self._on_device[index]
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return buffer


def _is_large(name: str, parameter: nn.Parameter) -> bool:
    return not name.endswith("A_log") and parameter.nbytes >= SMALLEST_STREAMED


class _HostLayer:
    """The large frozen parameters of a layer, one after the other in page-locked host memory."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._empty = torch.empty(0, device=device)
        self._parts: list[tuple[nn.Parameter, slice, torch.dtype, torch.Size]] = []
        end = 0
        for parameter in parameters:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + parameter.nbytes
            self._parts.append((parameter, slice(start, end), parameter.dtype, parameter.shape))
        space = torch.empty(end + 2 * PAGE, dtype=torch.uint8)
        # Whole pages are locked, and no other memory lies on them.
        start = -space.data_ptr() % PAGE
        self.flat = space[start : start + end]
        for parameter, place, _, _ in self._parts:
            self.flat[place].copy_(parameter.data.contiguous().view(-1).view(torch.uint8))
        self.leave()
        # Page-locked in place: PyTorch's own allocator of such memory rounds up to a power of two.
        self._locked = device.type == "cuda" and end > 0
        size = -(-end // PAGE) * PAGE
        if self._locked and int(torch.cuda.cudart().cudaHostRegister(self.flat.data_ptr(), size, 0)):
            raise CalibrationError("The host memory for the weights cannot be page-locked.", "Raise ulimit -l.")

    def use(self, buffer: Tensor) -> None:
        """Point the parameters into their copy on the device."""
        for parameter, place, dtype, shape in self._parts:
            parameter.data = buffer[place].view(dtype).view(shape)

    def leave(self) -> None:
        """Let go of the copy."""
        for parameter, _, dtype, _ in self._parts:
            parameter.data = self._empty.to(dtype)

    def close(self) -> None:
        """Free the host memory."""
        self.leave()
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self.flat.data_ptr())
            self._locked = False
        self.flat = torch.empty(0, dtype=torch.uint8)
