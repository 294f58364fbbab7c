"""Ends conversions at random moments and checks that the output is whole or not there.

    python -m benchmarks.crash_soak --rounds 100 [--calibrate]

Each round forks from a process that has everything imported, converts a checkpoint with a given factor or, with
``--calibrate``, a smaller one by a short calibration, and gets a signal after a random time up to 1.3 times that of
a whole run: SIGKILL, SIGTERM or SIGINT, the latter two with or without a second soon after. Then the output's name
must stand for a complete, proved conversion or for nothing (for the former output where one was being replaced),
and the next run must succeed and leave nothing beside it and in TMPDIR; a run that was not killed leaves nothing
itself. Exits with 1 at the first failure.
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
from dataclasses import replace
from pathlib import Path

from benchmarks.synthetic import write_checkpoint
from converter.commands.console import Console
from converter.commands.convert import convert
from converter.commands.opening import CALIBRATION_NOVEL, HELD_OUT_NOVEL, NOVELS
from converter.commands.requests import ConvertRequest
from converter.interruption import Interrupted, end_on_signals
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


def given(model: Path, output: Path, seed: int, overwrite: bool) -> ConvertRequest:
    """A conversion without a calibration, told apart by its seed."""
    request = ConvertRequest(str(model), output, 256, seed=seed, overwrite=overwrite, windows=0)
    return replace(request, method="constant", factor=2.0)


def calibrated(model: Path, output: Path, seed: int, overwrite: bool) -> ConvertRequest:
    """A conversion by a calibration of one step, told apart by its seed."""
    request = ConvertRequest(str(model), output, 256, 64, seed=seed, overwrite=overwrite, windows=0)
    return replace(request, steps=1, device="cpu", data=(CALIBRATION_NOVEL,), held_out=HELD_OUT_NOVEL)


def state_of(model: Path, output: Path) -> str:
    """``nothing``, or ``seed N`` for a complete conversion. Raises MmodError for anything else."""
    if not output.exists():
        return "nothing"
    verify(resolve(str(output), compose=True), read_checkpoint(resolve(str(model))))
    manifest = Manifest.read(output)
    assert manifest is not None and manifest.calibration is not None
    return f"seed {manifest.calibration.seed}"


def run_ended(request: ConvertRequest, signals: Sequence[tuple[float, signal.Signals]]) -> int:
    """Convert in a fork that gets signals, each after so many seconds; returns its exit status."""
    # Until the child has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            end_on_signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            convert(request, Reporter())
            status = 0
        except Interrupted as error:
            status = 128 + error.number
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    for seconds, number in signals:
        time.sleep(seconds)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def soak(folder: Path, rounds: int, seed: int, calibrate: bool, reporter: Reporter) -> Counter[str]:
    """Run ``rounds`` rounds below ``folder`` and count how they ended.

    Raises:
        AssertionError, MmodError: an output was neither whole nor absent, or a leftover stayed.
    """
    model, place = folder / "model", folder / "outputs"
    hidden, layers = (64, 2) if calibrate else (512, 8)
    write_checkpoint(model, hidden=hidden, layers=layers, shards=3, vocabulary=4096)
    shutil.copy(TOKENIZER, model)
    place.mkdir()
    output = place / "converted"
    make = calibrated if calibrate else given
    started = time.perf_counter()
    assert run_ended(make(model, output, rounds, False), ()) == 0
    whole = time.perf_counter() - started
    generator, outcomes = random.Random(seed), Counter[str]()
    temporary = Path(tempfile.gettempdir())
    for number in range(rounds):
        overwrite = number % 2 == 1
        if not overwrite:
            shutil.rmtree(output)
        before = state_of(model, output)
        seconds, numbers = generator.uniform(0, 1.3 * whole), generator.choice(SIGNALS)
        pauses = (seconds, generator.uniform(0, 0.02))
        signals = list(zip(pauses, numbers, strict=False))
        status = run_ended(make(model, output, number, overwrite), signals)
        how = "ended" if status == 0 else "killed" if status == -signal.SIGKILL else "interrupted"
        after = state_of(model, output)
        allowed = {before, f"seed {number}"} | ({"nothing"} if how == "killed" else set())
        what = f"round {number}: {signals}: {how} ({status})"
        assert after in allowed, f"{what}: {after}, not one of {allowed}"
        assert how != "ended" or after == f"seed {number}", f"{what}, yet {after}"
        assert how != "interrupted" or status in (128 + signal.SIGINT, 128 + signal.SIGTERM), what
        left = _left(place, output, temporary)
        assert not left or how == "killed", f"{what}: left {left}"
        kept = "nothing" if after == "nothing" else "the former" if after == before else "the new one"
        outcomes[f"{'replacing' if overwrite else 'new'}: {how}, {kept}"] += 1
        outcomes["with leftovers"] += bool(left)
        assert run_ended(given(model, output, rounds + number, True), ()) == 0, f"{what}: the next run failed"
        left = _left(place, output, temporary)
        assert not left, f"{what}: the next run left {left}"
        reporter.detail(f"{number + 1}/{rounds}: {how} after {seconds:.3f} of {whole:.3f} s, {after}")
    return outcomes


def _left(place: Path, output: Path, temporary: Path) -> list[str]:
    """What lies beside the output, and in TMPDIR."""
    return sorted(path.name for path in [*place.iterdir(), *temporary.iterdir()] if path != output)


def main() -> None:
    """Command line of the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", action="store_true")
    options = parser.parse_args()
    for module in ("calibrator.comparison", "calibrator.stock_match", "hub_cards.card"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        tempfile.tempdir = os.path.join(folder, "temporary")
        os.mkdir(tempfile.tempdir)
        outcomes = soak(Path(folder), options.rounds, options.seed, options.calibrate, Console(verbose=True))
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:4} {outcome}\n")


if __name__ == "__main__":
    main()
