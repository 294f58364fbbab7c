"""SPSA: the walk in log s, from losses alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibrator.calibration import calibrate, prepare_calibration
from calibrator.settings import Settings
from calibrator.text import Text
from tests.measured_models import random_tokens
from tests.stock_models import RememberingReporter, stock_model

TEXTS = [Text("text", (random_tokens(1, 3000)[0],))]


def test_a_target_of_the_training_length_is_walked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = Settings("spsa", "layer", "linear", 64, 64, steps=3, validations=3, short_windows=2)
    problem = prepare_calibration(stock_model("mamba2"), TEXTS, settings, RememberingReporter(), "commit")
    calibrate(problem)
    walked = [candidate.scales.log_s for candidate in problem.validation.candidates[1:]]
    assert len(walked) >= 3
    assert all(np.isfinite(value).all() and np.abs(value).min() > 0 for log_s in walked for value in log_s.values())
