"""``--quiet`` silences the progress bars of the libraries too."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from converter.layouts import read_checkpoint
from converter.scales_file import save_scales
from tests.hub_server import HubServer, running_hub
from tests.small_checkpoints import random_scales, source, write_state_spaces_source, write_transformers

ROOT = Path(__file__).parent.parent
MMOD = "import sys; from converter.__main__ import main; sys.argv[0] = 'mmod'; main()"
BAR_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def terminal_of(hub: HubServer, home: Path, *words: str | Path) -> str:
    """What a person sees of a command that must succeed: its stderr, which is a terminal. The cache is empty."""
    environment = os.environ | hub.environment(home)
    environment = {key: value for key, value in environment.items() if key not in BAR_VARIABLES}
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    with open(terminal, "rb", buffering=0) as shown:
        process = subprocess.Popen(
            [sys.executable, "-c", MMOD, *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        os.close(stderr)
        seen = b""
        # Reading from a terminal whose other end was closed is an error, not an end of file.
        with process, suppress(OSError):
            while piece := shown.read(1 << 16):
                seen += piece
    assert process.returncode == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize("verb", ["bake", "verify"])
def test_quiet_run_on_the_hub_draws_no_bar(tmp_path: Path, verb: str) -> None:
    model = write_state_spaces_source(tmp_path / "model")
    A_log = read_checkpoint(source(model)).A_log
    scales = save_scales(tmp_path, random_scales({name: tensor.shape for name, tensor in A_log.items()}), A_log)
    words = write_transformers(tmp_path / "words")
    with running_hub(tmp_path / "objects") as hub:
        hub.add_repo("acme/base", model)
        hub.add_repo("acme/words", words)
        options: list[str | Path] = ["--scales", scales, "--tokenizer", "acme/words", "--no-proof"]
        baking: list[str | Path] = ["bake", "acme/base", tmp_path / "out", *options, "--overwrite"]
        arguments: list[str | Path] = baking
        if verb == "verify":
            terminal_of(hub, tmp_path / "home", *baking, "--quiet")
            hub.add_repo("acme/converted", tmp_path / "out")
            arguments = ["verify", "acme/converted", "--no-load"]
        assert "%|" in terminal_of(hub, tmp_path / "loud", *arguments)
        said = terminal_of(hub, tmp_path / "quiet", *arguments, "--quiet")
        assert not any(mark in said for mark in ("%|", "Fetching", "it/s")), said
