"""`mmod convert --on`: the same command as a job of the loopback Hub, its price, its log and its ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from converter import __version__
from converter.commands.cli import app
from converter.errors import JobError, UsageError
from converter.manifest import Manifest
from tests.hub_server import Fault, HubServer
from tests.hub_server.jobs import Course, run_here
from tests.small_checkpoints import write_transformers

ROOT = Path(__file__).parents[1]
CONSTANT = ("--method", "constant", "--factor", "1.5")
LINE = ("convert", "bob/tiny", *CONSTANT, "--on", "a10g-small")


@pytest.fixture
def model(hub: HubServer, tmp_path: Path) -> str:
    """The commit of a small model on the Hub; jobs for it find their result there already."""
    commit = hub.add_repo("bob/tiny", write_transformers(tmp_path / "source"))
    return commit


def invoke(*words: str, answer: str = "") -> Any:
    return CliRunner().invoke(app, words, input=answer)


def test_a_job_converts_and_pushes_by_the_same_command(
    hub: HubServer, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = huggingface_hub.get_token()
    assert token
    far = tmp_path / "far"
    far.mkdir()
    hub.jobs.course = Course(
        log=(), command=run_here, environment={**hub.environment(far / "home"), "PYTHONPATH": str(ROOT)}
    )
    monkeypatch.chdir(far)
    done = invoke(*LINE, "--seed", "3", "--allow-slow", "--yes", "--json")
    assert done.exit_code == 0, done.output
    told, job = json.loads(done.stdout), hub.jobs.last
    assert told["url"] == f"{hub.url}/alice/tiny-scaled-hf" and told["job"] == f"{hub.url}/jobs/alice/{job.id}"
    line = (
        f"mmod-convert bob/tiny --revision {model} --method constant --push --seed 3 --factor 1.5 --allow-slow "
        "--repo-id alice/tiny-scaled-hf"
    )
    command = job.spec["command"]
    install = ["uv", "run", "--with", f"mmod-convert[hub-kernels]=={__version__}"]
    assert sorted(command) == sorted([*install, *shlex.split(line)])
    assert job.spec["secrets"] == {"HF_TOKEN": token} and job.spec["timeoutSeconds"] == 6 * 3600
    assert token not in json.dumps(command) + done.output
    # The job's own lines are shown here, and what it pushed is a whole conversion of that commit.
    assert "equal the formula" in done.stderr and f"Pushed to {hub.url}/alice/tiny-scaled-hf" in done.stderr
    manifest = Manifest.from_json(hub.content("alice/tiny-scaled-hf", "mmod.json"))
    assert manifest.source.revision == model and "--on" not in manifest.command


def test_a_job_installs_the_commit_that_is_installed_here(
    hub: HubServer, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.jobs.course = Course(end="CANCELED")
    installed = tmp_path / "path" / "mmod_convert-9.9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mmod-convert\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    origins: list[tuple[dict[str, Any], str]] = [
        (
            {"url": "https://example.org/m.git", "vcs_info": {"vcs": "git", "commit_id": "c" * 40}},
            f"mmod-convert[hub-kernels] @ git+https://example.org/m.git@{'c' * 40}",
        ),
        ({"url": "file:///somewhere", "dir_info": {}}, f"mmod-convert[hub-kernels]=={__version__}"),
    ]
    for origin, requirement in origins:
        (installed / "direct_url.json").write_text(json.dumps(origin))
        done = invoke(*LINE, "--yes")
        assert hub.jobs.last.spec["command"][3] == requirement
        assert ("not what is installed here" in done.stderr) == ("dir_info" in origin)


def test_the_price_is_asked_about_first(hub: HubServer, model: str) -> None:
    refused = invoke(*LINE, "--timeout", "90m", answer="n\n")
    assert "$1.00 an hour" in refused.stderr and "at most $1.50 in the 90m" in refused.stderr
    assert isinstance(refused.exception, JobError) and not hub.jobs.by_id
    nobody = invoke(*LINE)
    assert isinstance(nobody.exception, UsageError) and "--yes" in nobody.exception.fix and not hub.jobs.by_id
    dry = invoke(*LINE, "--dry-run", "--json")
    assert dry.exit_code == 0 and not hub.jobs.by_id
    assert json.loads(dry.stdout)["cost_at_most"] == pytest.approx(6, rel=1e-3)
    assert "Would cost" in dry.stderr and "mmod-convert bob/tiny" in dry.stderr
    hub.jobs.course = Course(end="ERROR")
    invoke(*LINE, answer="y\n")
    assert hub.jobs.last.spec["flavor"] == "a10g-small"


def test_what_a_job_cannot_see_is_refused(hub: HubServer, model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    here = str(tmp_path)
    for words, named in (
        (("convert", here, "--on", "a10g-small"), here),
        ((*LINE, "--data", f"{here}/text.txt=0.5"), "text.txt"),
        ((*LINE, "--data", "./gone.txt"), "./gone.txt"),
        ((*LINE, "--held-out", f"{here}/text.txt"), "text.txt"),
        ((*LINE, "--tokenizer", here), here),
        ((*LINE, "--output", "out"), "--output"),
    ):
        done = invoke(*words, "--yes")
        assert isinstance(done.exception, UsageError), words
        assert named in done.exception.message + done.exception.fix and "Hub" in done.exception.fix
    assert not hub.jobs.by_id


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--timeout", "soon"), "Write it like 90m"),
        (("--timeout", "0h"), "Write it like 90m"),
        (("--on", "a1000"), "cpu-basic ($0.01 an hour), a10g-small ($1.00 an hour)"),
        (("--repo-id", "carol/x"), "choose another --repo-id"),
        (("--tau", "3"), "It belongs to: floor"),
    ],
)
def test_what_would_fail_in_the_job_fails_before_it(
    hub: HubServer, model: str, words: tuple[str, ...], told: str
) -> None:
    done = invoke(*LINE, *words, "--yes")
    assert told in str(getattr(done.exception, "fix", done.exception)) and not hub.jobs.by_id


@pytest.mark.parametrize(
    ("course", "message", "fix"),
    [
        (Course(end="ERROR", message="Job timeout"), "ran out of its time, 6h", "--timeout"),
        (
            Course(end="ERROR", message="Job failed: OOMKilled (137)"),
            "was killed",
            "larger hardware",
        ),
        (Course(end="ERROR", message="Job failed with exit code: 1"), "ended with an error: Job failed", "its log"),
        (Course(end="CANCELED"), "was cancelled", "again"),
        (Course(end="DELETED"), "was deleted", "again"),
        (Course(end="COMPLETED"), "alice/tiny-scaled-hf is not there", "job's log"),
    ],
)
def test_every_end_of_a_job_has_its_message(
    hub: HubServer, model: str, course: Course, message: str, fix: str
) -> None:
    hub.jobs.course = course
    done = invoke(*LINE, "--yes")
    error = done.exception
    assert isinstance(error, JobError) and message in error.message and fix in error.fix
    assert f"{hub.url}/jobs/alice/{hub.jobs.last.id}" in error.fix
    assert "waits for its machine" in done.stderr and "Calibrating ..." in done.stderr


@pytest.mark.parametrize(
    ("status", "path", "message", "fix"),
    [
        (402, "/api/jobs/alice$", "no job without credit: Pre-paid", "billing"),
        (403, "/api/jobs/alice$", "may not start jobs: Pre-paid", "permission to run jobs"),
        (404, "/api/jobs/alice/0", "no such job any more: Pre-paid", "hf jobs ps"),
    ],
)
def test_refusals_of_the_hub(hub: HubServer, model: str, status: int, path: str, message: str, fix: str) -> None:
    method = "POST" if path.endswith("$") else "GET"
    hub.faults.append(Fault(method, path, "status", status, "Pre-paid credit balance is insufficient hf_abc"))
    error = invoke(*LINE, "--yes").exception
    assert isinstance(error, JobError) and message in error.message and fix in error.fix
    assert "hf_abc" not in error.message


def test_a_job_that_gets_no_machine_shows_no_log(hub: HubServer, model: str) -> None:
    hub.jobs.course = Course(gets_machine=False, end="ERROR", message="No capacity")
    done = invoke(*LINE, "--yes")
    assert isinstance(done.exception, JobError) and "with an error: No capacity" in done.exception.message
    assert "waits for its machine" in done.stderr and not [r for r in hub.log if r.path.endswith("/logs")]


def test_a_lost_connection_says_that_the_job_goes_on(hub: HubServer, model: str) -> None:
    hub.faults.append(Fault("GET", "/api/jobs/alice/0", "lose", times=9))
    error = invoke(*LINE, "--yes").exception
    assert isinstance(error, JobError) and f"The job goes on: {hub.url}/jobs/alice/" in error.fix


def test_the_token_is_hidden_where_a_job_prints_it(hub: HubServer, model: str) -> None:
    token = huggingface_hub.get_token()
    hub.jobs.course = Course(log=(f"token {token}", "\x1b[2Jdone"), end="ERROR")
    done = invoke(*LINE, "--yes")
    assert "token hf_..." in done.stderr and str(token) not in done.output and "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "at"), [("y\n", "its log"), ("n\n", "its log"), ("", "its log"), ("y\n", "its start")]
)
def test_ctrl_c_offers_to_cancel(hub: HubServer, model: str, tmp_path: Path, answer: str, at: str) -> None:
    hub.jobs.course = Course(end=None)
    start = Fault("POST", "/api/jobs/alice$", "slow", seconds=1, times=int(at == "its start"))
    hub.faults.append(start)
    environment = {**os.environ, **hub.environment(tmp_path / "home", huggingface_hub.get_token())}
    program = [sys.executable, "-c", "from converter.__main__ import main; main()", *LINE, "--yes"]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=environment, cwd=ROOT, stdin=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None
            deadline = time.monotonic() + 60
            while start.times and time.monotonic() < deadline:
                time.sleep(0.02)
            while at == "its log" and "Calibrating" not in process.stderr.readline():
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(answer, timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "Traceback" not in told and "Cancel the job as well?" in told
    job = hub.jobs.last
    url = f"{hub.url}/jobs/alice/{job.id}"
    if answer == "y\n":
        assert job.stage == "CANCELED" and f"The job is cancelled: {url}" in told
    else:
        assert job.stage == "RUNNING" and f"costs until it ends: {url}" in told
        assert f"hf jobs cancel {job.id}" in told
    job.end("CANCELED")
