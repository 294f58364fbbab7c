"""Time and peak memory of `mmod bake` on a GGUF file against `cp`.

    python -m benchmarks.gguf_files --folder FOLDER_ON_THE_DISK_TO_MEASURE

Writes a file of 5 GB with the shapes of a Mamba-2 model in F16 and runs, each in a process of its own and until the
bytes are on the disk, `cp`, `mmod bake` with its proof and `mmod inspect`, as many rounds as asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from benchmarks.files import _COPY, _MMOD, Run, run
from converter.layouts import Tensor
from converter.safetensors_file import TensorInfo, header_bytes
from converter.scales import ScaleSet
from converter.scales_file import save_scales
from converter.shards import SafetensorsShard, opening

LAYERS, HIDDEN, INNER, HEADS = 64, 2560, 5120, 80


def write_model(path: Path) -> None:
    """A GGUF file of 5 GB whose ssm_a are those of A_log = 0.1, 0.2, …"""
    generator = np.random.default_rng(0)
    matrices = {"ssm_in": (2 * INNER + 336, HIDDEN), "ssm_out": (HIDDEN, INNER)}
    data = {
        name: generator.integers(0, 1 << 14, shape, np.uint16).view(np.float16) for name, shape in matrices.items()
    }
    data["ssm_a"] = -np.exp(_A_log()).astype(np.float32).reshape(HEADS, 1)
    writer = gguf.GGUFWriter(path, "mamba2", use_temp_file=False)
    writer.add_context_length(2048)
    writer.add_token_list([f"token {number}" for number in range(50280)])
    for layer in range(LAYERS):
        for name, values in data.items():
            ending = "" if name == "ssm_a" else ".weight"
            writer.add_tensor(f"blk.{layer}.{name}{ending}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _A_log() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (np.arange(1, HEADS + 1) / 10).astype(np.float32)


def write_scales(folder: Path) -> None:
    """Factors of 1.5 for that model, with the A_log of its base."""
    names = [f"backbone.layers.{layer}.mixer.A_log" for layer in range(LAYERS)]
    raw = folder / "A_log.safetensors"
    infos = [TensorInfo(name, "F32", (HEADS,)) for name in names]
    raw.write_bytes(header_bytes(infos, {}) + _A_log().tobytes() * LAYERS)
    shard = SafetensorsShard.open(raw.name, opening(raw))
    log_s = {name: np.full(1, np.log(1.5), np.float32) for name in names}
    base = {info.name: Tensor(info.name, info, shard) for info in infos}
    save_scales(folder, ScaleSet("linear", "layer", log_s), base)


def measure(folder: Path, rounds: int) -> dict[str, list[Run]]:
    """Run everything below ``folder``, which must be empty, and return the runs by name."""
    model, out = folder / "model" / "model.gguf", folder / "out"
    model.parent.mkdir()
    write_model(model)
    write_scales(folder)
    mmod = (sys.executable, "-c", _MMOD)
    commands: dict[str, tuple[str | Path, ...]] = {
        "cp": ("sh", "-c", _COPY, model.parent, out),
        "mmod bake": (*mmod, "bake", model, out, "--scales", folder, "--quiet"),
        "mmod inspect": (*mmod, "inspect", model, "--quiet"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            if out.exists():
                shutil.rmtree(out)
            os.sync()
            runs[name].append(run(*command))
            sys.stderr.write(f"{name}: {runs[name][-1]}\n")
    return runs


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmod-gguf-", dir=options.folder) as folder:
        runs = measure(Path(folder), options.rounds)
    copy = statistics.median(entry.seconds for entry in runs["cp"])
    sys.stdout.write("| command | median s | times cp | peak MB |\n|---|---:|---:|---:|\n")
    for name, entries in runs.items():
        median = statistics.median(entry.seconds for entry in entries)
        peak = max(entry.peak for entry in entries)
        sys.stdout.write(f"| `{name}` | {median:.2f} | {median / copy:.2f} | {peak:.0f} |\n")


if __name__ == "__main__":
    main()
