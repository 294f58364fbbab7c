"""Calibration in several processes, started by torchrun: their ranks and what they exchange.

Every process holds the whole model and draws the same windows; each runs its own rows of them, and the gradients
of the scales are summed. So all take the same steps, and the first alone validates, measures and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from converter.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Value = TypeVar("Value")
# The others wait while the first validates, measures and writes.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among all that calibrate together; alone by default.

    Attributes:
        rank: its number, from 0. size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Let the first process compute something, and give it to all."""
        if self.size == 1:
            return compute()
        import torch
        from torch import distributed

        shared = [compute() if self.is_first else None]
        distributed.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
        return cast(Value, shared[0])

    def gather(self, number: int) -> list[int]:
        """The values of all processes by rank; a barrier."""
        if self.size == 1:
            return [number]
        from torch import distributed

        numbers = [number] * self.size
        distributed.all_gather_object(numbers, number)
        return numbers

    def rows(self, windows: Tensor) -> Tensor:
        """This process's rows of (count, length) windows, of which every process has as many."""
        return windows[self.rank :: self.size]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every parameter's gradient by its sum over the processes."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Ranks()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun started, if it did; each process takes a GPU of its own.

    Args:
        device: as the user names it; ``cpu`` keeps the processes off the GPUs.

    Raises:
        UsageError: a host has more processes than GPUs, or the environment names no others to meet.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} not set, so the other processes cannot be met.",
            "Start several processes with torchrun; for one alone, unset WORLD_SIZE.",
        )
    import torch
    from torch import distributed

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UsageError(
                f"torchrun started more processes on this host than it has GPUs ({gpus}).",
                f"Use --nproc-per-node {gpus}, or --device cpu.",
            )
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
