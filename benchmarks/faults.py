"""Injects exceptions where this tool calls others, at random, and checks what the user sees.

    python -m benchmarks.faults --rounds 300

A verb runs once while every place is noted where code of this tool calls a library or the system, and how often.
Each round then runs a verb in a process of its own, draws one such place, one of its calls and an exception, and
raises that in place of the call. The run may succeed all the same, or end with a message; a traceback, an unknown
exit code, silence or a calibration that is lost count as failures, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.hub_server import HubServer, point_client_at, running_hub

ROOT = Path(__file__).parent.parent
OURS = tuple(str(ROOT / room) + os.sep for room in ("converter", "calibrator", "hub_cards"))
LIBRARY = os.path.dirname(json.__file__).removesuffix("json")
# Of Python's own library, what reaches outside of the process or reads what came from there.
OUTSIDE = ("json", "shutil.py", "tempfile.py", "pathlib.py", "zipfile", "subprocess.py", "socket.py", "importlib")
SYSTEM = ("posix", "io", "_io", "fcntl", "_hashlib")
# Behind these lies nothing that could report a failure of their own.
LAST = frozenset({"_explain", "_print_error", "_print_error_json", "_flushed", "_report_in_background"})
SECONDS = 300
VERBS: Mapping[str, Callable[[Path], list[str]]] = {
    "inspect": lambda place: ["inspect", str(place / "model"), "--json"],
    "bake": lambda place: ["bake", str(place / "model"), str(place / "out"), "--scales", str(place / "scaled")],
    "verify": lambda place: ["verify", str(place / "scaled"), "--base", str(place / "model")],
    "convert": lambda place: conversion(place / "model", place / "out"),
    "evaluate": lambda place: [
        *("evaluate", str(place / "model"), "--windows", "1"),
        *("--lengths", "64,256", "--device", "cpu"),
    ],
    "push": lambda place: ["push", str(place / "scaled"), "--repo-id", REPOSITORY],
}
REPOSITORY = "alice/scaled"


class Unforeseen(Exception):
    """Of no kind that any code expects."""


FAULTS: Mapping[str, Callable[[], BaseException]] = {
    "full disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no right": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "gone": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    "silent": lambda: TimeoutError(),
    "ValueError": lambda: ValueError("bad value"),
    "TypeError": lambda: TypeError("bad type"),
    "KeyError": lambda: KeyError("key"),
    "AttributeError": lambda: AttributeError("no attribute"),
    "RuntimeError": lambda: RuntimeError("first line\nsecond line"),
    "ImportError": lambda: ImportError("no module"),
    "AssertionError": lambda: AssertionError(),
    "MemoryError": lambda: MemoryError(),
    "UnicodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "unforeseen": lambda: Unforeseen(),
}


def conversion(model: Path, output: Path) -> list[str]:
    """A short calibration's command line."""
    lengths = ["--target-len", "256", "--train-len", "64", "--steps", "1", "--windows", "1"]
    texts = ROOT / "converter" / "demo" / "texts"
    data = ["--data", str(texts / "persuasion.txt"), "--held-out", str(texts / "northanger-abbey.txt")]
    return ["convert", str(model), "-o", str(output), *lengths, *data, "--device", "cpu"]


class Injector:
    """Watches the calls from this tool's code to others', and raises in place of one of them.

    Args:
        place: file, line and name of the call, and whether the calibration is done by then; None to count all.
        number: which of its calls.
    """

    def __init__(self, place: str | None = None, number: int = 0, fault: str = "") -> None:
        self._place, self._left, self._fault = place, number, fault
        self.counts: Counter[str] = Counter()
        self.struck = self.has_kept = self.had_kept = False

    def start(self) -> None:
        """Watch this thread and those to come."""
        threading.setprofile(self._watch)
        sys.setprofile(self._watch)

    def _watch(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_code.co_qualname == "Problem.run_steps":
            self.has_kept = True
        caller = frame.f_back if event == "call" else frame
        if event not in ("call", "c_call") or caller is None or not caller.f_code.co_filename.startswith(OURS):
            return
        if event == "call":
            name = frame.f_code.co_qualname
            if not _is_foreign(frame.f_code.co_filename):
                return
        else:
            name = getattr(argument, "__qualname__", "")
            owner = getattr(argument, "__module__", None) or type(getattr(argument, "__self__", None)).__module__
            if owner.partition(".")[0] not in (*SYSTEM, "torch", "numpy", "safetensors"):
                return
        if caller.f_code.co_name in LAST:
            return
        phase = "after the calibration, " if self.has_kept else ""
        place = f"{phase}{os.path.relpath(caller.f_code.co_filename, ROOT)}:{caller.f_lineno} {name}"
        self.counts[place] += 1
        if place == self._place and not self.struck:
            self._left -= 1
            if self._left <= 0:
                self.struck, self.had_kept = True, self.has_kept
                raise FAULTS[self._fault]()


def _is_foreign(file: str) -> bool:
    if "site-packages" in file:
        return True
    return file.removeprefix(LIBRARY).startswith(OUTSIDE) and file.startswith(LIBRARY)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code; negative for a signal.
        said: all that it wrote.
        counts: calls by place.
        struck: whether the exception was raised, and ``had_kept`` whether the calibration was done by then.
    """

    code: int
    said: str
    counts: Mapping[str, int]
    struck: bool
    had_kept: bool

    @property
    def fault(self) -> str:
        """What is wrong with it, else empty."""
        if "Traceback (most recent call last)" in self.said or "Exception ignored" in self.said:
            return "traceback"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code and "Error: " not in self.said:
            return "silence"
        if (
            self.code
            and self.had_kept
            and not ("Start the same command again" in self.said or "The model is in " in self.said)
        ):
            return "lost calibration"
        return ""


def run(words: list[str], injector: Injector, folder: Path) -> Outcome:
    """Run a command line in a child of this process, where the injector watches."""
    said, record = folder / "said", folder / "record"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_run_here(words, injector, said, record))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(SECONDS)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0)
    counts, struck, had_kept = json.loads(record.read_text()) if record.exists() else ({}, True, False)
    record.unlink(missing_ok=True)
    return Outcome(code, said.read_text(errors="replace"), counts, struck, had_kept)


def _run_here(words: list[str], injector: Injector, said: Path, record: Path) -> int:
    code: Any = 70
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["mmod", *words]
    try:
        from converter.__main__ import main

        injector.start()
        main()
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    sys.setprofile(None)
    sys.stderr.flush()
    record.write_text(json.dumps([injector.counts, injector.struck, injector.had_kept]))
    return int(code)


def prepare(folder: Path) -> None:
    """Make the model and its conversion that the verbs work on, and import what they import."""
    for module in (
        "calibrator.comparison",
        "calibrator.stock_match",
        "converter.commands.convert",
        "hub_cards.publish",
    ):
        importlib.import_module(module)
    shutil.copytree(ROOT / "converter" / "demo" / "models" / "tiny-mamba2-256", folder / "model")
    words = [
        "convert",
        str(folder / "model"),
        "-o",
        str(folder / "scaled"),
        "--method",
        "constant",
        "--factor",
        "2",
    ]
    outcome = run([*words, "--target-len", "4k"], Injector(), folder)
    assert outcome.code == 0, outcome.said


def inject(
    folder: Path, rounds: int, seed: int, verbs: list[str], hub: HubServer
) -> tuple[Counter[str], list[str]]:
    """Run verbs with faults in a prepared folder.

    Args:
        hub: to which this process's client of the Hub is led.

    Returns:
        How often each verb ended how, and a description of each failure.
    """
    generator, outcomes, failures = random.Random(seed), Counter[str](), []
    places: dict[str, Mapping[str, int]] = {}
    for verb in verbs:
        whole = run(VERBS[verb](folder), Injector(), folder)
        assert whole.code == 0, whole.said
        places[verb] = whole.counts
        _clear(folder, hub)
    for _ in range(rounds):
        verb = generator.choice(verbs)
        place = generator.choice(sorted(places[verb]))
        fault = generator.choice(sorted(FAULTS))
        number = generator.randint(1, places[verb][place])
        outcome = run(VERBS[verb](folder), Injector(place, number, fault), folder)
        _clear(folder, hub)
        ended = outcome.fault or ("not reached" if not outcome.struck else "error" if outcome.code else "success")
        outcomes[f"{verb}: {ended}"] += 1
        if outcome.fault:
            failures.append(f"{verb}: {fault} at {place}, call {number}: {outcome.fault}\n{outcome.said[-2000:]}")
            sys.stderr.write(failures[-1] + "\n")
    return outcomes, failures


def _clear(folder: Path, hub: HubServer) -> None:
    """Take away what a verb made, or left."""
    hub.repositories.clear()
    for left in (path for path in folder.iterdir() if path.name not in ("model", "scaled", "said", "hub")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def main() -> None:
    """Command line of the injection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mmod-faults-") as name,
        running_hub(Path(name, "hub")) as hub,
        pytest.MonkeyPatch.context() as changed,
    ):
        point_client_at(hub, changed, Path(name, "home"), hub.add_account("alice"))
        os.environ["XDG_CACHE_HOME"] = name + "-cache"
        prepare(Path(name))
        outcomes, failures = inject(Path(name), options.rounds, options.seed, options.verbs.split(","), hub)
        shutil.rmtree(name + "-cache", ignore_errors=True)
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:6} {outcome}\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
