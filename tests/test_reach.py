"""``--target-len auto``: the stated length is the longest in which facts a training length back are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from calibrator.evaluation.memory import lowest, measure_reach
from calibrator.evaluation.recall import Cell
from calibrator.settings import Settings
from calibrator.skills import Skills
from calibrator.text import Text
from converter.commands.cli import app
from converter.errors import CalibrationError, MmodError, UsageError
from converter.manifest import Manifest
from converter.reporting import Reporter
from converter.scales import ScaleSet
from tests.measured_models import random_tokens
from tests.stock_models import stock_model

QUICK = ("--train-len", "128", "--windows", "0", "--max-short-loss", "0.5", "-q")


def test_length_is_that_of_the_last_text_in_which_facts_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.commands.convert.DEMO_TARGET", 256)
    monkeypatch.setattr("calibrator.skills.PROMPTS_ON_CPU", 6)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", "demo:recall", "--target-len", "auto", "--steps", "2", *QUICK])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "demo-recall-scaled-hf"
    manifest = Manifest.read(folder)
    assert manifest is not None and manifest.calibration is not None and manifest.calibration.reach is not None
    reach = manifest.calibration.reach
    assert (reach.kind, reach.distance, reach.lengths) == ("pass key", 128, [256, 512, 1024])
    assert reach.samples == 16 and min(reach.found) >= 12 and 0.5 <= reach.low < 1
    assert manifest.length == 1024 and manifest.calibration.calibrated_len == 256
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 1024
    card = (folder / "README.md").read_text()
    assert "for text of up to 1k tokens" in card and "remembers 128 tokens back at any length up to 1k" in card
    assert f"{reach.found[-1]} in 1k" in card and f"at least {reach.low:.0%} in the longest" in card
    assert "--target-len auto" in manifest.command
    verified = CliRunner().invoke(app, ["verify", str(folder), "-q"])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize(("right", "lengths"), [((16, 13, 9, 16), [16, 32]), ((16, 16, 16, 16), [16, 32, 64, 128])])
def test_doubling_ends_where_facts_are_lost(
    right: tuple[int, ...], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, source = stock_model("mamba2"), Text("random", (random_tokens(1, 400)[0],))
    shares = iter(right)

    def measure(
        _stock: object, _source: object, kinds: tuple[str], places: dict[int, tuple[int]], *_: object
    ) -> list[Cell]:
        [(length, [distance])] = places.items()
        return [Cell(kinds[0], length, distance, (torch.arange(16) < next(shares)).double(), torch.zeros(16))]

    monkeypatch.setattr("calibrator.evaluation.memory.measure_recall", measure)
    ones = torch.ones(16, dtype=torch.float64)
    settings = Settings("gradient", "layer", "linear", 8, 32)
    skills = Skills(stock, None, 8, 32, Reporter())  # type: ignore[arg-type]
    skills.cells = [Cell("pass key", 8, 4, ones, ones)]
    scales = ScaleSet.ones({key: tuple(values.shape) for key, values in stock.A_log.items()}, "layer", "linear")
    reach = measure_reach(stock, scales, source, skills, settings, Reporter())
    assert reach.lengths == lengths and reach.found == list(right[: len(lengths)])
    # Wilson's interval with z = 1.645.
    last = Cell("pass key", 8, 4, (torch.arange(16) < reach.found[-1]).double(), ones)
    assert reach.low == pytest.approx(lowest(last), abs=1e-4)
    assert lowest(skills.cells[0]) == pytest.approx(16 / (16 + 1.645**2))
    shares = iter((9,))
    with pytest.raises(CalibrationError, match="facts 8 back are not found"):
        measure_reach(stock, scales, source, skills, settings, Reporter())


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("demo",), CalibrationError, "Recall could not be judged"),
        (("demo", "--push"), UsageError, "default name"),
        (("demo", "--method", "winsorize"), UsageError, "no length"),
    ],
)
def test_what_gives_no_length_is_refused_before_a_calibration(
    words: tuple[str, ...], error: type[MmodError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("converter.commands.convert.DEMO_TARGET", 256)
    monkeypatch.setattr("calibrator.skills.PROMPTS_ON_CPU", 6)
    done = CliRunner().invoke(app, ["convert", *words, "--target-len", "auto", *QUICK])
    assert isinstance(done.exception, error) and said in done.exception.message
    assert not list(tmp_path.iterdir())
