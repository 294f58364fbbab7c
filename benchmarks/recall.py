"""Recall before and after: models calibrated with the defaults over several seeds, read on a text that none saw.

    python -m benchmarks.recall MODEL... --train-len 512 --data persuasion.txt --held-out mansfield-park.txt \\
        --runs none,sliding,chunks,0,1,2 --out FOLDER

Each model and seed runs in a process of its own, ``--workers`` of them side by side. Every result is a JSON file in
FOLDER; the table is made of all that are there.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.longppl import find_key_tokens, long_perplexity
from calibrator.calibration import calibrate, prepare_calibration
from calibrator.evaluation.baselines import at_end, choose_window, in_chunks, sliding_losses
from calibrator.evaluation.memory import half_interval, share_found
from calibrator.evaluation.perplexity import prediction_losses
from calibrator.evaluation.recall import measure_recall
from calibrator.facts import FactSource
from calibrator.line_ends import choose_arrangement
from calibrator.methods import METHODS
from calibrator.model import StockModel, device_name, load_model, pick_device
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text, TextSource, read_text
from converter.commands.opening import write_working_copy
from converter.layouts import read_checkpoint
from converter.lengths import format_length, parse_length
from converter.reporting import Reporter
from converter.scales import ScaleSet
from converter.source import resolve
from hub_cards.templates import markdown_table

KINDS = ("pass key", "1 pair", "random span", "slice")
DISTANCES = {1: (64, 250, 440), 8: (64, 450, 1000, 2000, 3900), 32: (450, 1000, 2000, 4000), 128: (64, 450, 2000)}
"""By length in training lengths of 512."""
SAMPLES = {1: 96, 8: 64, 32: 48, 128: 32}
BASELINES = {"none": None, "sliding": at_end, "chunks": in_chunks}
"""The model as trained, on whole prompts, on their ends, and in chunks."""


def load(model: str) -> StockModel:
    """The model in float32 on the best device there is."""
    checkpoint = read_checkpoint(resolve(model, compose=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_working_copy(checkpoint, Path(temporary), Reporter())
        return load_model(folder, checkpoint.A_log, device=pick_device("auto"), dtype=torch.float32)


def read(stock: StockModel, path: str) -> Text:
    """A text as a conversion reads it."""

    def arrange(content: str) -> Any:
        return choose_arrangement(stock, content)[0]

    with stock.recurrence:
        return read_text(TextSource(path), stock.tokenizer, limit=1 << 20, arrange=arrange)


def read_paragraphs(stock: StockModel, path: str) -> Text:
    """A text with its paragraphs in one line each, an empty line between them."""

    def join(content: str) -> str:
        return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", content))

    return read_text(TextSource(path), stock.tokenizer, limit=1 << 20, arrange=lambda _content: join)


def measure(
    model: str,
    run: str,
    train_len: int,
    target_len: int,
    data: str,
    held_out: str,
    longest: int,
    samples: int | None,
) -> dict[str, Any]:
    """One model as trained, read by a baseline, calibrated with a seed or scaled as a folder is: what it finds."""
    stock = load(model)
    text = read(stock, held_out)
    result: dict[str, Any] = {"model": Path(model).name, "run": run, "device": device_name(stock)}
    places = {n * train_len: [d * train_len // 512 for d in ds] for n, ds in DISTANCES.items() if n <= longest}
    span = read_paragraphs(stock, held_out).documents[0][: 2 * max(places)].view(2, -1)
    scales = None
    if run not in BASELINES and not run.isdigit():
        scales = ScaleSet.load(run)
    elif run not in BASELINES:
        granularity = METHODS["gradient"].granularity(tuple(next(iter(stock.A_log.values())).shape))
        settings = Settings("gradient", granularity, "linear", train_len, target_len, seed=int(run))
        problem = prepare_calibration(stock, [read(stock, data)], settings, Reporter(), f"benchmark {model}")
        outcome = calibrate(problem)
        problem.journal.remove()
        scales = outcome.scales
        result |= {
            "seconds": outcome.record.seconds,
            "kept_step": outcome.record.kept_step,
            "guard": outcome.record.guard,
            "skills": outcome.skills,
            "kept_skills": outcome.kept_skills,
            "history": outcome.record.history,
        }
    with stock.recurrence:
        keys = find_key_tokens(stock, span.reshape(-1, train_len), train_len // 8)
        window = choose_window(stock, [read(stock, data).documents[0]], train_len, span.numel())
    result |= {"key_tokens": int(keys.sum()), "window": window}
    scaling = Scaling(stock.mixers, stock.A_log, scales.granularity, "linear") if scales else nullcontext()
    with scaling, stock.recurrence, torch.no_grad():
        if scales:
            scaling.load(scales)
        if run == "sliding":
            curves = {"any": sliding_losses(stock, span, window)}
        else:
            lengths = places if run != "chunks" else []
            curves = {format_length(n): prediction_losses(stock, span.reshape(-1, n)) for n in lengths}
        result["perplexity"] = {length: float(losses.mean().exp()) for length, losses in curves.items()}
        result["LongPPL"] = {length: long_perplexity(losses, keys) for length, losses in curves.items()}
        source = FactSource(text.documents, stock.tokenizer)
        counts = {shares * train_len: samples or count for shares, count in SAMPLES.items()}
        reader = BASELINES.get(run)
        cells = measure_recall(
            stock, source, KINDS, places, counts, 1, Reporter(), "", reader(window) if reader else None
        )
        result["cells"] = [
            cell.record() | {"share": share_found(cell), "error": half_interval(cell)} for cell in cells
        ]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One row a model, seed, kind and length, the distances side by side."""
    rows = []
    for result in sorted(results, key=lambda r: (r["model"], r["run"] not in BASELINES, r["run"])):
        who = f"{result['model']}, {result['run']}"
        found: dict[tuple[str, int], list[str]] = {}
        for cell in result["cells"]:
            shown = f"{format_length(cell['distance'])}: {cell['share']:.2f}"
            found.setdefault((cell["kind"], cell["length"]), []).append(shown)
        rows += [
            (who, kind, format_length(length), ", ".join(reversed(row))) for (kind, length), row in found.items()
        ]
        for figure in ("perplexity", "LongPPL"):
            curve = ", ".join(f"{length}: {value:.1f}" for length, value in result[figure].items())
            rows.append((who, figure, "", curve))
    return markdown_table(("model", "fact", "text", "share found by distance"), rows)


def main(
    models: list[str],
    data: Annotated[str, typer.Option(help="Text to calibrate on.")],
    held_out: Annotated[str, typer.Option(help="Text to read on.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    train_len: Annotated[str, typer.Option(help="Training length.")] = "512",
    target_len: Annotated[str, typer.Option(help="Length to calibrate for.")] = "16k",
    runs: Annotated[
        str,
        typer.Option(
            help="Seeds to calibrate with, or converted folders; none, sliding and chunks read the model as it is."
        ),
    ] = "none,sliding,chunks,0,1,2",
    longest: Annotated[int, typer.Option(help="Training lengths of the longest text.")] = max(DISTANCES),
    samples: Annotated[
        int | None, typer.Option(help="Prompts a cell; by default fewer the longer they are.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    only: Annotated[str | None, typer.Option(help="One of the runs, in this process.")] = None,
) -> None:
    """Measure, and print the table of all results in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    lengths = parse_length(train_len), parse_length(target_len)
    if only is not None:
        [model] = models
        result = measure(model, only, *lengths, data, held_out, longest, samples)
        (out / f"{Path(model).name}-{Path(only).name}.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    options = ["--data", data, "--held-out", held_out, "--out", str(out)]
    options += ["--train-len", train_len, "--target-len", target_len, "--longest", str(longest)]
    options += ["--samples", str(samples)] if samples else []

    def start(run: tuple[str, str]) -> int:
        command = [sys.executable, "-m", "benchmarks.recall", run[0], *options, "--only", run[1]]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(workers) as pool:
        failed = sum(code != 0 for code in pool.map(start, itertools.product(models, runs.split(","))))
    print(table([json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]))
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
