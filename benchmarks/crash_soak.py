"""Kills conversions at random moments and checks that the output is whole or not there.

    python -m benchmarks.crash_soak --rounds 100

Each round forks from a process that has everything imported, bakes and verifies a checkpoint, and is killed with
SIGKILL after a random time up to 1.3 times that of a whole run. Then the output's name must stand for a
complete, proved conversion or for nothing (for the former output where one was being replaced), and the next run
must succeed and leave nothing beside it. Exits with 1 at the first failure.
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
from pathlib import Path

from benchmarks.synthetic import constant_scales, write_checkpoint
from converter.bake import bake
from converter.commands.console import Console
from converter.commands.provenance import source_record
from converter.layouts import read_checkpoint
from converter.manifest import Manifest
from converter.output import staged
from converter.reporting import Reporter
from converter.scales_file import load_scales, save_scales
from converter.source import resolve
from converter.verify import verify

HIDDEN, LAYERS = 512, 8
FACTORS = (1.5, 3.0)


def convert(model: Path, output: Path, factor: float, overwrite: bool) -> None:
    """One complete run of the file side."""
    checkpoint = read_checkpoint(resolve(str(model)))
    scales = constant_scales(checkpoint, factor)
    with staged(output, overwrite, model) as folder:
        report = bake(checkpoint, folder, scales=scales)
        save_scales(folder, scales, checkpoint.A_log)
        Manifest(
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
        ).write(folder)
        verify(resolve(str(folder), compose=True), checkpoint)


def state_of(model: Path, output: Path) -> str:
    """``nothing``, or ``factor F`` for a complete conversion. Raises MmodError for anything else."""
    if not output.exists():
        return "nothing"
    verify(resolve(str(output), compose=True), read_checkpoint(resolve(str(model))))
    scales = load_scales(str(output))
    return f"factor {scales.factors(next(iter(scales.log_s))).item():.1f}"


def run_killed(model: Path, output: Path, factor: float, overwrite: bool, seconds: float) -> bool:
    """Convert in a fork, killed after ``seconds``; returns whether the run ended before."""
    child = os.fork()
    if child == 0:
        try:
            convert(model, output, factor, overwrite)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


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
    for number in range(rounds):
        overwrite = number % 2 == 1
        if not overwrite:
            shutil.rmtree(output)
        before, factor = state_of(model, output), FACTORS[number % 2]
        seconds = generator.uniform(0, 1.3 * whole)
        ended = run_killed(model, output, factor, overwrite, seconds)
        after = state_of(model, output)
        allowed = {before, "nothing", f"factor {factor}"}
        assert after in allowed, f"round {number}: {after} after {seconds:.3f} s, not one of {allowed}"
        assert not ended or after == f"factor {factor}", f"round {number}: ended, yet {after}"
        left = sorted(path.name for path in place.iterdir() if path != output)
        outcomes[f"{'replacing' if overwrite else 'new'}: {'ended' if ended else 'killed'}, {after}"] += 1
        outcomes["with leftovers"] += bool(left)
        convert(model, output, factor, overwrite=True)
        left = sorted(path.name for path in place.iterdir() if path != output)
        assert not left, f"round {number}: the next run left {left}"
        reporter.detail(f"{number + 1}/{rounds}: killed after {seconds:.3f} of {whole:.3f} s, {after}")
    return outcomes


def main() -> None:
    """Command line of the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmod-soak-") as folder:
        outcomes = soak(Path(folder), options.rounds, options.seed, Console(verbose=True))
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count:4} {outcome}\n")


if __name__ == "__main__":
    main()
