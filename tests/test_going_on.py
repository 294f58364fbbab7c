"""Whatever fails after a calibration, the same command goes on from there, and the error says so."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.commands.ending import _explain
from converter.errors import VerificationError
from converter.interruption import Interrupted
from converter.manifest import Manifest
from converter.scales import ScaleSet
from tests.tiny_folders import novel, tiny_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmod-convert"


def convert(model: Path, output: Path) -> Any:
    text = novel(output.parent, 24_000)
    words = ["convert", str(model), "--output", str(output), "--data", str(text), "--windows", "0", "-q"]
    words += ["--held-out", str(model / "held-out.txt")]
    (model / "held-out.txt").write_text(text.read_text()[::-1])
    method = ["--method", "spsa", "--steps", "2", "--target-len", "256", "--train-len", "32"]
    return CliRunner().invoke(app, [*words, *method, "--max-short-loss", "10"])


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("calibrator.calibration.Outcome.sentences", LookupError("never seen")),
        ("calibrator.comparison.measure_baseline", MemoryError("no room for the table")),
        ("converter.commands.convert.bake", OSError(5, "Input/output error")),
        ("converter.commands.convert.verify", VerificationError("Not what it should be.")),
        ("converter.commands.convert.write_card", Interrupted(signal.SIGTERM)),
        ("converter.output._put_in_place", LookupError("never seen")),
    ],
)
def test_same_command_goes_on_after_an_error_behind_the_calibration(
    where: str,
    error: BaseException,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    model, output = tiny_folder("mamba2", tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patch, suppress(Interrupted):
        patch.setattr(where, fail)
        assert convert(model, output).exception is error
    assert not output.exists()
    _explain(error)
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert line == "Start the same command again: the calibration goes on where it stopped."
    with monkeypatch.context() as patch:
        # A step that is taken again would be an error.
        patch.setattr("calibrator.methods.spsa._slopes", fail)
        done = convert(model, output)
    assert done.exit_code == 0, done.exception
    manifest = Manifest.read(output)
    assert manifest is not None and manifest.calibration is not None
    assert len(manifest.changed) == 2 and not any(cache.iterdir())
    other = tmp_path / "other"
    assert convert(model, other).exit_code == 0
    found, expected = ScaleSet.load(str(output)), ScaleSet.load(str(other))
    assert all(np.array_equal(found.log_s[name], expected.log_s[name]) for name in expected.log_s)


@pytest.mark.parametrize(("factor", "code", "said"), [("1", 3, "Every factor is 1"), ("1000", 0, "is higher")])
def test_conversion_that_gains_nothing_has_a_status_of_its_own_and_a_worse_one_a_warning(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], factor: str, code: int, said: str
) -> None:
    model = tiny_folder("mamba2", tmp_path / "model")
    words = ["convert", str(model), "--method", "constant", "--factor", factor, "--output", str(tmp_path / "out")]
    words += ["--held-out", str(novel(tmp_path, 6000)), "--target-len", "256", "--train-len", "64", "-q"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code, done.exception
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and (manifest.scales_nothing, manifest.is_worse) == (code == 3, code == 0)
    assert said in capfd.readouterr().err + done.output


def test_nothing_is_kept_of_a_run_that_is_done(cache: Path, tmp_path: Path) -> None:
    done = convert(tiny_folder("mamba2", tmp_path / "model"), tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert not any(cache.iterdir())


@pytest.mark.parametrize("fault", ["no folder", "full"])
def test_factors_are_kept_beside_the_output_where_the_cache_takes_none(
    fault: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError("never seen")

    def full(content: Any, path: Path) -> None:
        if path.is_relative_to(cache):
            path.write_bytes(b"part")
            raise OSError(28, "No space left on device")
        save(content, path)

    save = torch.save
    if fault == "full":
        monkeypatch.setattr("calibrator.journal.torch.save", full)
    else:
        cache.parent.write_text("no folder")
    model, output = tiny_folder("mamba2", tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("converter.commands.convert.bake", fail)
        failed = convert(model, output)
    assert isinstance(failed.exception, LookupError)
    said = "".join(failed.output.split())
    assert said.count("cannotbewritten") == 1 and "itgoesto/" in said
    _explain(failed.exception)
    assert "the calibration goes on where it stopped" in capsys.readouterr().err
    assert len(list(tmp_path.glob("mmod-*.journal"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("calibrator.methods.spsa._slopes", fail)
        done = convert(model, output)
    assert done.exit_code == 0, done.exception
    assert not list(tmp_path.glob("mmod-*")) and not list(cache.glob("*"))


def test_cache_that_cannot_be_written_is_no_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    done = convert(tiny_folder("mamba2", tmp_path / "model"), tmp_path / "out")
    assert done.exit_code == 0, done.exception
