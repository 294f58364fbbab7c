"""Jobs of the loopback Hub: told beforehand how they go, or run for real on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

DATE = "2026-01-01T00:00:00.000Z"
HARDWARE = [
    {
        "name": name,
        "prettyName": name.title(),
        "cpu": "4 vCPU",
        "ram": "15 GB",
        "accelerator": None,
        "unitCostMicroUSD": round(dollars * 1e6),
        "unitCostUSD": dollars,
        "unitLabel": "minute",
    }
    for name, dollars in (("cpu-basic", 0.000167), ("a10g-small", 0.016667))
]


@dataclass
class Course:
    """How the next jobs go.

    Attributes:
        queued: how often a job is asked about before it has a machine.
        gets_machine: without, it ends where it would have had one.
        log: its lines, where it does not run for real.
        end: stage that follows the log; None for a job that goes on until it is cancelled.
        message: what the Hub says of that end.
        command: turns a job's own command into one that runs here; None for a job that only shows ``log``.
        environment: of that command, besides the job's secrets.
    """

    queued: int = 1
    gets_machine: bool = True
    log: tuple[str, ...] = ("Calibrating ...",)
    end: str | None = "COMPLETED"
    message: str | None = None
    command: Callable[[list[str]], list[str]] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """One job as it stands; ``spec`` is what was sent to start it."""

    id: str
    owner: str
    spec: dict[str, Any]
    course: Course
    stage: str = "SCHEDULING"
    message: str | None = None
    asked: int = 0
    started: bool = False

    def ask(self) -> dict[str, Any]:
        """What the Hub tells of it; its machine comes after a while."""
        self.asked += 1
        if self.stage == "SCHEDULING" and self.asked > self.course.queued:
            self.started = self.course.gets_machine
            if self.started:
                self.stage = "RUNNING"
            else:
                self.end(self.course.end or "ERROR", self.course.message)
        return {
            "id": self.id,
            "createdAt": DATE,
            "startedAt": DATE if self.started else None,
            "owner": {"id": "1", "name": self.owner, "type": "user"},
            "flavor": self.spec["flavor"],
            "status": {"stage": self.stage, "message": self.message},
        }

    def run(self) -> Iterator[str]:
        """The lines of its log, as they are written."""
        if self.course.command is None:
            yield from self.course.log
        else:
            program = self.course.command(self.spec["command"])
            environment = {**os.environ, **self.course.environment, **self.spec["secrets"]}
            with subprocess.Popen(
                program, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                assert process.stdout is not None
                yield from (line.rstrip("\n") for line in process.stdout)
            if process.returncode:
                self.end("ERROR", f"Job failed with exit code: {process.returncode}")
        while self.course.end is None and self.stage == "RUNNING":
            time.sleep(0.02)
        if self.course.end is not None:
            self.end(self.course.end, self.course.message)

    def end(self, stage: str, message: str | None = None) -> None:
        """Put it into a last stage, unless it is in one."""
        if self.stage in ("SCHEDULING", "RUNNING"):
            self.stage, self.message = stage, message


class Jobs:
    """All jobs of a Hub, by their ids, and the course that the next ones take."""

    def __init__(self) -> None:
        self.course = Course()
        self.by_id: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, owner: str, spec: dict[str, Any]) -> Job:
        """A job as someone asked for it."""
        with self._lock:
            job = Job(f"{len(self.by_id) + 1:024x}", owner, spec, self.course)
            self.by_id[job.id] = job
            return job

    @property
    def last(self) -> Job:
        """The job that was started last."""
        return list(self.by_id.values())[-1]


def as_events(lines: Iterator[str]) -> Iterator[bytes]:
    """A log as server-sent events."""
    for line in chain(["===== Job started at 2026-01-01 00:00:00 ====="], lines):
        yield f"data: {json.dumps({'data': line, 'timestamp': DATE})}\n\n".encode()


def run_here(command: list[str]) -> list[str]:
    """A job's command without uv, by the Python that runs the tests."""
    assert command[:3] == ["uv", "run", "--with"] and command[4] == "mmod-convert", command
    return [sys.executable, "-m", "converter", *command[5:]]
