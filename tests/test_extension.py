"""`hf mmod`: the script of this repository, installed and run by the `hf` command of huggingface_hub itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from converter import __version__

ROOT = Path(__file__).parents[1]
HF = """
import sys, types
from pathlib import Path
import huggingface_hub.cli.extensions as extensions
from huggingface_hub.cli.hf import main

def from_this_repository(method, url, **_):
    # A file at the root of the default branch; any other page of the site is empty.
    name = url.partition("/someone/hf-mmod/HEAD/")[2]
    if name and not Path(name).is_file():
        raise FileNotFoundError(name)
    return types.SimpleNamespace(content=Path(name).read_bytes() if name else b"", text="", json=dict)

extensions._github_request = from_this_repository
sys.argv[0] = "hf"
main()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and a PATH with no more than sh and what a test puts into ``bin``."""
    (tmp_path / "bin").mkdir()
    return {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HF_HOME": str(tmp_path)}


def hf(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HF, *words],
        cwd=ROOT,
        env={**environment, "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
    )


def test_hf_installs_the_script_which_runs_mmod(tmp_path: Path, environment: dict[str, str]) -> None:
    installed = hf(environment, "extensions", "install", "someone/hf-mmod")
    assert installed.returncode == 0 and "hf mmod" in installed.stdout, installed
    mmod = tmp_path / "bin" / "mmod"
    mmod.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c 'from converter.__main__ import main; main()' \"$@\"\n")
    mmod.chmod(0o755)
    run = hf(environment, "mmod", "inspect", "--version")
    assert run.stdout == f"mmod-convert {__version__}\n", run


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        ("uvx", "--from mmod-convert mmod inspect a b"),
        ("pipx", "run --spec mmod-convert mmod inspect a b"),
    ],
)
def test_script_without_mmod_asks_uv_or_pipx_for_it(
    tool: str, line: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    stand_in = tmp_path / "bin" / tool
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    done = subprocess.run([ROOT / "hf-mmod", "inspect", "a b"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{line}\n"


def test_script_with_nothing_to_run_says_what_to_install(environment: dict[str, str]) -> None:
    done = subprocess.run([ROOT / "hf-mmod", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 127 and "pip install mmod-convert" in done.stderr
