"""Working on two weight files at a time, which is faster than one where the disk and a second core allow it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from converter.console import Task
from converter.layouts import WeightFile

Result = TypeVar("Result")
Advance = Callable[[int], None]

FILES_AT_ONCE = 2
MEGABYTE = 1 << 20


class _StoppedError(Exception):
    """Ends the work on a file because that on another failed or Ctrl-C was pressed."""


def for_each_file(
    work: Callable[[WeightFile, Advance], Result],
    files: Sequence[WeightFile],
    task: Task,
    then: Callable[[WeightFile, Advance], object] | None = None,
) -> list[Result]:
    """What ``work`` returns for each file, in the files' order.

    Args:
        work: gets a file and a function to call now and then with the number of bytes done since; the first
            exception, Ctrl-C included, ends the work on the others at their next such call.
        task: shows the progress in megabytes.
        then: called likewise with each file whose work is done, once work on all others has begun.
    """
    stopping = threading.Event()

    def advance(done: int) -> None:
        if stopping.is_set():
            raise _StoppedError
        task.advance(done / MEGABYTE)

    def follow(file: WeightFile, done: Future[Result]) -> None:
        done.result()
        if then is not None:
            then(file, advance)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        working = [pool.submit(work, file, advance) for file in files]
        # The pool takes up its tasks in their order, so what each of these waits for has begun.
        following = [pool.submit(follow, file, done) for file, done in zip(files, working, strict=True)]
        running: list[Future[Any]] = [*working, *following]
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
    return [done.result() for done in working]
