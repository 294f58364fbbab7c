"""Two weight files at a time: results in order, and one failure or Ctrl-C ends the work on all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from converter.concurrent_files import Advance, for_each_file
from converter.console import Reporter
from converter.layouts import WeightFile, read_checkpoint
from tests.small_checkpoints import source, write_transformers


@pytest.fixture
def files(tmp_path: Path) -> Sequence[WeightFile]:
    """Four weight files."""
    return read_checkpoint(source(write_transformers(tmp_path / "model", shards=4))).files


def test_results_are_in_the_order_of_the_files(files: Sequence[WeightFile]) -> None:
    def work(file: WeightFile, advance: Advance) -> str:
        time.sleep(0.05 if file is files[0] else 0)
        advance(1 << 20)
        return file.name

    with Reporter(quiet=True).task("Working", 4) as task:
        assert for_each_file(work, files, task) == [file.name for file in files]


def test_second_step_follows_the_first_of_its_own_file_and_the_start_of_all(files: Sequence[WeightFile]) -> None:
    steps: list[tuple[str, str]] = []

    def work(file: WeightFile, advance: Advance) -> None:
        steps.append(("begun", file.name))
        time.sleep(0.05 if file is files[0] else 0)
        steps.append(("done", file.name))

    def then(file: WeightFile, advance: Advance) -> None:
        assert ("done", file.name) in steps
        steps.append(("followed", file.name))

    with Reporter(quiet=True).task("Working", 4) as task:
        for_each_file(work, files, task, then)
    order = [step for step, _ in steps]
    assert order.count("followed") == 4
    assert "begun" not in order[order.index("followed") :]


def test_failure_of_a_second_step_ends_the_work_on_the_others(files: Sequence[WeightFile]) -> None:
    def work(file: WeightFile, advance: Advance) -> None:
        while file is files[3]:
            advance(0)
            time.sleep(0.001)

    def then(file: WeightFile, advance: Advance) -> None:
        raise ValueError(file.name)

    with Reporter(quiet=True).task("Working", 4) as task, pytest.raises(ValueError, match=files[0].name):
        for_each_file(work, files, task, then)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_on_one_file_ends_the_work_on_the_others(files: Sequence[WeightFile], failing: int) -> None:
    begun = []

    def work(file: WeightFile, advance: Advance) -> None:
        begun.append(file.name)
        if file is files[failing]:
            raise ValueError(file.name)
        while True:
            advance(0)
            time.sleep(0.001)

    with (
        Reporter(quiet=True).task("Working", 4) as task,
        pytest.raises(ValueError, match=files[failing].name),
    ):
        for_each_file(work, files, task)
    assert len(begun) <= 3


def test_ctrl_c_ends_the_work_at_once(files: Sequence[WeightFile]) -> None:
    def work(file: WeightFile, advance: Advance) -> None:
        while True:
            advance(0)
            time.sleep(0.001)

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with Reporter(quiet=True).task("Working", 4) as task, pytest.raises(KeyboardInterrupt):
        for_each_file(work, files, task)
