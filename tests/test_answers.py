"""What a command prints where: its answer on stdout, all else on stderr, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from converter.commands.console import Console
from tests.small_checkpoints import CONFIG, write_transformers

ROOT = Path(__file__).parent.parent
MMOD = "import sys; from converter.commands.cli import main; sys.argv[0] = 'mmod'; main()"


def mmod(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``mmod`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MMOD, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and a conversion of it."""
    work = tmp_path_factory.mktemp("answers")
    model = write_transformers(work / "model")
    done = mmod("convert", model, "--method", "constant", "--factor", "1.5", "-o", work / "out", "-q")
    assert done.returncode == 0, done.stderr
    return model, work / "out"


def test_answers_are_on_stdout_and_not_silenced(folders: tuple[Path, Path]) -> None:
    model, out = folders
    told = mmod("inspect", model, "-q")
    assert told.returncode == 0 and told.stderr == ""
    assert "mamba2 in the transformers layout" in told.stdout
    # Where no terminal is, no cell is cut.
    assert "backbone.layers.0.mixer.A_log" in told.stdout and "…" not in told.stdout
    proved = mmod("verify", out, "--base", model, "--no-load", "-q")
    assert proved.returncode == 0 and proved.stderr == ""
    assert "Proved against model" in proved.stdout and "Not proved: That stock" in proved.stdout
    as_json = mmod("verify", out, "--base", model, "--no-load", "--json")
    assert json.loads(as_json.stdout)["base"] == "model" and "Proved against" in as_json.stderr


def test_what_cannot_be_converted_has_a_status_of_its_own(tmp_path: Path) -> None:
    model = write_transformers(tmp_path / "model", config={**CONFIG, "model_type": "gpt2"})
    told = mmod("inspect", model)
    assert told.returncode == 1 and "It cannot be converted" in told.stdout
    as_json = mmod("inspect", model, "--json")
    assert as_json.returncode == 1 and "gpt2" in json.loads(as_json.stdout)["obstacle"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("inspect", "./nowhere"), 1, "There is no folder ./nowhere"),
        (("verify", "demo"), 1, "mmod.json"),
        (("inspect", "demo", "--revision", "x"), 2, "no --revision"),
        (("inspect", "--no-such-option"), 2, "command line"),
    ],
)
def test_errors_under_json_are_json(words: tuple[str, ...], code: int, said: str) -> None:
    done = mmod(*words, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_code"] == code
    assert said in told["error"] and told.keys() == {"error", "fix", "exit_code"}
    assert done.stderr.startswith(("Error: ", "Usage: ")) and mmod(*words).stdout == ""


def test_a_config_cannot_steer_the_terminal(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "\x1b[2Jgone\x9b31m"}
    model = write_transformers(tmp_path / "model", config=config)
    for words in (("inspect", model), ("convert", model, "-o", tmp_path / "out")):
        done = mmod(*words)
        assert done.returncode == 1 and "\\x1b[2Jgone\\x9b31m" in done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr and "\x9b" not in done.stdout + done.stderr


def test_brackets_are_shown_as_they_are() -> None:
    with redirect_stderr(io.StringIO()) as shown:
        console = Console()
        console.table("A [bold]title[/bold]", ("[red]name[/red]", "\x1b[1m"), [("[dim]tensor[/dim]", "[/]")])
        with console.task("[link=x]step", 1):
            pass
        console.warn("[blink]\x1b]0;mine\x07")
    for part in ("A [bold]title[/bold]", "[red]name[/red]", "[dim]tensor[/dim]", "[/]", "[link=x]step", "[blink]"):
        assert part in shown.getvalue()
    assert "\x1b]" not in shown.getvalue() and "\x07" not in shown.getvalue()
