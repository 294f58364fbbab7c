"""Windows with hard line ends, made of a text that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrator.line_ends import LINE, unwrap, wrapped
from calibrator.model import StockModel
from converter.commands.opening import CALIBRATION_NOVEL
from tests.measured_models import demo_folder, load


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StockModel:
    return load(demo_folder("demo", tmp_path_factory.mktemp("demo") / "model"))


@pytest.fixture(scope="module")
def windows(stock: StockModel) -> Tensor:
    """Four windows of 256 tokens of a novel in one line."""
    content = unwrap(Path(CALIBRATION_NOVEL).read_text(encoding="utf-8"))
    return torch.tensor(stock.tokenizer(content[:20_000]).input_ids[: 4 * 256]).view(4, 256)


def test_wrapped_windows_are_the_same_text_in_lines(stock: StockModel, windows: Tensor) -> None:
    lines = wrapped(windows, stock)
    assert lines.shape == windows.shape and lines.dtype == windows.dtype
    for row, old in zip(stock.tokenizer.batch_decode(lines), stock.tokenizer.batch_decode(windows), strict=True):
        assert row.count("\n") >= 8 and max(map(len, row.splitlines())) <= LINE
        assert unwrap(old).startswith(unwrap(row)[:-8])


def test_unknown_tokens_and_models_without_a_tokenizer_leave_windows_as_they_are(
    stock: StockModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StockModel, "rows", 5)
    assert torch.equal(wrapped(windows, stock), windows)
    monkeypatch.setattr(stock, "tokenizer", None)
    assert torch.equal(wrapped(windows, stock), windows)
