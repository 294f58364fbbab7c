"""Several processes that calibrate together: the real command under torchrun, with gloo on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrator.calibration import prepare_calibration
from calibrator.distributed import Ranks
from calibrator.evaluation.recall import Cell
from calibrator.methods.gradient import _short_step
from calibrator.settings import Settings
from calibrator.text import Text
from converter.commands.console import Console
from converter.commands.convert import convert, for_processes
from converter.commands.requests import ConvertRequest
from converter.errors import UsageError
from converter.reporting import Reporter
from converter.scales import ScaleSet
from tests.measured_models import random_tokens
from tests.stock_models import stock_model

NOVELS = Path(__file__).parent.parent / "converter" / "demo" / "texts"


def test_a_size_without_the_others_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="WORLD_SIZE is 4, and RANK, MASTER_ADDR, MASTER_PORT not set") as caught:
        convert(ConvertRequest("demo", output=tmp_path / "out", dry_run=True), Console(quiet=True))
    assert "torchrun" in caught.value.fix


def test_two_processes_find_the_scales_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = {"persuasion.txt": 40_000, "northanger-abbey.txt": 25_000}
    for name, size in texts.items():
        (tmp_path / name).write_text((NOVELS / name).read_text()[:size])
    calibration, held_out = (str(tmp_path / name) for name in texts)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["converter", "demo", "--train-len", "64", "--target-len", "256", "--steps", "4", "--windows", "1"]
    command += [
        "--device",
        "cpu",
        "--max-short-loss",
        "0.5",
        "--data",
        calibration,
        "--held-out",
        held_out,
        "-o",
        str(tmp_path / "together"),
        "--json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    together = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("Calibrating") == 1
    assert json.loads(together.stdout)["output"] == str(tmp_path / "together")
    manifest = json.loads((tmp_path / "together" / "mmod.json").read_text())
    assert "--streams 2" in manifest["command"]

    request = ConvertRequest(
        "demo",
        output=tmp_path / "alone",
        train_len=64,
        target_len=256,
        steps=4,
        max_short_loss=0.5,
        windows=1,
        device="cpu",
        data=(calibration,),
        held_out=held_out,
        streams=2,
    )
    convert(request, Console(quiet=True))
    found, expected = (ScaleSet.load(str(tmp_path / name)) for name in ("together", "alone"))
    for key, log_s in expected.log_s.items():
        np.testing.assert_allclose(found.log_s[key], log_s, atol=2e-5)
    assert max(abs(log_s).max() for log_s in expected.log_s.values()) > 1e-3


def test_windows_are_shared_out_whole() -> None:
    windows = torch.arange(12).reshape(6, 2)
    shares = [Ranks(rank, 3).rows(windows) for rank in range(3)]
    assert sorted(map(tuple, torch.cat(shares).tolist())) == list(map(tuple, windows.tolist()))
    assert {len(share) for share in shares} == {2}
    settings = Settings("gradient", "layer", "linear", 256, 512, short_windows=8, streams=1)
    split = settings.split_over(Ranks(0, 3))
    assert (split.streams, split.short_windows) == (3, 9)
    assert settings.split_over(Ranks()) == settings


def test_what_does_not_go_with_several_processes_is_refused() -> None:
    with pytest.raises(UsageError):
        for_processes(ConvertRequest("demo", method="winsorize"), Ranks(0, 2))


def test_processes_together_learn_from_planted_facts_as_one_does() -> None:
    stock, settings = stock_model("mamba2"), Settings("gradient", "head", "linear", 128, 256, short_windows=4)
    text = Text("numbers", (random_tokens(1, 6000)[0],))

    def gradients(ranks: Ranks) -> list[Tensor]:
        problem = prepare_calibration(stock, [text], settings, Reporter(), "commit")
        problem.skills.cells = [Cell("random span", 128, 16, torch.ones(1), torch.ones(1))]
        problem = replace(problem, ranks=ranks)
        with problem.scaling, stock.recurrence:
            _short_step(problem, 1.0)
            return [
                parameter.grad.clone() for parameter in problem.scaling.parameters() if parameter.grad is not None
            ]

    alone, shares = gradients(Ranks()), [gradients(Ranks(rank, 2)) for rank in (0, 1)]
    assert max(float(gradient.abs().max()) for gradient in alone) > 0
    for whole, first, second in zip(alone, *shares, strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-7)
