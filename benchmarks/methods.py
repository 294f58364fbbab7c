"""Every method on the bundled checkpoints, read on a held-out text: perplexity by length, seconds, and a picture.

    python -m benchmarks.methods --text mansfield-park.txt --output build/methods

The table has seed 0, and of methods that run with several seeds the median and range at the longest length. Runs in
OUTPUT/runs.json and scales in OUTPUT/scales are not found again, so that machines can share the work and lengths
can be added: the paper's setting reads 10 million tokens, hours on two cores and a minute on a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from calibrator.calibration import calibrate, prepare_calibration
from calibrator.evaluation.baselines import choose_window, sliding_losses
from calibrator.evaluation.perplexity import measure_lengths
from calibrator.methods import METHODS, scales_without_data
from calibrator.model import StockModel, device_name, load_model, pick_device
from calibrator.scaling import Scaling
from calibrator.settings import Settings
from calibrator.text import Text, TextSource, read_text, take_span
from converter.commands.opening import CALIBRATION_NOVEL, write_working_copy
from converter.layouts import read_checkpoint
from converter.lengths import format_length
from converter.reporting import Reporter
from converter.scales import ScaleSet
from converter.scales_file import save_scales
from converter.source import DEMOS, resolve
from hub_cards.drawing import AFTER, BEFORE, MUTED, log_axis, new_figure, png_bytes, style
from hub_cards.templates import markdown_table

LENGTHS = (256, 1024, 4096, 8192, 16384, 32768, 65536)
WINDOWS, TRAIN_LEN, TARGET_LEN = 2, 256, 8192
MODELS = ("demo", "demo:mamba")
SILENT = Reporter()


@dataclass(frozen=True)
class Contestant:
    """A method with its settings, and the seeds it runs with."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)


UNSCALED = Contestant("as trained", "")
SLIDING = Contestant("as trained, on a sliding window", "")
PAPER = {"preset": "paper", "granularity": "layer"}
OURS = "gradient, this tool's default"
PAPERS = ("SPSA, the paper's setting, linear", "SPSA, the paper's setting, power")
CONTESTANTS = (
    Contestant(OURS, "gradient"),
    Contestant("gradient, one factor a layer", "gradient", {"granularity": "layer"}),
    Contestant("SPSA, this tool's default", "spsa", seeds=(0, 1, 2)),
    Contestant(PAPERS[0], "spsa", PAPER, tuple(range(15))),
    Contestant(PAPERS[1], "spsa", PAPER | {"form": "power"}, tuple(range(15))),
    Contestant("one constant, searched for", "constant"),
    Contestant("clipped spectrum, no data", "winsorize"),
)


def run_all(demo: str, text: str, device: str, only: Iterable[str], path: Path) -> None:
    """Run the contestants on one checkpoint and add what they come to to the file at ``path``."""
    checkpoint = read_checkpoint(resolve(demo))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_working_copy(checkpoint, Path(temporary), SILENT)
        stock = load_model(folder, checkpoint.A_log, device=pick_device(device), dtype=torch.float32)
    novel = read_text(TextSource(CALIBRATION_NOVEL), stock.tokenizer, limit=1 << 20)
    held_out = read_text(TextSource(text), stock.tokenizer, limit=1 << 20)
    span = take_span(held_out, max(LENGTHS), WINDOWS)
    for contestant in (UNSCALED, SLIDING, *CONTESTANTS):
        if only and contestant.method not in only:
            continue
        for seed in contestant.seeds:
            key = {"model": demo, "method": contestant.name, "seed": seed}
            runs = read_runs(path)
            run = next((run for run in runs if run.items() >= key.items()), key)
            folder = path.parent / "scales" / _slug(key)
            if contestant.method and not folder.is_dir() and "perplexity" not in run:
                scales, found = find(stock, novel, contestant, seed)
                folder.mkdir(parents=True)
                save_scales(folder, scales, checkpoint.A_log)
                run |= found | {"device": device_name(stock)}
            known = run.get("perplexity", {})
            # A sliding window's perplexity does not depend on the length.
            wanted = LENGTHS[-1:] if contestant is SLIDING else LENGTHS
            lengths = [length for length in wanted if str(length) not in known]
            # A run whose scales were not kept stays as it is.
            if lengths and (folder.is_dir() or not contestant.method):
                if contestant is SLIDING:
                    window = choose_window(stock, novel.documents, TRAIN_LEN, span.shape[1])
                    known[str(wanted[0])] = float(sliding_losses(stock, span, window).mean().exp())
                else:
                    scales = ScaleSet.load(str(folder)) if contestant.method else None
                    known |= measure(stock, scales, span, lengths)
                run["perplexity"] = {str(length): known[str(length)] for length in wanted}
                others = [other for other in runs if not other.items() >= key.items()]
                path.write_text(json.dumps([*others, run], indent=1), encoding="utf-8")
                sys.stderr.write(f"{json.dumps(run)}\n")


def _slug(key: Mapping[str, Any]) -> str:
    return "-".join("".join(filter(str.isalnum, str(word))) for word in key.values())


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return runs


def find(stock: StockModel, text: Text, contestant: Contestant, seed: int) -> tuple[ScaleSet, dict[str, Any]]:
    """The scales of one contestant; with them the seconds that took and which iterate was kept."""
    shape = tuple(next(iter(stock.A_log.values())).shape)
    granularity = METHODS[contestant.method].granularity(shape)
    chosen = {"granularity": granularity, "form": "linear", "seed": seed} | dict(contestant.settings)
    settings = Settings(contestant.method, train_len=TRAIN_LEN, target_len=TARGET_LEN, **chosen)
    started = time.monotonic()
    arrays = ((key, value.double().cpu().numpy()) for key, value in stock.A_log.items())
    if scales := scales_without_data(arrays, settings):
        return scales, {"seconds": round(time.monotonic() - started, 1)}
    problem = prepare_calibration(stock, [text], settings, SILENT, f"benchmark {time.time_ns()}")
    outcome = calibrate(problem)
    problem.journal.remove()
    return outcome.scales, {"seconds": round(outcome.record.seconds, 1), "kept step": outcome.record.kept_step}


def measure(
    stock: StockModel, scales: ScaleSet | None, span: torch.Tensor, lengths: Sequence[int]
) -> dict[str, float]:
    """Perplexity by length under some scales."""
    scales = scales or ScaleSet.ones(
        {key: tuple(value.shape) for key, value in stock.A_log.items()}, "layer", "linear"
    )
    with Scaling(stock.mixers, stock.A_log, scales.granularity, scales.form) as scaling, stock.recurrence:
        scaling.load(scales)
        results = measure_lengths(stock, span, lengths, SILENT, "")
    return {str(result.length): result.perplexity for result in results}


def first_seeds(runs: Iterable[dict[str, Any]], model: str) -> dict[str, dict[str, Any]]:
    """Each method's run with the lowest seed; with it the perplexities at the longest length of all its seeds."""
    rows: dict[str, dict[str, Any]] = {}
    of_model = [run for run in runs if run["model"] == model]
    for name in (contestant.name for contestant in (UNSCALED, SLIDING, *CONTESTANTS)):
        seeds = sorted((run for run in of_model if run["method"] == name), key=lambda run: run["seed"])
        if seeds:
            rows[name] = seeds[0] | {"seeds": seeds}
    return rows


def median_of_seeds(row: Mapping[str, Any], length: int) -> float:
    """The median perplexity over seeds (of an even number the higher of the two in the middle)."""
    return statistics.median_high(run["perplexity"][str(length)] for run in row["seeds"])


def as_markdown(runs: list[dict[str, Any]]) -> str:
    """A table for each checkpoint, and what this tool's default is against the paper's setting."""
    longest = format_length(LENGTHS[-1])
    head = ["method", *map(format_length, LENGTHS), f"{longest}, median of seeds", "range", "seconds"]
    lines = []
    for model in MODELS:
        rows = first_seeds(runs, model)
        if not rows:
            continue
        table = []
        for name, row in rows.items():
            values = [f"{row['perplexity'][str(n)]:.2f}" if str(n) in row["perplexity"] else "" for n in LENGTHS]
            ends = [run["perplexity"][str(LENGTHS[-1])] for run in row["seeds"]]
            several = len(ends) > 1
            median = f"{median_of_seeds(row, LENGTHS[-1]):.2f} ({len(ends)})" if several else ""
            span = f"{min(ends):.2f} to {max(ends):.2f}" if several else ""
            table.append([name, *values, median, span, f"{row.get('seconds', '')}"])
        lines += [f"### {DEMOS[model]}", "", markdown_table(head, table), "", *_against(rows), ""]
    return "\n".join(lines)


def _against(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    if OURS not in rows or UNSCALED.name not in rows or not all(name in rows for name in PAPERS):
        return []
    ours, base = rows[OURS]["perplexity"], rows[UNSCALED.name]["perplexity"]
    short, long, quarter = LENGTHS[0], LENGTHS[-1], LENGTHS[-1] // 4
    best = min(PAPERS, key=lambda name: median_of_seeds(rows[name], long))
    lower = [
        f"{1 - ours[str(length)] / median_of_seeds(rows[best], length):.1%} lower at {format_length(length)}"
        for length in (long, quarter)
    ]
    return [
        f"{format_length(long)} over own {short}: {ours[str(long)] / ours[str(short)]:.3f}. Against the better of "
        f"the paper's settings ({best}, median of seeds): {', '.join(lower)}. At {short} "
        f"{ours[str(short)] / base[str(short)] - 1:+.2%} against as trained."
    ]


def draw(runs: list[dict[str, Any]]) -> bytes:
    """Perplexity by length of every method, one panel a checkpoint."""
    colors = {contestant.name: f"C{number}" for number, contestant in enumerate(CONTESTANTS)}
    colors |= {UNSCALED.name: BEFORE, SLIDING.name: MUTED, OURS: AFTER}
    with style():
        figure, axes = new_figure()
        figure.set_size_inches(11, 4.6)
        axes.remove()
        models = [model for model in MODELS if first_seeds(runs, model)]
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for panel, model in zip(panels, models, strict=True):
            low_high = []
            for name, row in first_seeds(runs, model).items():
                lengths = [int(length) for length in row["perplexity"]]
                values = list(row["perplexity"].values())
                low_high += values
                width = 2.6 if name in (OURS, UNSCALED.name) else 1.3
                panel.plot(
                    lengths, values, marker="o", markersize=3.5, color=colors[name], linewidth=width, label=name
                )
            log_axis(panel, low_high)
            panel.set_xscale("log", base=2)
            panel.set_xticks(LENGTHS, [format_length(length) for length in LENGTHS])
            panel.axvline(TRAIN_LEN, color=MUTED, linewidth=0.8, linestyle=":")
            panel.set_title(DEMOS[model])
            panel.set_xlabel("tokens in the window")
        panels[0].set_ylabel("perplexity")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
        return png_bytes(figure)


def main(
    text: Annotated[str, typer.Option(help="Held-out text.")],
    output: Annotated[Path, typer.Option(help="Folder for runs.json, methods.md and methods.png.")] = Path(
        "build/methods"
    ),
    model: Annotated[list[str] | None, typer.Option(help="demo, demo:mamba; both by default.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run what is missing, or lay out what is there.")
    ] = True,
) -> None:
    """Run what is missing and write the table and the picture."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "runs.json"
    for demo in (model or MODELS) if run else ():
        run_all(demo, text, device, method or (), path)
    runs = read_runs(path)
    (output / "methods.md").write_text(as_markdown(runs), encoding="utf-8")
    (output / "methods.png").write_bytes(draw(runs))


if __name__ == "__main__":
    typer.run(main)
