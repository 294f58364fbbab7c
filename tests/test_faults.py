"""Exceptions in place of calls to others: the user sees no traceback, whatever and wherever they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import Injector, Outcome, run

ROOT = Path(__file__).parent.parent


def test_random_faults_end_in_a_message_or_not_at_all() -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--rounds", "6", "--verbs", "inspect,bake,verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error" in done.stdout


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(1, "Error: it is so\n", {}, True, False), ""),
        (Outcome(1, "Traceback (most recent call last):\n", {}, True, False), "traceback"),
        (Outcome(1, "", {}, True, False), "silence"),
        (Outcome(-9, "", {}, True, False), "exit code -9"),
        (Outcome(1, "Error: it is so\n", {}, True, True), "lost calibration"),
        (Outcome(1, "Error: it is so\nStart the same command again.\n", {}, True, True), ""),
    ],
)
def test_what_counts_as_a_failure(outcome: Outcome, fault: str) -> None:
    assert outcome.fault == fault


def test_injected_exception_strikes(tmp_path: Path) -> None:
    words = ["inspect", str(ROOT / "converter" / "demo" / "models" / "tiny-mamba2-256")]
    places = run(words, Injector(), tmp_path).counts
    place = next(place for place in places if "safetensors_file.py" in place)
    outcome = run(words, Injector(place, 1, "unforeseen"), tmp_path)
    assert outcome.struck and outcome.code == 1 and outcome.said.startswith("Error: "), outcome
    assert not outcome.fault
