"""Resuming: a run that was killed ends with the scales of one that was not, bit for bit."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import converter
from calibrator.calibration import Outcome, calibrate, prepare_calibration
from calibrator.journal import Journal
from calibrator.model import StockModel
from calibrator.settings import Settings
from calibrator.text import Text
from converter.commands.opening import HELD_OUT_NOVEL
from converter.commands.provenance import read_versions
from converter.manifest import SCALES_NAME
from converter.reporting import Task
from converter.scales import Granularity
from tests.measured_models import random_tokens
from tests.stock_models import RememberingReporter, stock_model
from tests.tiny_folders import novel, tiny_folder

ROOT = Path(__file__).parent.parent
TEXTS = [Text("text", (random_tokens(1, 1500)[0], random_tokens(1, 700, seed=1)[0]))]


# The tasks in which a method moves the factors.
CUT_SHORT = ("Calibrating", "Searching for the factor")


class Killed(BaseException):
    """What ends a run in the middle."""


class KillingReporter(RememberingReporter):
    """Ends the run after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Any]:
        # Only what a method does is cut short, not what is measured before it.
        yield self if description in CUT_SHORT else Task()

    def advance(self, amount: float = 1) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Killed

    def describe(self, text: str) -> None:
        """Nothing is shown."""


def settings_of(method: str, granularity: Granularity = "layer", **other: Any) -> Settings:
    own = {"max_short_loss": 10.0, "validations": 2, "short_windows": 2, **other}
    return Settings(method, granularity, "linear", 32, 128, **own)


def run(stock: StockModel, settings: Settings, reporter: RememberingReporter) -> Outcome:
    problem = prepare_calibration(stock, TEXTS, settings, reporter, "commit")
    outcome = calibrate(problem)
    problem.journal.remove()
    return outcome


def same(first: Outcome, second: Outcome) -> bool:
    scales, others = first.scales.log_s, second.scales.log_s
    return (
        all(np.array_equal(scales[key], others[key]) for key in scales)
        and first.record.history == second.record.history
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmod-convert"


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mamba2", settings_of("gradient", "head", steps=7)),
        ("mamba", settings_of("gradient", "channel", steps=7)),
        ("bamba", settings_of("gradient", "head", steps=5)),
        ("mamba", settings_of("spsa", steps=5, probes=2)),
        ("mamba2", settings_of("spsa", steps=5, preset="paper")),
        ("mamba2", settings_of("constant")),
    ],
)
def test_a_killed_run_goes_on_to_the_same_scales(model_type: str, settings: Settings, cache: Path) -> None:
    stock = stock_model(model_type)
    expected = run(stock, settings, RememberingReporter())
    again = run(stock, settings, RememberingReporter())
    assert same(expected, again)
    assert expected.record.steps > 0 and not list(cache.iterdir())

    with pytest.raises(Killed):
        run(stock, settings, KillingReporter(3))
    assert len(list(cache.glob("*.journal"))) == 1
    reporter = RememberingReporter()
    resumed = run(stock, settings, reporter)
    assert any(line.startswith("Going on after step") for line in reporter.lines)
    assert same(expected, resumed)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("change", [{"seed": 1}, {"target_len": 96}, {"max_short_loss": 0.1}])
def test_another_setting_starts_afresh_and_leaves_the_journal_of_the_first(
    change: dict[str, Any], cache: Path
) -> None:
    stock, settings = stock_model("mamba2"), settings_of("gradient", steps=4)
    expected, other = (
        run(stock, chosen, RememberingReporter()) for chosen in (settings, replace(settings, **change))
    )
    with pytest.raises(Killed):
        run(stock, settings, KillingReporter(3))
    reporter = RememberingReporter()
    found = run(stock, replace(settings, **change), reporter)
    assert same(other, found) and not any(line.startswith("Going on") for line in reporter.lines)
    assert same(expected, run(stock, settings, reporter))
    assert any(line.startswith("Going on after step") for line in reporter.lines)


def test_journal_that_nobody_will_go_on_from_is_removed(cache: Path) -> None:
    first, second = (Journal({"verb": "convert", "seed": seed}, RememberingReporter()) for seed in (1, 2))
    first.save(lambda: {"step": 3})
    [old] = cache.iterdir()
    second.save(lambda: {"step": 4})
    assert first.resume() == {"step": 3}
    os.utime(old, (0, 0))
    Journal({"verb": "convert", "seed": 3}, RememberingReporter()).save(lambda: {"step": 5})
    assert first.resume() is None and second.resume() == {"step": 4}


def test_another_model_leaves_the_journal_alone(cache: Path) -> None:
    reporter = RememberingReporter()
    first, second = (Journal({"verb": "convert", "source": name}, reporter) for name in ("a", "b"))
    first.save(lambda: {"step": 3})
    assert second.resume() is None and not reporter.lines
    second.remove()
    assert first.resume() == {"step": 3}


def test_a_finished_calibration_is_not_repeated_until_its_result_is_safe(cache: Path) -> None:
    """The journal outlives the calibration: a conversion that is killed later goes on from the last step."""
    stock, settings = stock_model("mamba2"), settings_of("gradient", steps=4)
    problem = prepare_calibration(stock, TEXTS, settings, RememberingReporter(), "commit")
    expected = calibrate(problem)
    reporter = RememberingReporter()
    resumed = run(stock, settings, reporter)
    assert reporter.lines[1] == "Going on after step 4, where an interrupted run stopped."
    assert same(expected, resumed)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02."])
def test_a_damaged_journal_is_named_and_passed_over(content: bytes, cache: Path) -> None:
    reporter = RememberingReporter()
    journal = Journal({"verb": "convert", "source": "a"}, reporter)
    journal.save(lambda: {"step": 1})
    [path] = cache.iterdir()
    path.write_bytes(content)
    assert journal.resume() is None
    assert "cannot be read" in reporter.warnings[0]
    torch.save({"key": 3}, path)
    assert journal.resume() is None


def test_a_copy_that_is_not_installed_has_a_journal_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    Journal({"verb": "x", "source": "y"}, RememberingReporter())
    assert read_versions()["mmod-convert"] == converter.__version__


def test_a_journal_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    reporter = RememberingReporter()
    journal = Journal({"verb": "convert", "source": "a"}, reporter)
    journal.save(lambda: {"step": 1})
    journal.save(lambda: {"step": 2}, last=True)
    assert len(reporter.warnings) == 1 and "cannot be written" in reporter.warnings[0]


def test_writing_takes_a_small_part_of_the_time(cache: Path) -> None:
    journal = Journal({"verb": "convert", "source": "a"}, RememberingReporter())
    written: list[int] = []

    def state(step: int) -> dict[str, Any]:
        written.append(step)
        time.sleep(0.01)
        return {"step": step}

    for step in range(200):
        journal.save(lambda: state(step))  # noqa: B023
    assert written == [0]
    journal.save(lambda: state(200), last=True)
    assert written == [0, 200]


def test_the_same_command_after_a_kill_writes_the_same_scales(tmp_path: Path) -> None:
    model, text = tiny_folder("mamba2", tmp_path / "model"), novel(tmp_path, 12_000)
    command = [sys.executable, "-m", "converter", str(model), "--data", str(text), "--held-out", HELD_OUT_NOVEL]
    command += ["--train-len", "64", "--target-len", "512", "--steps", "40", "--max-short-loss", "1"]
    command += ["--windows", "0", "--overwrite"]

    def environment(name: str) -> dict[str, str]:
        return os.environ | {"XDG_CACHE_HOME": str(tmp_path / name), "OMP_NUM_THREADS": "1"}

    def start(name: str, output: str) -> subprocess.Popen[str]:
        words = [*command, "-o", str(tmp_path / output)]
        return subprocess.Popen(words, cwd=ROOT, env=environment(name), stderr=subprocess.PIPE, text=True)

    whole, killed = start("whole", "expected"), start("killed", "found")
    journals = tmp_path / "killed" / "mmod-convert"
    while killed.poll() is None and not list(journals.glob("*.journal")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "found").exists()
    assert whole.communicate()[1] is not None and whole.returncode == 0
    resumed = start("killed", "found")
    said = resumed.communicate()[1]
    assert resumed.returncode == 0, said
    assert "Going on after step" in said
    names = (SCALES_NAME, "model.safetensors")
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert (tmp_path / "found" / names[1]).read_bytes() != (model / names[1]).read_bytes()
    assert not [path for path in journals.rglob("*") if path.is_file()]
