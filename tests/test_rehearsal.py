"""What would fail at a conversion's end, or after its model is loaded, fails before that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter.commands.convert import convert
from converter.commands.requests import ConvertRequest
from converter.errors import CalibrationError, MmodError
from converter.reporting import Reporter
from tests.measured_models import demo_folder
from tests.tiny_folders import tiny_folder

ROOT = Path(__file__).parent.parent
NOVEL = ROOT / "converter" / "demo" / "texts" / "persuasion.txt"
HELD_OUT = NOVEL.with_name("northanger-abbey.txt")


def spoil_nothing(folder: Path) -> None:
    pass


def spoil_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "none"}}))


def spoil_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 16, "note": "\\ud83d"}')


@pytest.mark.parametrize(
    ("spoil", "text", "said"),
    [
        (spoil_tokenizer, "words", "cannot load the tokenizer"),
        (spoil_tokenizer_config, "words", "tokenizer_config.json is damaged: it holds half a character"),
        (spoil_nothing, '{"text": "half \\ud83d"}', "half a character"),
        (spoil_nothing, '{"words": "x"}', "no text field"),
    ],
)
def test_late_failures_come_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], text: str, said: str
) -> None:
    model = demo_folder("demo", tmp_path / "model")
    spoil(model)
    (tmp_path / "text.jsonl" if text.startswith("{") else tmp_path / "text.txt").write_text(text)
    (data,) = tmp_path.glob("text.*")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("calibrator.model.load_model", never)
    monkeypatch.setattr("converter.commands.convert.write_working_copy", never)
    request = ConvertRequest(str(model), tmp_path / "out", target_len=512, data=(str(data),), held_out=str(NOVEL))
    with pytest.raises(MmodError, match=said):
        convert(request, Reporter())
    assert {path.name for path in tmp_path.iterdir()} == {"model", data.name}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_damaged_weights_are_told_before_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    model = tiny_folder("mamba2", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 0 + value}, model / "model.safetensors")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the calibration begins")

    monkeypatch.setattr("calibrator.calibration.calibrate", never)
    request = ConvertRequest(
        str(model), tmp_path / "out", target_len=512, data=(str(NOVEL),), held_out=str(HELD_OUT)
    )
    said = "all the same" if value == 0 else "The weight lm_head.weight holds NaN or infinity"
    with pytest.raises(CalibrationError, match=said):
        convert(request, Reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
