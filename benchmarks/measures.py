"""The paper's own measures, beside those of ``mmod evaluate``: last predictions, pass keys, state norm, spectrum.

    python -m benchmarks.measures demo --task spectrum --output FOLDER
    python -m benchmarks.measures demo --comparator longmamba --lengths 256,16k

``--comparator`` puts other forward passes beside a model; ``--output`` gets pictures beside the JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.comparators import Comparator, ConstantScaling, fit_longmamba, fit_mambaextend, make_decimamba
from benchmarks.harness import measure_tasks
from benchmarks.long_tasks import measure_long_tasks
from benchmarks.passkey import Filler, make_samples, measure_retrieval
from benchmarks.pictures import draw_pictures
from benchmarks.spectrum import measure_spectrum
from benchmarks.state_norm import measure_state_norms
from calibrator.chosen_texts import read_as_one
from calibrator.evaluation.perplexity import measure_lengths, tail_losses, take_ends
from calibrator.text import TextSource, take_span
from calibrator.train_len import look_up_train_len, measure_train_len
from converter.commands import evaluate
from converter.commands.ending import run_application
from converter.commands.evaluate import Entry, Table, Task, length_table, perplexity_entry, perplexity_tables
from converter.commands.opening import CALIBRATION_NOVEL, Opened
from converter.commands.parameters import Output, register
from converter.commands.requests import LENGTH, EvaluateRequest
from converter.errors import UsageError
from converter.json_text import json_text
from converter.lengths import format_length

COMPARATORS = ("mambaextend", "longmamba", "decimamba", "constant-A=FACTOR", "constant-delta=FACTOR")
Strings = tuple[str, ...]


@dataclass(frozen=True)
class PaperRequest(EvaluateRequest):
    """Models to measure as the paper does."""

    task: Annotated[
        Literal["perplexity", "tail", "recall", "passkey", "state-norm", "spectrum", "harness", "long-tasks"],
        typer.Option(help="What to measure."),
    ] = "perplexity"  # type: ignore[assignment]
    tail: Annotated[int, typer.Option(help="tail: predictions at a window's end.", min=1)] = 128
    depth: Annotated[tuple[float, ...], typer.Option(help="passkey: where the key stands, from 0 to 1.")] = (
        *(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    samples: Annotated[int, typer.Option(help="passkey: questions for each length and depth.", min=1)] = 3
    comparator: Annotated[Strings, typer.Option(help=f"Another forward pass: {', '.join(COMPARATORS)}.")] = ()
    harness: Annotated[Strings, typer.Option(help="harness: a task of lm-evaluation-harness; repeatable.")] = ()
    harness_path: Annotated[str | None, typer.Option(help="harness: folder of further tasks, whose code runs.")] = (
        None
    )
    limit: Annotated[int | None, typer.Option(help="harness, long-tasks: documents of each task.", min=1)] = None
    window: Annotated[
        int | None,
        typer.Option(**LENGTH, help="long-tasks: tokens at a prompt's end that are read, as on a sliding window."),
    ] = None
    data: Annotated[Strings, typer.Option(help="Text that comparators are fitted on.")] = ()
    target_len: Annotated[int, typer.Option(**LENGTH, help="mambaextend: length to calibrate for.")] = 8192
    train_len: Annotated[int | None, typer.Option(help="Tokens the model was trained at.")] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON and pictures.")] = None


def _variants(request: PaperRequest, opened: Opened) -> list[Comparator | None]:
    """The model as it is, and the comparators of a request, fitted to the first model where they need it."""
    stock, made = opened.stock, list[Comparator | None]([None])
    if not request.comparator or opened.snapshot.name != request.models[0]:
        return made
    sources = [TextSource.parse(text) for text in request.data] or [TextSource(CALIBRATION_NOVEL)]
    text = read_as_one(stock, sources, limit=1 << 20, reporter=opened.reporter)
    train_len = request.train_len or look_up_train_len(opened.snapshot.name, opened.snapshot.kind)
    for name in request.comparator:
        kind, _, factor = name.partition("=")
        if kind in ("constant-A", "constant-delta"):
            made.append(ConstantScaling(kind.removeprefix("constant-"), _factor(name, factor)))
            continue
        if name == "mambaextend":
            made.append(fit_mambaextend(stock, text, request.target_len, opened.reporter))
            continue
        if name not in ("longmamba", "decimamba"):
            raise UsageError(f"There is no comparator '{name}'.", f"Use one of: {', '.join(COMPARATORS)}.")
        if name == "decimamba" and request.task == "perplexity":
            raise UsageError("decimamba drops tokens, so whole windows cannot be measured.", "Use --task tail.")
        train_len = train_len or measure_train_len(stock, [text], opened.reporter)
        if name == "decimamba":
            made.append(make_decimamba(stock, train_len, request.tail))
        else:
            made.append(fit_longmamba(stock, text, train_len, request.lengths, opened.reporter))
    return made


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise UsageError(f"The comparator '{name}' names no factor above 0.", "Write constant-A=1.5.")
    return factor


def _named(opened: Opened, comparator: Comparator | None) -> Entry:
    if comparator is None:
        return {}
    return {"model": f"{opened.snapshot.name} + {comparator.name}", "comparator": comparator.settings}


def _perplexity(request: PaperRequest, opened: Opened) -> list[Entry]:
    text = opened.text(2 * request.windows * max(request.lengths))
    span, entries = take_span(text, max(request.lengths), request.windows), []
    for comparator in _variants(request, opened):
        results = []
        for length in request.lengths:
            with comparator.applied(opened.stock, length) if comparator else nullcontext():
                results += measure_lengths(
                    *(opened.stock, span, [length], opened.reporter, opened.snapshot.name),
                    compare=comparator is None,
                )
        entries.append(_named(opened, comparator) | perplexity_entry(text, span.numel(), results))
    return entries


def _tail(request: PaperRequest, opened: Opened) -> list[Entry]:
    if not 0 < request.tail < min(request.lengths):
        raise UsageError(
            f"Windows of {min(request.lengths)} tokens have no last {request.tail} predictions.", "Lower --tail."
        )
    text, entries = opened.text(1 << 22), []
    windows = take_ends(text, max(request.lengths), request.windows)
    for comparator in _variants(request, opened):
        perplexity = {}
        for length in request.lengths:
            with comparator.applied(opened.stock, length) if comparator else nullcontext():
                losses = tail_losses(opened.stock, windows[:, -length:], request.tail)
            perplexity[str(length)] = math.exp(losses.mean())
        entry = {"predictions": request.tail * len(windows), "perplexity": perplexity}
        entries.append(_named(opened, comparator) | {"text": dataclasses.asdict(text.record("held-out"))} | entry)
    return entries


def _passkey(request: PaperRequest, opened: Opened) -> list[Entry]:
    stock, text = opened.stock, opened.text(8 * max(request.lengths))
    filler = Filler(text, stock.tokenizer)
    samples = make_samples(filler, request.lengths, request.depth, request.samples, request.seed)
    cells = measure_retrieval(stock.model, stock.tokenizer, samples, opened.reporter, opened.snapshot.name)
    return [
        {
            "text": dataclasses.asdict(text.record("filler")),
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "solved": sum(cell.solved for cell in cells),
            "asked": len(samples),
        }
    ]


def _state_norm(request: PaperRequest, opened: Opened) -> list[Entry]:
    text = opened.text(2 * request.windows * max(request.lengths))
    span = take_span(text, max(request.lengths), request.windows)
    norms = measure_state_norms(opened.stock, span, request.lengths, opened.reporter, opened.snapshot.name)
    shown = {str(length): [dataclasses.asdict(layer) for layer in layers] for length, layers in norms.items()}
    return [{"text": dataclasses.asdict(text.record("held-out")), "norms": shown}]


def _spectrum(request: PaperRequest, opened: Opened) -> list[Entry]:
    text = opened.text(2 * request.windows * max(request.lengths))
    span = take_span(text, max(request.lengths), request.windows)
    layers = measure_spectrum(opened.stock, span, opened.reporter, opened.snapshot.name)
    return [
        {
            "text": dataclasses.asdict(text.record("held-out")),
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
    ]


def _harness(request: PaperRequest, opened: Opened) -> list[Entry]:
    stock, longest = opened.stock, max(request.lengths)
    opened.reporter.line(f"{opened.snapshot.name}: {', '.join(request.harness)} at {longest} tokens …")
    scores = measure_tasks(
        stock.model,
        stock.tokenizer,
        request.harness,
        max_length=longest,
        task_folder=request.harness_path,
        limit=request.limit,
        seed=request.seed,
    )
    return [{"scores": [dataclasses.asdict(score) for score in scores]}]


def _long_tasks(request: PaperRequest, opened: Opened) -> list[Entry]:
    stock, text = opened.stock, opened.text(1 << 18)
    novel = stock.tokenizer.decode(max(text.documents, key=len))
    scores = measure_long_tasks(
        *(stock.model, stock.tokenizer, novel, request.lengths),
        limit=request.limit or 20,
        seed=request.seed,
        window=request.window,
    )
    return [{"text": dataclasses.asdict(text.record("filler")), "scores": scores}]


def _tail_tables(record: Mapping[str, Any]) -> list[Table]:
    count, name = record["models"][0]["predictions"], record["text"]["name"]
    return [length_table(record, "perplexity", f"Perplexity of the same {count} predictions of {name}, by length")]


def _passkey_tables(record: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    for entry in record["models"]:
        lengths = list(dict.fromkeys(cell["length"] for cell in entry["cells"]))
        depths = list(dict.fromkeys(cell["depth"] for cell in entry["cells"]))
        cells = {(cell["length"], cell["depth"]): f"{cell['solved']}/{cell['samples']}" for cell in entry["cells"]}
        rows = [(f"{depth:.0%}", *(cells[length, depth] for length in lengths)) for depth in depths]
        counts = f"{entry['solved']} of {entry['asked']}"
        title = f"Pass keys found by {entry['model']} in {record['text']['name']}: {counts}"
        found.append((title, ("depth", *(format_length(length) for length in lengths)), rows))
    return found


def _state_norm_tables(record: Mapping[str, Any]) -> list[Table]:
    lengths = list(record["models"][0]["norms"])
    rows: list[tuple[str, ...]] = []
    for entry in record["models"]:
        for label, field, choose in (
            ("largest layer", "norm", max),
            ("smallest layer", "norm", min),
            ("largest head or channel", "largest", max),
            ("smallest head or channel", "smallest", min),
        ):
            values = (choose(layer[field] for layer in entry["norms"][length]) for length in lengths)
            rows.append((f"{entry['model']}: {label}", *(f"{value:.4g}" for value in values)))
    title = f"Norm of the state after so many tokens of {record['text']['name']}"
    return [(title, ("model", *(format_length(int(length)) for length in lengths)), rows)]


def _spectrum_tables(record: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    for entry in record["models"]:
        rows: list[tuple[str, ...]] = []
        for number, layer in enumerate(entry["layers"]):
            step = "-" if layer["mean_step"] is None else f"{layer['mean_step']:.4g}"
            ranges = (_range(layer[field]) for field in ("decay_rates", "eigenvalues", "at_unit_step"))
            rows.append((str(number), step, *ranges))
        title = f"Spectrum of {entry['model']}, Δ measured on {record['text']['name']}"
        found.append((title, ("layer", "mean Δ", "|A|", "exp(-|A|Δ)", "exp(-|A|)"), rows))
    return found


def _range(values: Sequence[float]) -> str:
    return f"{values[-1]:.4g} to {values[0]:.4g}" if values else "-"


def _harness_tables(record: Mapping[str, Any]) -> list[Table]:
    rows: list[tuple[str, ...]] = []
    for entry in record["models"]:
        for score in entry["scores"]:
            asked = (str(score["samples"]), "-" if score["new_tokens"] is None else str(score["new_tokens"]))
            for metric, value in score["metrics"].items():
                if not metric.endswith("_stderr"):
                    rows.append((f"{entry['model']}: {score['task']}", metric, f"{value:.4f}", *asked))
    return [("lm-evaluation-harness", ("task", "metric", "value", "documents", "new tokens"), rows)]


SPAN = ("text", "windows")


def _long_tasks_tables(record: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    lengths = record["settings"]["lengths"]
    window = record["settings"].get("window")
    how = f" on its last {format_length(window)} tokens alone" if window else ""
    for entry in record["models"]:
        rows: dict[str, dict[int, str]] = {}
        for score in entry["scores"]:
            rows.setdefault(score["task"], {})[score["length"]] = f"{score['score']:.3f}"
        title = f"{entry['model']}{how}: share found, {entry['scores'][0]['samples']} prompts a cell"
        columns = ("task", *(format_length(length) for length in lengths))
        cells = [(task, *(row.get(length, "-") for length in lengths)) for task, row in rows.items()]
        found.append((title, columns, cells))
    return found


TASKS: Mapping[str, Task] = {
    "perplexity": Task(_perplexity, perplexity_tables, (*SPAN, "comparator", "data", "train_len", "target_len")),
    "tail": Task(_tail, _tail_tables, (*SPAN, "comparator", "data", "train_len", "target_len", "tail")),
    "recall": evaluate.TASKS["recall"],
    "passkey": Task(_passkey, _passkey_tables, ("text", "depth", "samples")),
    "harness": Task(_harness, _harness_tables, ("harness", "harness_path", "limit"), ("lm-eval",)),
    "long-tasks": Task(_long_tasks, _long_tasks_tables, ("text", "limit", "window"), ("lm-eval",)),
    "state-norm": Task(_state_norm, _state_norm_tables, SPAN),
    "spectrum": Task(_spectrum, _spectrum_tables, SPAN),
}

app = typer.Typer(no_args_is_help=True)


@register("measures", PaperRequest, app)
def measure(request: PaperRequest, output: Output) -> None:
    """Measure models as the paper does."""

    def deliver(record: dict[str, Any]) -> None:
        output.json(record)
        if request.output is not None:
            (request.output / "evaluation.json").write_text(json_text(record) + "\n", encoding="utf-8")
            for picture in draw_pictures(record):
                (request.output / picture.path).write_bytes(picture.png)

    if request.output is not None:
        request.output.mkdir(parents=True, exist_ok=True)
    evaluate.evaluate(request, output.reporter, output.answer, deliver, TASKS)


if __name__ == "__main__":
    run_application(app)
