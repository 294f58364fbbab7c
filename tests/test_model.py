"""Loading with stock transformers: no code of a checkpoint runs, and what cannot be loaded is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.errors import CalibrationError
from tests.measured_models import load
from tests.tiny_folders import tiny_folder


def change_json(path: Path, **values: Any) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_of_a_checkpoint_is_not_run_whatever_the_terminal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder("mamba2", tmp_path / "model")
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    change_json(folder / "config.json", model_type="weird", auto_map={"AutoConfig": "own_code.Own"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(CalibrationError, match="contains custom code") as caught:
        load(folder, trust_a_log=True)
    assert "not run" in caught.value.fix and not (tmp_path / "trace").exists()


def test_an_architecture_that_stock_transformers_lacks_is_named(tmp_path: Path) -> None:
    folder = tiny_folder("mamba2", tmp_path / "model")
    change_json(folder / "config.json", model_type="weird")
    with pytest.raises(CalibrationError, match="model type `weird`"):
        load(folder, trust_a_log=True)


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_A_log_is_that_of_the_weights_that_are_loaded(tmp_path: Path, shard_size: str) -> None:
    folder = tiny_folder("mamba2", tmp_path / "model", shard_size)
    honest = load(folder)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    changed = {name: tensor + 1 if name.endswith("A_log") else tensor for name, tensor in tensors.items()}
    for name in ("model_ema.safetensors", "a.safetensors"):
        save_file(changed, folder / name, metadata={"format": "pt"})
    found = load(folder)
    assert (folder / "model.safetensors").is_file() == (shard_size == "1GB")
    for key, A_log in found.A_log.items():
        assert torch.equal(A_log, honest.A_log[key])
        assert torch.equal(A_log, found.mixers[key].get_parameter("A_log"))
