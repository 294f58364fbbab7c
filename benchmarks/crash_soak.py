"""Ends conversions at random moments and checks that the output is whole or not there.

    python -m benchmarks.crash_soak --rounds 100 [--of calibration|demo]

Each round forks from a process that has everything imported and runs the command: a conversion with a given factor,
a short calibration of a made-up model, or ``mmod-convert demo`` with one step. The run gets a signal, half of the
time after a random part of a whole run, else at a random moment of a phase that is drawn, so that short ones are
met as often as long ones: SIGKILL, SIGTERM or SIGINT, the latter two with or without a second soon after. Then the
output's name must stand for a complete, proved conversion or for nothing (for the former output where one was being
replaced), and the next run must succeed and leave nothing beside it and in TMPDIR; a run that was not killed leaves
nothing itself. Exits with 1 at the first failure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.synthetic import write_checkpoint
from converter.commands.cli import convert_app
from converter.commands.console import Console
from converter.commands.ending import run_application
from converter.commands.opening import CALIBRATION_NOVEL, HELD_OUT_NOVEL, NOVELS
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.proof import verify
from converter.reporting import Reporter
from converter.source import resolve

TOKENIZER = NOVELS.parent / "models" / "tiny-mamba2-256" / "tokenizer.json"
ENDING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (
    (signal.SIGKILL,),
    (signal.SIGTERM,),
    (signal.SIGINT,),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT),
)
SHORT = ("--target-len", "256", "--windows", "0")
RUNS = {
    "given": (*SHORT, "--method", "constant", "--factor", "2"),
    "calibration": (
        *(*SHORT, "--train-len", "64", "--steps", "1", "--device", "cpu"),
        *("--data", CALIBRATION_NOVEL, "--held-out", HELD_OUT_NOVEL),
    ),
    "demo": ("--target-len", "256", "--train-len", "128", "--steps", "1", "--windows", "1", "--device", "cpu"),
}
# Functions whose calls are the phases of a run.
PHASES = {
    "converter.commands.convert": (
        *("prepare", "rehearse", "open_stock", "read_texts", "settle_lengths"),
        *("bake_into", "describe", "sealed", "verify", "write_card"),
    ),
    "calibrator.calibration": ("calibrate",),
    "calibrator.comparison": ("measure_baseline", "probe_logits"),
    "converter.output": ("_flush_all", "_put_in_place", "_clean"),
}


@dataclass(frozen=True)
class Moment:
    """When a run gets a signal: so many seconds after a phase began for the nth time; None for the run itself."""

    seconds: float
    phase: str | None = None


@dataclass(frozen=True)
class Ended:
    """Exit status of a run, when its phases began, in seconds, and what it wrote."""

    status: int
    began: Sequence[tuple[str, float]]
    said: str


def words(kind: str, model: str, output: Path, seed: int, overwrite: bool) -> list[str]:
    """The command line of a run, told apart by its seed."""
    replacing = ["--overwrite"] if overwrite else []
    return ["mmod-convert", model, "-o", str(output), "--seed", str(seed), *RUNS[kind], *replacing]


def state_of(model: str, output: Path) -> str:
    """``nothing``, or ``seed N`` for a complete conversion. Raises MmodError for anything else."""
    if not output.exists():
        return "nothing"
    verify(resolve(str(output), compose=True), read_checkpoint(resolve(model)))
    manifest = Manifest.read(output)
    assert manifest is not None and manifest.calibration is not None and (output / "README.md").stat().st_size
    return f"seed {manifest.calibration.seed}"


def run_ended(command: list[str], moment: Moment = Moment(0), signals: Sequence[signal.Signals] = ()) -> Ended:
    """Run a command in a fork that gets signals at a moment, the second within 20 ms; returns how it ended."""
    reading, writing = os.pipe()
    # Until the child has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    with tempfile.TemporaryFile(dir=Path(tempfile.gettempdir()).parent) as said:
        child = os.fork()
        if child == 0:
            os.close(reading)
            for number in (1, 2):
                os.dup2(said.fileno(), number)
            _run_here(command, writing)
        os.close(writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        began, started = [], time.perf_counter()
        with os.fdopen(reading) as phases:
            if signals and moment.phase is None:
                _send(child, moment.seconds, signals)
            for line in phases:
                began.append((line.strip(), time.perf_counter() - started))
                if signals and line.strip() == moment.phase:
                    _send(child, moment.seconds, signals)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return Ended(status, began, said.read().decode(errors="replace"))


def _send(child: int, seconds: float, signals: Sequence[signal.Signals]) -> None:
    time.sleep(seconds)
    for number in signals:
        os.kill(child, number)
        time.sleep(random.uniform(0, 0.02))


def _run_here(command: list[str], writing: int) -> None:
    """Run a command as the whole of this process, which writes each phase as it begins."""
    status: Any = 70
    begun = Counter[str]()

    def announce(name: str, call: Any) -> Any:
        @wraps(call)
        def announced(*arguments: Any, **options: Any) -> Any:
            begun[name] += 1
            os.write(writing, f"{name} {begun[name]}\n".encode())
            return call(*arguments, **options)

        return announced

    def unblocked() -> None:
        # One that has arrived already is raised here, where the command deals with it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        convert_app()

    try:
        for module, names in PHASES.items():
            place = importlib.import_module(module)
            for name in names:
                setattr(place, name, announce(name, getattr(place, name)))
        sys.argv = command
        run_application(unblocked)
    except SystemExit as done:
        status = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def soak(folder: Path, rounds: int, seed: int, kind: str, reporter: Reporter) -> Counter[str]:
    """Run ``rounds`` rounds below ``folder`` and count how they ended.

    Raises:
        AssertionError, MmodError: an output was neither whole nor absent, or a leftover stayed.
    """
    place, model = folder / "outputs", "demo"
    if kind != "demo":
        hidden, layers = (64, 2) if kind == "calibration" else (512, 8)
        model = str(folder / "model")
        write_checkpoint(Path(model), hidden=hidden, layers=layers, shards=3, vocabulary=4096)
        shutil.copy(TOKENIZER, model)
    place.mkdir()
    output = place / "converted"
    started = time.perf_counter()
    run = run_ended(words(kind, model, output, rounds, False))
    assert run.status == 0, run.said
    whole = time.perf_counter() - started
    ends = [*(at for _, at in run.began[1:]), whole]
    lasts = {name: end - at for (name, at), end in zip(run.began, ends, strict=True)}
    generator, outcomes = random.Random(seed), Counter[str]()
    temporary = Path(tempfile.gettempdir())
    for number in range(rounds):
        overwrite = number % 2 == 1
        if not overwrite:
            shutil.rmtree(output)
        before = state_of(model, output)
        moment = Moment(generator.uniform(0, 1.3 * whole))
        if generator.random() < 0.5:
            phase = generator.choice(sorted(lasts))
            moment = Moment(generator.uniform(0, 1.3 * lasts[phase]), phase)
        numbers = generator.choice(SIGNALS)
        run = run_ended(words(kind, model, output, number, overwrite), moment, numbers)
        how = "ended" if run.status == 0 else "killed" if run.status == -signal.SIGKILL else "interrupted"
        after = state_of(model, output)
        allowed = {before, f"seed {number}"} | ({"nothing"} if how == "killed" else set())
        what = f"round {number}: {numbers} at {moment}: {how} ({run.status})\n{run.said}"
        assert "Traceback" not in run.said, what
        assert after in allowed, f"{what}: {after}, not one of {allowed}"
        assert how != "ended" or after == f"seed {number}", f"{what}, yet {after}"
        assert how != "interrupted" or run.status in (128 + signal.SIGINT, 128 + signal.SIGTERM), what
        left = _left(place, output, temporary)
        assert not left or how == "killed", f"{what}: left {left}"
        kept = "nothing" if after == "nothing" else "the former" if after == before else "the new one"
        outcomes[f"{'replacing' if overwrite else 'new'}: {how}, {kept}"] += 1
        outcomes["with leftovers"] += bool(left)
        outcomes[f"at {moment.phase or 'any moment'}"] += 1
        # Mostly a quick one; the same again goes on from the journal of what was ended.
        following = kind if number % 5 == 0 else "given"
        run = run_ended(words(following, model, output, number, True))
        assert run.status == 0, f"{what}: the next run failed:\n{run.said}"
        left = _left(place, output, temporary)
        assert not left, f"{what}: the next run left {left}"
        reporter.detail(f"{number + 1}/{rounds}: {how} at {moment} of {whole:.3f} s, {after}")
    return outcomes


def _left(place: Path, output: Path, temporary: Path) -> list[str]:
    """What lies beside the output, and in TMPDIR."""
    return sorted(path.name for path in [*place.iterdir(), *temporary.iterdir()] if path != output)


def main() -> None:
    """Command line of the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", choices=list(RUNS), default="given")
    options = parser.parse_args()
    for module in ("calibrator.comparison", "calibrator.stock_match", "hub_cards.card"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        tempfile.tempdir = os.path.join(folder, "temporary")
        os.mkdir(tempfile.tempdir)
        os.environ["TMPDIR"] = tempfile.tempdir
        outcomes = soak(Path(folder), options.rounds, options.seed, options.of, Console(verbose=True))
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:4} {outcome}\n")


if __name__ == "__main__":
    main()
