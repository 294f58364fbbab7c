"""Times and peak memory of the file side against the plain alternatives, on a synthetic checkpoint.

    python -m benchmarks.files --folder FOLDER_ON_THE_DISK_TO_MEASURE

Writes a Mamba-2 checkpoint in bf16 (by default with the shapes of mamba2-2.7b, 5.4 GB in 3 shards) and runs, one
after the other and each in a process of its own: `cp -r`; loading with transformers, editing, `save_pretrained`;
`mmod bake` without and with its proof (all four until the bytes are on the disk); `mmod verify`; `mmod inspect`;
and so on for as many rounds as asked for. A_log is bf16 in the source and fp32 in the result, so that every header
changes. Needs twice the checkpoint's size on the disk. Prints medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.synthetic import constant_scales, write_checkpoint
from converter.layouts import read_checkpoint
from converter.manifest import SCALES_NAME
from converter.scales_file import save_scales
from converter.source import resolve

_MMOD = "import sys; from converter.__main__ import main; sys.argv[0] = 'mmod'; main()"
_COPY = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} + && sync "$1"'
_MEASURE = """
import os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
started = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(process, 0)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""
_LOAD_AND_SAVE = """
import os, sys, numpy, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.add_(float(numpy.log(1.5)))
model.save_pretrained(sys.argv[2], max_shard_size="2GB")
for path in Path(sys.argv[2]).iterdir():
    with open(path) as file:
        os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Run:
    """Wall and processor time in seconds, and peak resident memory in MB, of one process with its start."""

    seconds: float
    processor: float
    peak: float


def run(*command: str | Path) -> Run:
    """Run a command to its end. Raises CalledProcessError where it fails."""
    # A process inherits the peak of the one that starts it, so a small one of its own starts and measures each.
    words = [sys.executable, "-S", "-c", _MEASURE, *map(str, command)]
    figures = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Run(*map(float, figures))


def measure(folder: Path, hidden: int, layers: int, rounds: int) -> dict[str, list[Run]]:
    """Run everything below ``folder``, which must be empty, and return the runs by name."""
    model, out, scales = folder / "model", folder / "out", folder / SCALES_NAME
    write_checkpoint(model, hidden=hidden, layers=layers, shards=3)
    checkpoint = read_checkpoint(resolve(str(model)))
    save_scales(folder, constant_scales(checkpoint, 1.5), checkpoint.A_log)
    mmod = (sys.executable, "-c", _MMOD)
    bake = (*mmod, "bake", model, out, "--scales", scales, "--quiet")
    writing: dict[str, tuple[str | Path, ...]] = {
        "cp -r": ("sh", "-c", _COPY, model, out),
        "load, edit, save_pretrained": (sys.executable, "-c", _LOAD_AND_SAVE, model, out),
        "mmod bake --no-proof": (*bake, "--no-proof"),
        "mmod bake": bake,
    }
    reading: dict[str, tuple[str | Path, ...]] = {
        "mmod verify --no-load": (*mmod, "verify", out, "--base", model, "--no-load", "--quiet"),
        "mmod inspect": (*mmod, "inspect", model, "--quiet"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in writing | reading}
    for _ in range(rounds):
        for name, command in (writing | reading).items():
            if name in writing and out.exists():
                shutil.rmtree(out)
            os.sync()
            runs[name].append(run(*command))
            sys.stderr.write(f"{name}: {runs[name][-1]}\n")
        shutil.rmtree(out)
    return runs


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmod-files-", dir=options.folder) as folder:
        runs = measure(Path(folder), options.hidden, options.layers, options.rounds)
    copy = statistics.median(entry.seconds for entry in runs["cp -r"])
    sys.stdout.write("| command | median s | fastest s | times cp -r | processor s | peak MB |\n")
    sys.stdout.write("|---|---:|---:|---:|---:|---:|\n")
    for name, entries in runs.items():
        seconds = [entry.seconds for entry in entries]
        median, peak = statistics.median(seconds), max(entry.peak for entry in entries)
        processor = statistics.median(entry.processor for entry in entries)
        times = (median, min(seconds), median / copy, processor)
        sys.stdout.write(f"| `{name}` | {' | '.join(f'{figure:.2f}' for figure in times)} | {peak:.0f} |\n")


if __name__ == "__main__":
    main()
