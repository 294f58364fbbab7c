"""Working on two weight files at a time, which is faster than one where the disk and a second core allow it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from converter.console import Task
from converter.layouts import WeightFile

Result = TypeVar("Result")
Advance = Callable[[int], None]

FILES_AT_ONCE = 2
MEGABYTE = 1 << 20


class _StoppedError(Exception):
    """Ends the work on a file because that on another failed or Ctrl-C was pressed."""


def for_each_file(
    work: Callable[[WeightFile, Advance], Result], files: Sequence[WeightFile], task: Task
) -> list[Result]:
    """What ``work`` returns for each file, in the files' order.

    Args:
        work: gets a file and a function to call now and then with the number of bytes done since; the first
            exception, Ctrl-C included, ends the work on the others at their next such call.
        task: shows the progress in megabytes.
    """
    stopping = threading.Event()

    def advance(done: int) -> None:
        if stopping.is_set():
            raise _StoppedError
        task.advance(done / MEGABYTE)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        running = [pool.submit(work, file, advance) for file in files]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            # All are done, or one failed, or Ctrl-C was pressed.
            stopping.set()
            pool.shutdown(cancel_futures=True)
    errors = (future.exception() for future in running if not future.cancelled())
    for error in errors:
        if error is not None and not isinstance(error, _StoppedError):
            raise error
    return [future.result() for future in running]
