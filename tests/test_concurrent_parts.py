"""Several parts at a time: results in order, and one failure or Ctrl-C ends the work on all."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from converter.commands.console import Console
from converter.concurrent_parts import PART_BYTES, PARTS_AT_ONCE, Advance, for_each, in_parts
from converter.errors import LayoutError
from converter.reporting import Reporter
from converter.safetensors_file import TensorInfo

PARTS = range(6)


def test_parts_keep_the_order_and_end_where_they_are_large_enough() -> None:
    sizes = [PART_BYTES - 1, 1, PART_BYTES + 5, 7, 0]
    tensors = [TensorInfo(str(number), "U8", (size,)) for number, size in enumerate(sizes)]
    assert list(in_parts(tensors)) == [tensors[:2], tensors[2:3], tensors[3:]]
    assert list(in_parts(tensors[:0])) == []


def test_results_are_in_the_order_of_the_parts() -> None:
    def work(part: int, advance: Advance) -> int:
        time.sleep(0 if part else 0.05)
        advance(1 << 20)
        return part

    with Console(quiet=True).task("Working", 6) as task:
        assert for_each(work, PARTS, task) == list(PARTS)


@pytest.mark.parametrize("failing", [0, 2])
def test_failure_on_one_part_ends_the_work_on_the_others(failing: int) -> None:
    begun = []

    def work(part: int, advance: Advance) -> None:
        begun.append(part)
        if part == failing:
            raise ValueError(part)
        while True:
            advance(0)
            time.sleep(0.001)

    with Console(quiet=True).task("Working", 6) as task, pytest.raises(ValueError, match=str(failing)):
        for_each(work, PARTS, task)
    assert len(begun) <= PARTS_AT_ONCE + 1


def test_ctrl_c_ends_the_work_at_once() -> None:
    def work(part: int, advance: Advance) -> None:
        while True:
            advance(0)
            time.sleep(0.001)

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with Console(quiet=True).task("Working", 6) as task, pytest.raises(KeyboardInterrupt):
        for_each(work, PARTS, task)


def test_refusal_beside_the_work_ends_it_and_failed_work_ends_what_is_beside() -> None:
    def refuse(_: Advance) -> None:
        raise LayoutError("refused")

    def fail(_: int, advance: Advance) -> None:
        raise LayoutError("failed")

    def endless(*arguments: Any) -> None:
        while True:
            arguments[-1](0)

    with Reporter().task("", 1) as task:
        with pytest.raises(LayoutError, match="refused"):
            for_each(endless, [1, 2], task, refuse)
        with pytest.raises(LayoutError, match="failed"):
            for_each(fail, [1], task, endless)
