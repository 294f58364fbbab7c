"""Whatever interrupts a run, the output's name stands for nothing or for a complete conversion."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import OutputError
from converter.interruption import Interrupted, end_on_signals, undisturbed
from converter.output import check_output, staged
from converter.reporting import Reporter
from converter.temporary import Held, lock, temporary_folder
from tests.conversions import convert
from tests.small_checkpoints import source, tensors, write_transformers
from tests.stock_models import RememberingReporter

ROOT = Path(__file__).parent.parent


def test_output_appears_whole_and_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output, overwrite=False) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not output.exists() and folder.parent == tmp_path
    assert (output / "sub" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_nothing_stays_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
        raise error()
    assert not any(tmp_path.iterdir())


def test_conversion_is_replaced_only_when_told_and_only_by_a_whole_one(tmp_path: Path) -> None:
    snapshot, output = source(write_transformers(tmp_path / "model")), tmp_path / "out"
    convert(snapshot, output)
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="exists already") as caught:
        convert(snapshot, output)
    assert "--overwrite" in caught.value.fix
    with pytest.raises(ValueError), staged(output, overwrite=True) as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    convert(snapshot, output, overwrite=True, target_len=1 << 20)
    assert (output / "tokenizer_config.json").read_bytes() != before["tokenizer_config.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/out", "does not exist"),
        ("file", "is no folder"),
        ("link", "is a link"),
        ("papers", "is no conversion of this tool"),
        ("model", "lie in one another"),
        ("model/out", "lie in one another"),
        ("model/../model", "lie in one another"),
        (".", "lie in one another"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_place_that_cannot_be_the_output_is_refused_early(
    tmp_path: Path, name: str, said: str, overwrite: bool
) -> None:
    model = write_transformers(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=said):
        check_output(tmp_path / name, overwrite, model)
    assert (tmp_path / "papers" / "thesis.tex").exists()


def test_empty_folder_is_taken_as_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()


def write_claiming(folder: Path, share: float) -> Path:
    """A checkpoint whose .bin file claims that share of the free disk; it holds one number, repeated."""
    write_transformers(folder, content={})
    (folder / "model.safetensors").unlink()
    count = int(share * shutil.disk_usage(folder).free) // 4
    torch.save({**tensors(), "backbone.huge": torch.zeros(1).expand(count)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(("options", "fits"), [((), True), (("--held-out", HELD_OUT_NOVEL), False)])
def test_conversion_asks_for_room_for_each_copy_of_the_weights(
    tmp_path: Path, options: tuple[str, ...], fits: bool
) -> None:
    folder = write_claiming(tmp_path / "model", 0.6)
    words = ["convert", str(folder), "--method", "constant", "--factor", "2", "--dry-run", "-q"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), *options])
    if fits:
        assert done.exit_code == 0, (done.output, done.exception)
    else:
        assert isinstance(done.exception, OutputError) and " free; " in done.exception.message


def test_second_run_on_one_output_is_told_and_the_first_is_unharmed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output, overwrite=True) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(OutputError, match="Another run is writing"), staged(output, overwrite=True):
            pytest.fail("two runs in one output")
        assert (folder / "file").read_text() == "first"
    assert (output / "file").read_text() == "first"


def test_of_many_runs_at_once_each_is_whole_or_told(tmp_path: Path) -> None:
    output, told, whole = tmp_path / "out", [], []

    def run(number: int) -> None:
        try:
            with staged(output, overwrite=True) as folder:
                (folder / "mmod.json").write_text(str(number))
                time.sleep(0.001)
            whole.append(number)
        except OutputError as error:
            told.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(whole) + len(told) == 16 and whole
    assert int((output / "mmod.json").read_text()) == whole[-1]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_stand_at_the_output_meanwhile_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "out"
    if overwrite:
        convert(source(write_transformers(tmp_path / "model")), output)
    with pytest.raises(OutputError, match="was left alone"), staged(output, overwrite) as folder:
        (folder / "mmod.json").write_text("new")
        if overwrite:
            shutil.rmtree(output)
        output.mkdir()
        (output / "thesis.tex").write_text("x")
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "out"}


@pytest.mark.parametrize(("name", "is_change"), [("notes.txt", False), ("config.json", True), (".git/HEAD", False)])
def test_what_was_added_or_changed_by_hand_is_not_replaced(tmp_path: Path, name: str, is_change: bool) -> None:
    snapshot, output = source(write_transformers(tmp_path / "model")), tmp_path / "out"
    convert(snapshot, output)
    convert(snapshot, output, overwrite=True)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"did not write: {name.partition('/')[0]}"):
        check_output(output, overwrite=True)
    (output / name).unlink()
    if not is_change:
        # It may come to lie there while a run is on.
        with pytest.raises(OutputError, match="was left alone"), staged(output, overwrite=True) as folder:
            (folder / "mmod.json").write_text("new")
            (output / name).write_text("mine")
        assert (output / name).read_text() == "mine" and (output / "model.safetensors").is_file()


def test_text_that_was_added_to_the_card_stays_when_a_conversion_is_replaced(tmp_path: Path) -> None:
    write_transformers(tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), "--method", "constant", "--factor", "2", "-q"]
    words += ["--output", str(tmp_path / "out"), "--windows", "0", "--overwrite"]
    card = tmp_path / "out" / "README.md"
    assert CliRunner().invoke(app, words).exit_code == 0
    card.write_text(card.read_text() + "\nMine.\n")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and card.read_text().count("Mine.") == 1, done.exception
    other = write_transformers(tmp_path / "other")
    refused = CliRunner().invoke(app, ["convert", str(other), *words[2:]]).exception
    assert isinstance(refused, OutputError) and "is about model" in refused.message and "Mine." in card.read_text()


def test_output_is_not_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is where you are"):
        check_output(Path("."), overwrite=True)


def test_read_only_conversion_is_replaced_without_an_error() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as work:
        os.chmod(work, 0o777)
        child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                if os.geteuid() == 0:
                    # Root may write to read-only folders.
                    os.setuid(65534)
                output = Path(work, "out")
                (output / "mmod").mkdir(parents=True)
                for name in ("mmod.json", "mmod/scales.safetensors"):
                    (output / name).write_text("old")
                (output / "mmod").chmod(0o555)
                output.chmod(0o555)
                with staged(output, overwrite=True) as folder:
                    (folder / "mmod.json").write_text("new")
                is_new = (output / "mmod.json").read_text() == "new"
                status = 0 if is_new and os.listdir(work) == ["out"] else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("kind", ["folders", "files as well"])
def test_file_system_without_locks_and_sync_is_used_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or kind != "folders":
            refuse()

    for call in ("fcntl.flock", "fcntl.ioctl", "os.posix_fadvise", "shutil.disk_usage"):
        monkeypatch.setattr(call, refuse)
    monkeypatch.setattr("os.fsync", sync)
    reporter = RememberingReporter()
    with staged(tmp_path / "out", overwrite=False, reporter=reporter) as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists() and len(list(tmp_path.iterdir())) == 1
    assert "nothing keeps a second run from the same output" in reporter.warnings[0]
    convert(source(write_transformers(tmp_path / "model")), tmp_path / "converted")


@pytest.mark.parametrize("call", ["os.fsync", "os.rename"])
def test_a_failing_disk_is_no_such_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as changed:
        changed.setattr(call, fail)
        failure = pytest.raises((OSError, OutputError), match=os.strerror(errno.EIO))
        with failure, staged(tmp_path / "out", False) as folder:
            (folder / "file").write_text("x")
    assert not any(tmp_path.iterdir())


def test_file_system_that_renames_no_folder_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("os.rename", refuse)
    refused = pytest.raises(OutputError, match="cannot be renamed: Invalid cross-device link")
    with refused, staged(tmp_path / "out", overwrite=False):
        raise AssertionError("something is written")
    assert not any(tmp_path.iterdir())


def test_error_of_writing_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"out\.mmod-partial/file"), staged(tmp_path / "out", False) as folder:
        (folder / "file").write_text("x")


def test_output_in_the_source_is_refused_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not tell capitals apart has a folder under several names."""
    model, other = write_transformers(tmp_path / "model"), tmp_path / "MODEL"
    other.mkdir()
    real = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda path, to: path == other or real(path, to))
    with pytest.raises(OutputError, match="lie in one another"):
        check_output(other / "out", False, model)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_does_not_disturb_the_clean_up(tmp_path: Path, second: signal.Signals) -> None:
    script = (
        "import os, shutil, signal, sys; from pathlib import Path\n"
        "from converter.interruption import Interrupted, end_on_signals; from converter.output import staged\n"
        "end_on_signals(); remove = shutil.rmtree\n"
        f"shutil.rmtree = lambda path: (os.kill(os.getpid(), {second:d}), remove(path))\n"
        "try:\n"
        "    with staged(Path(sys.argv[1]), overwrite=True) as folder:\n"
        "        (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGINT)\n"
        "except Interrupted as error:\n"
        "    sys.exit(error.number)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], cwd=ROOT)
    assert done.returncode == signal.SIGINT and not any(tmp_path.iterdir())


def test_signal_in_the_clean_up_waits_for_its_end() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    end_on_signals()
    done = False
    try:
        with pytest.raises(Interrupted, match="SIGTERM"), undisturbed(), undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            done = True
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert done


def test_signal_that_arrives_in_a_finalizer_ends_the_run() -> None:
    script = (
        "import os, signal, time; from converter.commands.ending import run_application\n"
        "class Watched:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "def work():\n"
        "    watched = Watched(); del watched; time.sleep(30)\n"
        "run_application(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "Interrupted; no incomplete output is left.\n"


@pytest.mark.parametrize(
    "work",
    ["print('done')", "raise SystemExit(2)", "raise ValueError"],
    ids=["complete", "refused", "failed"],
)
def test_signal_that_arrives_while_output_leaves_shows_no_traceback(work: str) -> None:
    script = (
        "import os, signal, sys; from converter.commands.ending import run_application\n"
        "class Slow:\n"
        "    def write(self, text): pass\n"
        "    def flush(self):\n"
        "        if not sent: sent.append(1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "sent = []; sys.stdout = Slow()\n"
        f"def work(): {work}\n"
        "run_application(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr
    assert done.stderr.endswith("Interrupted; no incomplete output is left.\n")


def test_temporary_folder_of_a_killed_run_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = (
        "import os, signal, sys, tempfile; from converter.temporary import temporary_folder\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "with temporary_folder() as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with temporary_folder() as running:
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
        with temporary_folder() as folder:
            assert {path for path in tmp_path.iterdir() if path.is_dir()} == {running, folder}
    assert not any(tmp_path.iterdir())


def test_lock_that_another_run_clears_away_is_taken_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken: list[Path] = []

    def lose_the_first(path: Path, reporter: Reporter) -> AbstractContextManager[bool]:
        taken.append(path)
        if len(taken) == 1:
            raise Held
        return lock(path, reporter)

    monkeypatch.setattr("converter.temporary.lock", lose_the_first)
    with temporary_folder() as folder:
        assert folder.is_dir() and len(set(taken)) == 2
    assert not any(tmp_path.iterdir())


def test_machine_without_a_place_for_temporary_folders_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(OutputError, match="no place for a temporary folder") as refused, temporary_folder():
        pytest.fail("there is no place")
    assert "TMPDIR" in refused.value.fix


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path: Path) -> None:
    output = tmp_path / "out"
    script = (
        "import os, signal, sys; from pathlib import Path; from converter.output import staged\n"
        "with staged(Path(sys.argv[1]), overwrite=True) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(output)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists() and len(list(tmp_path.iterdir())) == 2
    with staged(output, overwrite=False) as folder:
        assert not any(folder.iterdir())
    assert list(tmp_path.iterdir()) == [output]


def test_conversion_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.mmod-replaced"
    aside.mkdir()
    (aside / "mmod.json").write_text("old")
    with pytest.raises(OutputError, match="exists already"), staged(tmp_path / "out", overwrite=False):
        pytest.fail("the old conversion was forgotten")
    assert (tmp_path / "out" / "mmod.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_at_ten_random_moments_nothing_half_is_ever_seen() -> None:
    seed = str(time.time_ns())
    soak = subprocess.run(
        [sys.executable, "-m", "benchmarks.crash_soak", "--rounds", "10", "--seed", seed],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert soak.returncode == 0, f"seed {seed}: {soak.stderr}"
    assert "killed" in soak.stdout or "interrupted" in soak.stdout


@pytest.mark.parametrize("limit", [100, 3_000, 8_000, 15_000])
def test_disk_that_fills_up_leaves_nothing(tmp_path: Path, limit: int) -> None:
    model = write_transformers(tmp_path / "model")
    assert (model / "model.safetensors").stat().st_size > 15_000
    pid = os.fork()
    if pid == 0:
        # A file may not grow past the limit: writing fails as it does on a full disk, in the middle of a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            convert(source(model), tmp_path / "out")
        except OutputError as error:
            os._exit(7 if "takes no file as large" in error.message else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
