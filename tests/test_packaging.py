"""What is shipped beside the code: the pins of the Dockerfile, and how soon the installed command answers."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def test_dockerfile_pins_versions_that_the_project_takes() -> None:
    pins = dict(re.findall(r"([\w-]+)==([\w.]+)", DOCKERFILE))
    torch = re.search(r"pytorch/pytorch:([\d.]+)-", DOCKERFILE)
    assert torch
    pins["torch"] = torch[1]
    required = {
        requirement.name: requirement
        for requirement in map(
            Requirement, [*PROJECT["optional-dependencies"]["kernels"], *PROJECT["dependencies"]]
        )
    }
    for name in ("mamba-ssm", "causal-conv1d", "torch"):
        assert pins[name] in required[name].specifier, name


def test_dockerfile_leaves_the_torch_of_its_image_and_runs_mmod(tmp_path: Path) -> None:
    step = re.search(r"(grep .*?) > ", DOCKERFILE)
    assert step
    command = step[1].replace("/wheels/constraints.txt", str(ROOT / "constraints.txt"))
    others = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert set(CONSTRAINTS.splitlines()) - set(others.splitlines()) == {"torch==2.13.0"}
    entry = re.search(r'ENTRYPOINT \["(\w+)"\]', DOCKERFILE)
    assert entry and entry[1] in PROJECT["scripts"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.*) /wheels/$", DOCKERFILE, re.MULTILINE)
    assert [f"!{name}" for name in copied[0].split()] == ignored[1:]


@pytest.mark.parametrize("tool", ["mmod-convert", "mmod"])
def test_help_answers_at_once(tool: str) -> None:
    def processor_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([Path(sys.executable).parent / tool, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Not by the clock, which counts other work on the machine, too.
    assert min(processor_seconds() for _ in range(5)) < 0.3
