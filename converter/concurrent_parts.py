"""Works on several parts of the weights at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from converter.reporting import Task

if TYPE_CHECKING:
    from converter.layouts import Tensor
    from converter.safetensors_file import TensorInfo

MEGABYTE = 1 << 20
PARTS_AT_ONCE = 3
PART_BYTES = 256 * MEGABYTE

Advance = Callable[[int], None]


Item = TypeVar("Item")
Result = TypeVar("Result")
AnyTensor = TypeVar("AnyTensor", "Tensor", "TensorInfo")


class _StoppedError(Exception):
    """Ends the work on a part because that on another failed or Ctrl-C was pressed."""


def in_parts(tensors: Iterable[AnyTensor]) -> Iterator[list[AnyTensor]]:
    """The tensors of a file in their order, cut where a part has reached 256 MB."""
    part: list[AnyTensor] = []
    size = 0
    for tensor in tensors:
        part.append(tensor)
        size += tensor.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def for_each(
    work: Callable[[Item, Advance], Result],
    parts: Sequence[Item],
    task: Task,
    beside: Callable[[Advance], None] | None = None,
) -> list[Result]:
    """Run ``work`` on each part; returns its results in the parts' order.

    Args:
        work: gets a part and a function to call now and then with the number of bytes done since; the first
            exception, Ctrl-C included, ends the work on the others at their next such call.
        task: shows the progress in megabytes.
        beside: work of another kind that goes on meanwhile, under the same rules.
    """
    stopping = threading.Event()

    def advance(done: int) -> None:
        if stopping.is_set():
            raise _StoppedError
        task.advance(done / MEGABYTE)

    with ThreadPoolExecutor(PARTS_AT_ONCE + bool(beside)) as pool:
        others: list[Future[Any]] = [pool.submit(beside, advance)] if beside else []
        running = [pool.submit(work, part, advance) for part in parts]
        try:
            wait([*others, *running], return_when=FIRST_EXCEPTION)
        finally:
            # All are done, or one failed, or Ctrl-C was pressed.
            stopping.set()
            pool.shutdown(cancel_futures=True)
    errors = (future.exception() for future in [*others, *running] if not future.cancelled())
    for error in errors:
        if error is not None and not isinstance(error, _StoppedError):
            raise error
    return [done.result() for done in running]
