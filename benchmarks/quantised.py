"""Calibration through quantised weights against calibration through the plain ones: factors and perplexity.

    python -m tests.consumers.run_quantised quantise BASE
    python -m benchmarks.quantised BASE BASE-torchao-int4 --text mansfield-park.txt --out FOLDER

Each model is calibrated with the defaults. Then the factors of each copy are baked into BASE and into the copy, and
so are those of BASE; all are read at 256 and 64k. Needs the quantiser in the Python path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from calibrator import calibrate, evaluate
from converter import ScaleSet, bake
from converter.commands.console import Console
from converter.layouts import read_checkpoint
from converter.scales_file import find_scales, save_scales
from converter.source import resolve

LENGTHS = (256, 64 << 10)
NOVEL = Path(__file__).parents[1] / "converter" / "demo" / "texts" / "persuasion.txt"


def factors(model: Path, folder: Path, target_len: int) -> ScaleSet:
    """The factors of a model, found once."""
    if find_scales(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        options = {"data": (str(NOVEL),), "train_len": LENGTHS[0], "target_len": target_len}
        found = calibrate(model, reporter=Console(), **options)
        save_scales(folder, found, read_checkpoint(resolve(str(model), compose=True)).A_log)
    return ScaleSet.load(folder)


def median_difference(found: ScaleSet, wanted: ScaleSet) -> float:
    """The median over all factors of how far one is from the other, relative to it."""
    differences = [np.abs(np.expm1(found.log_s[name] - log_s)).ravel() for name, log_s in wanted.log_s.items()]
    return float(np.median(np.concatenate(differences)))


def main() -> None:
    """Calibrate, bake, measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("copies", type=Path, nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--target-len", type=int, default=8 << 10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models = [arguments.base, *arguments.copies]
    scales = {
        model: factors(model, arguments.out / f"{model.name}-scales", arguments.target_len) for model in models
    }
    lines = [
        "| weights | factors of | median difference to the plain weights' | 256 | 64k |",
        "|---|---|---:|---:|---:|",
    ]
    for copy in arguments.copies:
        for weights in (arguments.base, copy):
            for origin in (None, arguments.base, copy):
                folder, difference = weights, ""
                if origin:
                    folder = arguments.out / f"{weights.name}-by-{origin.name}"
                    bake(weights, folder, scales[origin], overwrite=True)
                    difference = f"{median_difference(scales[origin], scales[arguments.base]):.2%}"
                [record] = evaluate(folder, text=(arguments.text,), lengths=LENGTHS, windows=1)["models"]
                values = " | ".join(f"{record['perplexity'][str(length)]:.2f}" for length in LENGTHS)
                lines.append(f"| {weights.name} | {origin.name if origin else 'none'} | {difference} | {values} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
