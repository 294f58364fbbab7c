"""What would fail at a conversion's end, or after its model is loaded, fails before that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.commands.convert import convert
from converter.commands.requests import ConvertRequest
from converter.errors import MmodError
from converter.reporting import Reporter
from tests.measured_models import demo_folder

ROOT = Path(__file__).parent.parent
NOVEL = ROOT / "converter" / "demo" / "texts" / "persuasion.txt"


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
        (spoil_tokenizer_config, "words", "cannot be written"),
        (spoil_nothing, '{"text": "half \\ud83d"}', "half a character"),
        (spoil_nothing, '{"words": "x"}', "no text field"),
        (spoil_nothing, "far <beyond>", "'<beyond>' with the id"),
    ],
)
def test_late_failures_come_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], text: str, said: str
) -> None:
    model = demo_folder("demo", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 1 << 20, "content": "<beyond>", "special": True, **flags})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    spoil(model)
    (tmp_path / "text.jsonl" if text.startswith("{") else tmp_path / "text.txt").write_text(text)
    (data,) = tmp_path.glob("text.*")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("calibrator.model.load_model", never)
    monkeypatch.setattr("converter.commands.convert.write_working_copy", never)
    monkeypatch.setattr("converter.commands.convert.check_finite", never)
    request = ConvertRequest(str(model), tmp_path / "out", target_len=512, data=(str(data),), held_out=str(NOVEL))
    with pytest.raises(MmodError, match=said):
        convert(request, Reporter())
    assert {path.name for path in tmp_path.iterdir()} == {"model", data.name}
