"""Kernels from the Hub: asked about once, pinned, and called by stock code as if their packages were installed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2

from calibrator.kernels import (
    LOADED,
    add_hub_kernels,
    kernel_functions,
    missing_kernels,
    packages_of,
    require_kernels,
)
from calibrator.recurrence import Recurrence
from converter.commands.console import Console
from converter.commands.provenance import read_versions
from converter.errors import CalibrationError
from tests.hub_server import HubServer
from tests.kernels_package import write_kernels, write_kernels_package
from tests.stock_models import RememberingReporter, stock_model

FIRST, LATER = "a" * 40, "b" * 40
NAMES = ("mamba_ssm", "causal_conv1d", "kernels")


class Asked(RememberingReporter):
    """Answers every question the same way."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self.questions: list[str] = []

    def agrees(self, question: str) -> bool:
        self.questions.append(question)
        return self.answer


@pytest.fixture
def kernels(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with kernels, of which this machine has none."""
    write_kernels_package(tmp_path / "path")
    for commit in (FIRST, LATER):
        write_kernels(tmp_path / "stand-ins", commit)
    for name, branch in (("mamba-ssm", "v4"), ("causal-conv1d", "v1")):
        hub.kernels[f"kernels-community/{name}"] = {branch: FIRST}
    monkeypatch.setenv("STAND_IN_KERNELS", str(tmp_path / "stand-ins"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    for name in kernel_functions(modeling_mamba2):
        monkeypatch.setattr(modeling_mamba2, name, getattr(modeling_mamba2, name))
    forget()
    yield hub
    forget()


def forget() -> None:
    """As a new process is."""
    LOADED.clear()
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES or name.startswith("_kernel_")]:
        del sys.modules[name]


def add(reporter: RememberingReporter, agreed: bool = False) -> None:
    add_hub_kernels(modeling_mamba2, missing_kernels(packages_of(modeling_mamba2)), agreed, reporter)


def test_they_are_asked_about_once_and_pinned(kernels: HubServer, tmp_path: Path) -> None:
    first = Asked(True)
    add(first)
    (question,) = first.questions
    assert "kernels-community/causal-conv1d and kernels-community/mamba-ssm" in question
    pins = json.loads((tmp_path / "cache" / "mmod-convert" / "kernels.json").read_text())
    assert pins == dict.fromkeys(kernels.kernels, FIRST)
    forget()
    for branches in kernels.kernels.values():
        branches.update(dict.fromkeys(branches, LATER))
    kernels.log.clear()
    later = Asked(False)
    add(later)
    assert not later.questions and not kernels.log
    require_kernels(packages_of(modeling_mamba2), torch.device("cuda"), later)
    told = f"causal-conv1d (kernels-community/causal-conv1d@{FIRST})"
    assert told in later.lines[0] and read_versions()["mamba-ssm"] == f"kernels-community/mamba-ssm@{FIRST}"


def test_damaged_pins_are_asked_about_anew(kernels: HubServer, tmp_path: Path) -> None:
    pins = tmp_path / "cache" / "mmod-convert" / "kernels.json"
    pins.parent.mkdir(parents=True)
    pins.write_text('{"kernels-comm')
    asked = Asked(True)
    add(asked)
    assert len(asked.questions) == 1 and json.loads(pins.read_text()) == dict.fromkeys(kernels.kernels, FIRST)


def test_stock_code_and_the_recurrence_call_them(kernels: HubServer) -> None:
    stock = stock_model("mamba2")
    tokens = torch.arange(40)[None]
    with stock.recurrence:
        expected = stock.hidden_states(tokens)
    reporter = Asked(False)
    add(reporter, agreed=True)
    assert not reporter.questions and not missing_kernels(packages_of(modeling_mamba2))
    # The stand-in for mamba-ssm has no fused mixer.
    assert ["mamba2_split_conv1d_scan_combined" in warning for warning in reporter.warnings] == [True]
    called = sys.modules["causal_conv1d"].CALLED, sys.modules["mamba_ssm"].ops.triton.plain.CALLED
    with Recurrence(stock.model, stock.mixers, kernels=True) as recurrence:
        torch.testing.assert_close(stock.hidden_states(tokens), expected, atol=1e-4, rtol=1e-4)
        layers = len(stock.mixers)
        assert called == (["causal_conv1d_fn"] * layers, ["mamba2_chunk_scan"] * layers)
        with recurrence.carried(None) as state:
            stock.hidden_states(tokens[:, :20])
        with recurrence.carried(state):
            torch.testing.assert_close(stock.hidden_states(tokens[:, 20:]), expected[:, 20:], atol=1e-4, rtol=1e-4)
    assert len(called[1]) == 3 * layers


def test_without_consent_nothing_is_loaded_and_the_line_is_named(kernels: HubServer, tmp_path: Path) -> None:
    add(Asked(False))
    assert not kernels.log and not (tmp_path / "cache").exists()
    with pytest.raises(CalibrationError, match="kernels are missing") as caught:
        require_kernels(packages_of(modeling_mamba2), torch.device("cuda"))
    assert "pip install kernels einops   # then the same command with --hub-kernels" in caught.value.fix


def test_what_the_hub_does_not_have_is_said(kernels: HubServer, tmp_path: Path) -> None:
    kernels.kernels["kernels-community/mamba-ssm"] = {"v4": "c" * 40}
    with pytest.raises(CalibrationError, match="mamba-ssm cannot be used: Cannot find a build variant") as caught:
        add(Asked(True))
    assert "--allow-slow" in caught.value.fix and not (tmp_path / "cache").exists()
    kernels.kernels["kernels-community/mamba-ssm"] = {"v9": FIRST}
    with pytest.raises(CalibrationError, match="has no v4"):
        add(Asked(True))


@pytest.mark.parametrize(
    ("typed", "is_terminal", "agreed"), [("y\n", True, True), ("n\n", True, False), ("y\n", False, False)]
)
def test_only_a_terminal_is_asked(
    typed: str, is_terminal: bool, agreed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert Console().agrees("Run it?") is agreed
