"""A conversion on the Hub's machines: what it may cost, the job that runs the same command, its log and its end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from typing import Any

import typer
from huggingface_hub import HfApi, JobInfo, JobStage, get_token
from huggingface_hub.errors import HfHubHTTPError

from converter import __version__
from converter.command_line import repeating_line
from converter.commands.convert import prepare
from converter.commands.requests import ConvertRequest
from converter.errors import JobError, MmodError, UsageError, redacted_message
from converter.hub import hub_errors
from converter.interruption import Interrupted, undisturbed
from converter.reporting import Reporter
from converter.temporary import temporary_folder

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
"""Has uv, which installs this tool, and the C compiler that Triton calls."""
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_SECONDS |= {unit[0]: seconds for unit, seconds in _SECONDS.items()}
# What is for this machine alone, or comes from the plan.
_LEFT_OUT = frozenset({"model", "output", "overwrite", "dry_run", "on", "timeout", "yes"})

_REFUSALS = {
    402: ("The Hub starts no job without credit", "Add some in your billing settings on the Hub."),
    403: ("Your token may not start jobs", "Use one with the permission to run jobs: hf auth login."),
    404: ("The Hub knows no such job any more", "Look at your jobs: hf jobs ps --all."),
}
_ENDS = (
    ("CANCELED", "", "was cancelled", "Start it again by the same line."),
    ("DELETED", "", "was deleted", "Start it again by the same line."),
    ("ERROR", r"time.?d?.?out", "ran out of its time, {timeout}", "Give it more with --timeout."),
    ("ERROR", r"oom|memory|kill|\b137\b", "was killed, most often for memory", "Take larger hardware with --on."),
    ("ERROR", "", "ended with an error", "The end of its log says why."),
)
"""Stage, what the Hub's words match, our words, and the remedy; the first row that fits."""


def convert_on(request: ConvertRequest, reporter: Reporter) -> dict[str, Any]:
    """Run a conversion as a job on the Hub that pushes its result, and follow it to its end.

    Raises:
        UsageError: something named lies on this machine, or there is no such hardware.
        JobError: the job was refused, or ended without a result; whether it still runs is said.
    """
    _refuse_local(request)
    seconds = _parse_timeout(request.timeout)
    api, destination = HfApi(), request.destination()
    with temporary_folder() as folder:
        plan = prepare(dataclasses.replace(request, output=folder / "scaled"), reporter, destination, weights=False)
    # The machine has no kernels, and no compiler for them.
    remote = dataclasses.replace(request, push=True, repo_id=plan.repo_id, hub_kernels=not request.allow_slow)
    line = repeating_line("mmod-convert", [request.model], remote, plan.snapshot, _LEFT_OUT)
    words = ["uv", "run", "--with", _requirement(reporter), *shlex.split(line)]
    with _job_errors():
        price, cost = _price(api, request, seconds)
    reporter.line(f"On {request.on}: {line}")
    result = {"command": line, "cost_at_most": cost, "repo_id": plan.repo_id, "job": None, "url": None}
    if request.dry_run:
        reporter.line(f"Would cost {price}.")
        return result
    if request.yes:
        reporter.line(f"This costs {price}.")
    elif not _agreed(f"This costs {price}. Start it?"):
        raise JobError("No job was started.")
    token, job = get_token(), None
    try:
        # A signal between the request and its answer would leave a job that nobody knows of.
        with _job_errors(), undisturbed():
            job = api.run_job(
                image=IMAGE, command=words, secrets={"HF_TOKEN": token}, flavor=request.on, timeout=seconds
            )
        reporter.line(f"{job.url} waits for its machine.")
        with _job_errors(f"The job goes on: {job.url}"):
            job = _follow(api, job, str(token), reporter)
    except Interrupted as interrupted:
        if job is not None:
            interrupted.add_note(_offer_to_cancel(api, job, interrupted.number))
        raise
    _require_result(job, request.timeout)
    with _job_errors():
        if not api.repo_exists(str(plan.repo_id)):
            raise JobError(f"The job is done, but {plan.repo_id} is not there.", f"See the job's log: {job.url}")
    url = f"{api.endpoint}/{plan.repo_id}"
    reporter.line(f"The job is done. Pushed to {url}")
    return {**result, "job": job.url, "url": url}


def _refuse_local(request: ConvertRequest) -> None:
    """Raise UsageError if something named lies on this machine, which a job does not see."""
    if request.output is not None:
        raise UsageError(
            "A job writes to no folder of this machine.",
            "Leave out --output; --repo-id names the result on the Hub.",
        )
    for name in filter(None, (request.model, *request.data, request.held_out, request.tokenizer)):
        for place in (name, name.rpartition("=")[0]):
            if place and (os.path.exists(os.path.expanduser(place)) or place.startswith(("/", "~", "."))):
                raise UsageError(
                    f"{place} is on this machine, and a job does not see it.",
                    "Put it on the Hub and give its id (hf upload OWNER/NAME PATH), or run here, without --on.",
                )


def _requirement(reporter: Reporter) -> str:
    """What the job installs: this version, by the commit where it was installed here from a repository."""
    origin = json.loads(distribution("mmod-convert").read_text("direct_url.json") or "{}")
    if repository := origin.get("vcs_info"):
        where = f"{repository['vcs']}+{origin['url']}@{repository['commit_id']}"
        return f"mmod-convert[hub-kernels] @ {where}"
    if origin:
        reporter.warn(f"The job installs mmod-convert {__version__} from PyPI, not what is installed here.")
    return f"mmod-convert[hub-kernels]=={__version__}"


def _parse_timeout(text: str) -> int:
    """Seconds of a time such as 90m."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text)
    seconds = int(float(match[1]) * _SECONDS[match[2]]) if match else 0
    if not seconds:
        raise UsageError(f"--timeout {text} is no time.", "Write it like 90m, 6h or 1d.")
    return seconds


def _price(api: HfApi, request: ConvertRequest, seconds: int) -> tuple[str, float]:
    """The price in words and the most that the job can cost in dollars. How long it will take is not known."""
    offered = {hardware.name: hardware for hardware in api.list_jobs_hardware()}
    hourly = {name: one.unit_cost_usd * 3600 / _SECONDS[one.unit_label] for name, one in offered.items()}
    if request.on not in offered:
        shown = ", ".join(f"{name} (${hourly[name]:.2f} an hour)" for name in offered)
        raise UsageError(f"The Hub has no hardware named {request.on}.", f"Use one of: {shown}.")
    most = hourly[request.on] * seconds / 3600
    words = f"${hourly[request.on]:.2f} an hour while it runs, at most ${most:.2f} in the {request.timeout}"
    return f"{words} after which the Hub ends it (--timeout)", most


def _agreed(question: str) -> bool:
    """Ask on stderr. Raises UsageError if nobody is there to answer."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        raise UsageError(f"Nobody answers: {question}", "Add --yes to start a job without a question.") from None


def _follow(api: HfApi, job: JobInfo, token: str, reporter: Reporter) -> JobInfo:
    """Show the job's log while it runs; the job as it ended."""
    owner = job.owner.name
    job = api.wait_for_job(job.id, stages=[JobStage.RUNNING], namespace=owner)
    if job.status.stage == "RUNNING" or job.started_at:
        reporter.line("The job runs. Its log:")
        for line in api.fetch_job_logs(job_id=job.id, namespace=owner, follow=True):
            reporter.line(line.replace(token, "hf_..."))
    return api.wait_for_job(job.id, namespace=owner)


def _offer_to_cancel(api: HfApi, job: JobInfo, number: int) -> str:
    """After Ctrl-C, cancel the job if the user says so; a sentence on what becomes of it."""
    still = f"The job goes on and costs until it ends: {job.url}\nEnd it with: hf jobs cancel {job.id}"
    try:
        if number == signal.SIGINT and _agreed("Cancel the job as well?"):
            with _job_errors(), undisturbed():
                api.cancel_job(job_id=job.id, namespace=job.owner.name)
            return f"The job is cancelled: {job.url}"
    except Interrupted:
        return still
    except MmodError as error:
        return f"{error.message}\n{still}"
    return still


def _require_result(job: JobInfo, timeout: str) -> None:
    """Raise JobError unless the job ended well."""
    if job.status.stage == "COMPLETED":
        return
    said = job.status.message or ""
    words, fix = next(
        (words, fix)
        for stage, match, words, fix in _ENDS
        if stage == job.status.stage and re.search(match, said, re.IGNORECASE)
    )
    told = f": {said}" if said else "."
    raise JobError(f"The job {words.format(timeout=timeout)}{told}", f"{fix} {job.url}")


@contextmanager
def _job_errors(then: str = "") -> Iterator[None]:
    """Errors of the Hub about jobs, in words of ours."""
    with hub_errors("the job", JobError, then):
        try:
            yield
        except HfHubHTTPError as error:
            if error.response.status_code not in _REFUSALS:
                raise
            message, fix = _REFUSALS[error.response.status_code]
            raise JobError(f"{message}: {redacted_message(error)}", f"{fix} {then}".rstrip()) from error
