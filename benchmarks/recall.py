"""What calibration does to recall: many calibrations side by side on one GPU, read on a text that none saw.

    python -m benchmarks.recall JOBS.json --out FOLDER

JOBS.json is a list of objects: model (folder), data and held_out (text files), seed, the settings of a calibration,
and ``constants``, which replace those of :mod:`calibrator.methods.gradient`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from calibrator import calibration, facts
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import measure_recall
from calibrator.facts import FactSource
from calibrator.methods import METHODS, gradient
from calibrator.model import StockModel, load_model, pick_device
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text
from converter.commands.opening import write_working_copy
from converter.layouts import read_checkpoint
from converter.reporting import Reporter
from converter.scales import ScaleSet
from converter.source import resolve

CELLS = {
    512: (64, 250, 440),
    4096: (64, 450, 1000, 2000, 3900),
    16384: (450, 1000, 2000, 4000),
    65536: (64, 450, 2000),
}
SAMPLES = {512: 96, 4096: 64, 16384: 48, 65536: 32}
LENGTHS = (256, 512, 4096, 16384, 65536)
KINDS = ("random span", "slice", "pass key", "1 pair")


def layout(path: str, how: str) -> str:
    """The file's text as it is, or with its paragraphs unwrapped."""
    text = Path(path).read_text(encoding="utf-8")
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return {
        "as-is": text,
        "blank": "\n\n".join(paragraphs),
        "lines": "\n".join(paragraphs),
        "flat": " ".join(paragraphs),
    }[how]


def load(folder: str) -> StockModel:
    checkpoint = read_checkpoint(resolve(folder))
    with tempfile.TemporaryDirectory() as temporary:
        working = write_working_copy(checkpoint, Path(temporary), Reporter())
        return load_model(working, checkpoint.A_log, device=pick_device("auto"), dtype=torch.float32)


def tokens_of(stock: StockModel, path: str, how: str) -> Text:
    ids = torch.tensor(stock.tokenizer(layout(path, how)).input_ids)
    return Text(Path(path).name, (ids,))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One calibration and what it reads."""
    stock = load(job["model"])
    held_out = tokens_of(stock, job["held_out"], job.get("held_layout", "flat"))
    with stock.recurrence:
        layouts = {}
        for how in job.get("layouts", ()):
            text = tokens_of(stock, job["data"], how)
            windows = text.documents[0][: 32 * 512].view(32, 512)
            with torch.no_grad():
                layouts[how] = float(prediction_losses(stock, windows).mean()) * len(text.documents[0])
    result: dict[str, Any] = {"job": job, "layouts": layouts}
    shapes = {key: tuple(value.shape) for key, value in stock.A_log.items()}
    for name, value in job.get("constants", {}).items():
        setattr(facts if hasattr(facts, name) else gradient, name, value)
    scales: ScaleSet | None = None
    if job["method"] != "none":
        granularity = job.get("granularity") or METHODS[job["method"]].granularity(next(iter(shapes.values())))
        own = {k: job[k] for k in ("steps", "lr", "streams", "tau", "short_windows") if k in job}
        settings = Settings(
            method=job["method"],
            granularity=granularity,
            form="linear",
            train_len=job.get("train_len", 512),
            target_len=job.get("target_len", 16384),
            seed=job.get("seed", 0),
            validations=job.get("validations", 3),
            **own,
        )
        problem = calibration.pose(
            stock,
            [tokens_of(stock, job["data"], job.get("layout", "as-is"))],
            settings,
            Reporter(),
            str(time.time()),
        )
        outcome = calibration.calibrate(problem)
        problem.journal.remove()
        scales = outcome.scales
        result |= {
            "seconds": outcome.seconds,
            "kept_step": outcome.kept_step,
            "history": outcome.history,
            "guard": outcome.guard,
            "skills": outcome.skills,
            "kept_skills": outcome.kept_skills,
        }
        last = problem.validation.candidates[-1].scales
        if job.get("last"):
            scales = last
        values = torch.cat([torch.from_numpy(v).flatten() for v in scales.log_s.values()])
        result["log_s"] = [float(values.min()), float(values.median()), float(values.max())]
    scaling = Scaling(stock.mixers, stock.A_log, scales.granularity if scales else "layer", "linear")
    with scaling, stock.recurrence, torch.no_grad():
        if scales:
            scaling.load(scales)
        span = held_out.documents[0][: 2 * 65536].view(2, 65536)
        result["perplexity"] = {
            length: round(float(prediction_losses(stock, span.reshape(-1, length)[:64]).mean().exp()), 2)
            if length > 512
            else round(
                float(
                    torch.cat([prediction_losses(stock, part) for part in span.reshape(-1, length).split(16)])
                    .mean()
                    .exp()
                ),
                2,
            )
            for length in LENGTHS
        }
        source = FactSource(held_out.documents, stock.tokenizer)
        cells = measure_recall(stock, source, job.get("read", KINDS), CELLS, SAMPLES, 1, Reporter(), "")
        result["cells"] = [cell.record() for cell in cells]
    return result


def summary(result: dict[str, Any]) -> str:
    job = result["job"]
    lines = [
        f"== {job['name']}  {result.get('seconds', 0):.0f} s kept {result.get('kept_step')} log_s {result.get('log_s')} ppl {list(result['perplexity'].values())} {result.get('guard', '')[:60]}"
    ]
    for kind in dict.fromkeys(cell["kind"] for cell in result["cells"]):
        row = []
        for length in CELLS:
            cells = [c for c in result["cells"] if c["kind"] == kind and c["length"] == length]
            if kind == "slice":
                row.append("/".join(f"{c['nats']:.2f}" for c in cells))
            elif kind == "random span":
                row.append("/".join(f"{c['tokens']:.2f}".lstrip("0") for c in cells))
            else:
                row.append("/".join(f"{c['found'] / c['samples']:.2f}".lstrip("0") for c in cells))
        lines.append(f"   {kind:12s} " + " | ".join(row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=int)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    jobs = json.loads(options.jobs.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only is not None:
        result = run(jobs[options.only])
        (options.out / f"{jobs[options.only]['name']}.json").write_text(json.dumps(result))
        print(summary(result), flush=True)
        return

    def start(index: int) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.recall",
            str(options.jobs),
            "--out",
            str(options.out),
            "--only",
            str(index),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
        print(
            done.stdout.strip()
            if done.returncode == 0
            else f"== {jobs[index]['name']} FAILED {done.stderr[-300:]}",
            flush=True,
        )

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(start, range(len(jobs))))
    (options.out / "all.json").write_text(
        json.dumps([json.loads(p.read_text()) for p in options.out.glob("*.json") if p.name != "all.json"])
    )


if __name__ == "__main__":
    main()
