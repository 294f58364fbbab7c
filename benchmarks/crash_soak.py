"""Ends conversions at random moments and checks that the output is whole or not there.

    python -m benchmarks.crash_soak --rounds 100

Each round forks from a process that has everything imported, copies, bakes and verifies a checkpoint, and gets a
signal after a random time up to 1.3 times that of a whole run: SIGKILL, SIGTERM or SIGINT, the latter two with or
without a second soon after. Then the output's name must stand for a complete, proved conversion or for nothing (for
the former output where one was being replaced), and the next run must succeed and leave nothing beside it and in
TMPDIR; a run that was not killed leaves nothing itself. Exits with 1 at the first failure.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.synthetic import constant_scales, write_checkpoint
from converter.baking import bake
from converter.commands.console import Console
from converter.commands.provenance import source_record
from converter.digests import sealed
from converter.interruption import Interrupted, end_on_signals
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.output import staged
from converter.proof import verify
from converter.reporting import Reporter
from converter.scales_file import load_scales, save_scales
from converter.source import resolve
from converter.temporary import temporary_folder

HIDDEN, LAYERS = 512, 8
ENDING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (
    (signal.SIGKILL,),
    (signal.SIGTERM,),
    (signal.SIGINT,),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT),
)
FACTORS = (1.5, 3.0)


def convert(model: Path, output: Path, factor: float, overwrite: bool) -> None:
    """One complete run of the file side."""
    checkpoint = read_checkpoint(resolve(str(model)))
    scales = constant_scales(checkpoint, factor)
    with temporary_folder() as working, staged(output, overwrite, model) as folder:
        bake(checkpoint, working, scales=None)
        report = bake(checkpoint, folder, scales=scales)
        save_scales(folder, scales, checkpoint.A_log)
        manifest = Manifest(
            source=source_record(checkpoint.snapshot, checkpoint),
            target="A",
            form="linear",
            granularity="layer",
            load_dtype=checkpoint.load_dtype,
            changed=report.changed,
            identical_tensors=report.identical,
            texts=[],
            calibration=None,
            perplexity=None,
            versions={},
            command="",
        )
        sealed(manifest, folder).write(folder)
        verify(resolve(str(folder), compose=True), checkpoint)


def state_of(model: Path, output: Path) -> str:
    """``nothing``, or ``factor F`` for a complete conversion. Raises MmodError for anything else."""
    if not output.exists():
        return "nothing"
    verify(resolve(str(output), compose=True), read_checkpoint(resolve(str(model))))
    scales = load_scales(str(output))
    return f"factor {scales.factors(next(iter(scales.log_s))).item():.1f}"


def run_ended(
    model: Path, output: Path, factor: float, overwrite: bool, signals: Sequence[tuple[float, signal.Signals]]
) -> int:
    """Convert in a fork that gets signals, each after so many seconds; returns its exit status."""
    # Until the child has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            end_on_signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            convert(model, output, factor, overwrite)
            status = 0
        except Interrupted as error:
            status = 128 + error.number
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    for seconds, number in signals:
        time.sleep(seconds)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def soak(folder: Path, rounds: int, seed: int, reporter: Reporter) -> Counter[str]:
    """Run ``rounds`` rounds below ``folder`` and count how they ended.

    Raises:
        AssertionError, MmodError: an output was neither whole nor absent, or a leftover stayed.
    """
    model, place = folder / "model", folder / "outputs"
    write_checkpoint(model, hidden=HIDDEN, layers=LAYERS, shards=3, vocabulary=2048)
    place.mkdir()
    output = place / "converted"
    started = time.perf_counter()
    convert(model, output, FACTORS[0], overwrite=False)
    whole = time.perf_counter() - started
    generator, outcomes = random.Random(seed), Counter[str]()
    temporary = Path(tempfile.gettempdir())
    for number in range(rounds):
        overwrite = number % 2 == 1
        if not overwrite:
            shutil.rmtree(output)
        before, factor = state_of(model, output), FACTORS[number % 2]
        seconds, numbers = generator.uniform(0, 1.3 * whole), generator.choice(SIGNALS)
        pauses = (seconds, generator.uniform(0, 0.02))
        signals = list(zip(pauses, numbers, strict=False))
        status = run_ended(model, output, factor, overwrite, signals)
        how = "ended" if status == 0 else "killed" if status == -signal.SIGKILL else "interrupted"
        after = state_of(model, output)
        allowed = {before, f"factor {factor}"} | ({"nothing"} if how == "killed" else set())
        what = f"round {number}: {signals}: {how} ({status})"
        assert after in allowed, f"{what}: {after}, not one of {allowed}"
        assert how != "ended" or after == f"factor {factor}", f"{what}, yet {after}"
        assert how != "interrupted" or status in (128 + signal.SIGINT, 128 + signal.SIGTERM), what
        left = _left(place, output, temporary)
        assert not left or how == "killed", f"{what}: left {left}"
        outcomes[f"{'replacing' if overwrite else 'new'}: {how}, {after}"] += 1
        outcomes["with leftovers"] += bool(left)
        convert(model, output, factor, overwrite=True)
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        tempfile.tempdir = os.path.join(folder, "temporary")
        os.mkdir(tempfile.tempdir)
        outcomes = soak(Path(folder), options.rounds, options.seed, Console(verbose=True))
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:4} {outcome}\n")


if __name__ == "__main__":
    main()
