"""A disk that is full, becomes full or is read-only: one error that names it, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from calibrator.journal import Journal
from converter.commands.cli import app
from converter.disk import disk_of, full_disk_named, require_file_size, require_space, size_name, write_whole
from converter.errors import OutputError
from converter.layouts import read_checkpoint
from converter.scales_file import save_scales
from converter.temporary import temporary_folder
from tests.small_checkpoints import random_scales, source, write_transformers
from tests.stock_models import RememberingReporter

ROOT = Path(__file__).parent.parent


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """A file may not grow past the limit: writing fails as it does on a full disk, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [1, 100, 1_000, 8_000])
def test_bake_on_a_full_disk_names_it_whatever_it_was_writing(tmp_path: Path, limit: int) -> None:
    model = write_transformers(tmp_path / "model")
    checkpoint = read_checkpoint(source(model))
    (tmp_path / "scales").mkdir()
    scales = random_scales({name: tensor.shape for name, tensor in checkpoint.A_log.items()})
    save_scales(tmp_path / "scales", scales, checkpoint.A_log)
    words = ["bake", str(model), str(tmp_path / "out"), "--scales", str(tmp_path / "scales"), "-q"]
    with files_of_at_most(limit):
        error = CliRunner().invoke(app, words).exception
    assert isinstance(error, OutputError)
    assert f"The disk at {disk_of(tmp_path)} takes no file as large as that" in error.message
    assert "another file system" in error.fix
    assert {path.name for path in tmp_path.iterdir()} == {"model", "scales"}


def test_full_disk_of_temporary_folders_is_told_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(OutputError, match="takes no file as large") as full,
        temporary_folder() as folder,
        files_of_at_most(10),
    ):
        (folder / "file").write_bytes(bytes(100))
    assert "TMPDIR" in full.value.fix and not any(tmp_path.iterdir())


def test_disk_without_room_is_named(tmp_path: Path) -> None:
    said = f"The disk at {disk_of(tmp_path)} has no room left"
    with pytest.raises(OutputError, match=said) as full, full_disk_named(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.fix.startswith("Free some space")


def test_largest_file_is_tried_before_anything_is_written(tmp_path: Path) -> None:
    require_file_size(tmp_path, 1 << 40)
    with files_of_at_most(8_000), pytest.raises(OutputError, match="takes no file as large as that"):
        require_file_size(tmp_path, 8_001)
    with pytest.raises(OutputError, match="takes no file as large as that"):
        require_file_size(tmp_path, (1 << 63) - 1)
    assert not any(tmp_path.iterdir())


def test_room_is_told_in_fitting_units(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(OutputError, match=rf"The disk at {disk_of(tmp_path)} has .*; 1000000000\.0 GB are needed"):
        require_space(tmp_path, 10**18)
    assert [size_name(size) for size in (0, 12_300, 7_600_000)] == ["0 B", "12.3 kB", "7.6 MB"]


@pytest.mark.parametrize("limit", [0, 10])
def test_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, limit: int) -> None:
    path = write_whole(tmp_path / "sub" / "file", b"old")
    with files_of_at_most(limit), pytest.raises(OutputError, match="cannot be written"):
        write_whole(path, bytes(100))
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_pipe_or_link_to_write_to_stays_one(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("file")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        write_whole(path, b"new")
    assert os.read(reader, 9) == b"new" and pipe.is_fifo()
    assert link.is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    os.close(reader)


def test_error_of_writing_is_not_hidden_by_one_of_cleaning_up(tmp_path: Path) -> None:
    """On a read-only disk both fail, and so they do below a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="below cannot be written"):
        write_whole(tmp_path / "file" / "below", b"")


def test_journal_that_finds_the_disk_full_leaves_no_part_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, reporter = tmp_path / "mmod-convert", RememberingReporter()
    Journal({"seed": 1}, reporter).save(lambda: {"step": 1})
    with files_of_at_most(5_000):
        Journal({"seed": 2}, reporter).save(lambda: {"step": 1, "factors": torch.zeros(100_000)})
    assert [path.suffix for path in folder.iterdir()] == [".journal"]
    assert "cannot be written" in reporter.warnings[-1]


def test_part_of_a_journal_of_a_killed_run_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = tmp_path / "mmod-convert" / "mmod-0123456789abcdef.17.partial"
    left.parent.mkdir()
    left.touch()
    os.utime(left, (0, 0))
    Journal({"seed": 1}, RememberingReporter()).save(lambda: {"step": 1})
    assert [path.suffix for path in left.parent.iterdir()] == [".journal"]


def test_pictures_without_a_cache_say_nothing() -> None:
    script = "from hub_cards.drawing import *\nwith style(): png_bytes(new_figure()[0])"
    home = {"HOME": "/dev/null", "MPLCONFIGDIR": "/dev/null/matplotlib"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | home, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_file_system_that_makes_no_file_of_a_length_is_found_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="Operation not supported") as caught:
        require_file_size(tmp_path, 1)
    assert caught.value.filename == str(tmp_path)
