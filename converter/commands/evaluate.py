"""The measures of the paper on any checkpoint: one JSON object a run, and tables and pictures made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.commands.opening import CALIBRATION_NOVEL, Opened, open_model
from converter.commands.provenance import read_versions
from converter.errors import OutputError, UsageError
from converter.json_text import json_text
from converter.lengths import format_length
from converter.reporting import Reporter, dispensable

if TYPE_CHECKING:
    from calibrator.evaluation.comparators import Comparator
    from calibrator.model import StockModel

RESULT_NAME = "evaluation.json"
COMPARATORS = ("longmamba", "decimamba", "constant-A=FACTOR", "constant-delta=FACTOR")
HARNESS_VERSIONS = ("lm-eval",)
PASSKEY_SAMPLES, RECALL_SAMPLES = 3, 32


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure; the fields bear the names of the command line's options.

    Attributes:
        models: Hub ids, local folders or demos; the first is the one that comparators run.
        task: a name in :data:`TASKS`.
        texts: to measure on; a bundled novel where empty.
        data: to fit comparators on; the other bundled novel where empty. Never what is measured.
        lengths: tokens, ascending.
        windows: of the longest length; places of the text for ``tail``.
        tail: predictions at the end of each window, for ``tail``.
        depths: of the pass key: where it stands.
        distances, kinds: of recall: tokens between a fact and the prompt's end, and kinds of facts; all by default.
        samples: questions for each length and depth or distance; None for the task's default.
        comparators: other forward passes to put beside the first model; see :data:`COMPARATORS`.
        train_len: tokens the first model was trained at; looked up or measured where a comparator needs it.
        harness: tasks of lm-evaluation-harness, in place of ``task``.
        harness_path: folder with definitions of further ones. limit: documents of each.
    """

    models: tuple[str, ...]
    task: str = "perplexity"
    texts: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (256, 4096, 16384)
    windows: int = 2
    tail: int = 128
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int | None = None
    distances: tuple[int, ...] = (64, 448, 1024, 2048, 4096)
    kinds: tuple[str, ...] = ()
    comparators: tuple[str, ...] = ()
    train_len: int | None = None
    harness: tuple[str, ...] = ()
    harness_path: str | None = None
    limit: int | None = None
    seed: int = 0
    revision: str | None = None
    tokenizer: str | None = None
    trust_a_log: bool = False
    device: str = "auto"
    allow_slow: bool = False


Entry = dict[str, Any]
"""What one model comes to: fields of its JSON object."""


def evaluate(
    request: EvaluationRequest, reporter: Reporter, output: Path | None = None, *, answer: Reporter | None = None
) -> dict[str, Any]:
    """Measure every model of a request, one after the other, and print the comparison.

    What was measured until one failed is shown and written as well.

    Args:
        output: folder for the result's JSON and its pictures.
        answer: shows the comparison; None for the reporter.

    Returns:
        The result as a JSON object; ``models`` has one entry for every model and comparator, and where there is
        only one its fields stand at the top level too.

    Raises:
        MmodError: a model, text or option cannot be used, or the output cannot be written.
    """
    _check_options(request)
    if request.texts or request.data:
        from calibrator.text import TextSource, require_texts, require_unweighted

        sources = [TextSource.parse(text) for text in (*request.texts, *request.data)]
        require_unweighted(sources)
        require_texts(sources)
    if output is not None:
        _prepare_folder(output)
    if request.harness:
        from calibrator.evaluation.harness import require_harness

        require_harness()
    measure = _harness if request.harness else TASKS[request.task]
    entries: list[Entry] = []
    machine: dict[str, str] = {}
    try:
        for index, model in enumerate(request.models):
            with open_model(model, request, reporter) as opened:
                machine = _machine(opened.stock)
                comparators = [None, *_comparators(opened)] if index == 0 else [None]
                for comparator in comparators:
                    name = opened.snapshot.name + (f" + {comparator.name}" if comparator else "")
                    entry: Entry = {"model": name, "revision": opened.snapshot.revision}
                    if comparator:
                        entry["comparator"] = comparator.settings
                    entries.append(entry | measure(opened, comparator, name))
    finally:
        if entries:
            record = _deliver(request, entries, machine, reporter, answer or reporter, output)
    return record


def _deliver(
    request: EvaluationRequest,
    entries: list[Entry],
    machine: dict[str, str],
    reporter: Reporter,
    answer: Reporter,
    output: Path | None,
) -> dict[str, Any]:
    """Show and write what was measured; returns it as a JSON object."""
    texts = {json.dumps(entry.get("text")) for entry in entries}
    if len(texts) > 1:
        reporter.warn("The models read the text in different tokens, so their figures do not compare.")
    record = {
        "task": "harness" if request.harness else request.task,
        "text": entries[0].get("text"),
        "seed": request.seed,
        "settings": _settings(request),
        **machine,
        "versions": read_versions(HARNESS_VERSIONS if request.harness else ()),
        "models": entries,
    }
    for title, columns, rows in tables(record):
        answer.table(title, columns, rows)
    if len(entries) == 1:
        record |= entries[0]
    if output is not None:
        written = write_result(record, output, reporter)
        reporter.line(f"Wrote {', '.join(path.name for path in written)} in {output}.")
    return record


def _prepare_folder(folder: Path) -> None:
    """Make the folder and write into it, before anything slow. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"mmod")
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to: {error.strerror}.", "Choose another --output."
        ) from error


def _check_options(request: EvaluationRequest) -> None:
    """Refuse an unknown task, and options that would do nothing.

    Raises:
        UsageError: what is wrong.
    """
    if request.task not in TASKS:
        raise UsageError(f"There is no task '{request.task}'.", f"Use one of: {', '.join(TASKS)}.")
    what = "harness" if request.harness else request.task
    for field in dataclasses.fields(request):
        owners = [owner for owner, options in TASK_OPTIONS.items() if field.name in options]
        if owners and what not in owners and getattr(request, field.name) != field.default:
            option = OPTION_NAMES.get(field.name, field.name.replace("_", "-"))
            raise UsageError(f"{what} has no use for --{option}.", f"It belongs to: {', '.join(owners)}.")
    if not request.comparators and (request.data or request.train_len):
        option = "--data" if request.data else "--train-len"
        raise UsageError(f"{option} is for comparators, and there is none.", "Add --comparator, or leave it out.")
    if request.revision and len(request.models) > 1:
        raise UsageError("--revision belongs to one model, and several are given.", "Measure them one by one.")


def _settings(request: EvaluationRequest) -> dict[str, Any]:
    names = (
        "lengths",
        "windows",
        "tail",
        "depths",
        "distances",
        "kinds",
        "samples",
        "train_len",
        "harness",
        "limit",
    )
    return {name: getattr(request, name) for name in names if getattr(request, name) not in (None, ())}


def _machine(stock: StockModel) -> dict[str, str]:
    from calibrator.job import device_name

    return {"device": device_name(stock), "dtype": str(stock.model.dtype).removeprefix("torch.")}


def _comparators(opened: Opened) -> list[Comparator]:
    """The comparators of a request, fitted to the model where they need it."""
    from calibrator.evaluation import comparators as known
    from calibrator.text import TextSource, read_texts_as_one
    from calibrator.train_len import look_up_train_len, measure_train_len

    request, stock = opened.request, opened.stock
    if not request.comparators:
        return []
    sources = [TextSource.parse(text) for text in request.data] or [TextSource(CALIBRATION_NOVEL)]
    text = read_texts_as_one(sources, stock.tokenizer, limit=1 << 20, rows=stock.rows, reporter=opened.reporter)
    train_len = request.train_len or look_up_train_len(opened.snapshot.name, opened.snapshot.kind)
    made: list[Comparator] = []
    for name in request.comparators:
        kind, _, factor = name.partition("=")
        if kind in ("constant-A", "constant-delta"):
            made.append(known.ConstantScaling(kind.removeprefix("constant-"), _factor(name, factor)))
            continue
        if name not in ("longmamba", "decimamba"):
            raise UsageError(f"There is no comparator '{name}'.", f"Use one of: {', '.join(COMPARATORS)}.")
        train_len = train_len or measure_train_len(stock, [text], opened.reporter)
        if name == "decimamba":
            made.append(known.make_decimamba(stock, train_len, request.tail))
        else:
            made.append(known.fit_longmamba(stock, text, train_len, request.lengths, opened.reporter))
    if request.task == "perplexity" and any(comparator.only_tails for comparator in made):
        raise UsageError("decimamba drops tokens, so whole windows cannot be measured.", "Use --task tail.")
    return made


def _factor(name: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise UsageError(f"The comparator '{name}' names no factor above 0.", "Write constant-A=1.5.")
    return factor


def _perplexity(opened: Opened, comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.perplexity import how_measured, measure_lengths
    from calibrator.text import take_span

    request, plain = opened.request, comparator is None
    longest = max(request.lengths)
    text = opened.text(2 * request.windows * longest)
    span = take_span(text, longest, request.windows)
    results = []
    for length in request.lengths:
        with comparator.applied(opened.stock, length) if comparator else nullcontext():
            results += measure_lengths(opened.stock, span, [length], opened.reporter, name, compare=plain)
    return {
        "text": dataclasses.asdict(text.record("held-out")),
        "span_tokens": span.numel(),
        "perplexity": {str(entry.length): entry.perplexity for entry in results},
        "by_position": {str(edge): math.exp(loss) for edge, loss in results[-1].by_position.items()},
        "passes": how_measured(results),
    }


def _tail(opened: Opened, comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.perplexity import measure_tails, take_ends

    request = opened.request
    text = opened.text(1 << 22)
    windows = take_ends(text, max(request.lengths), request.windows)
    results = []
    for length in request.lengths:
        with comparator.applied(opened.stock, length) if comparator else nullcontext():
            results += measure_tails(opened.stock, windows, [length], request.tail, opened.reporter, name)
    return {
        "text": dataclasses.asdict(text.record("held-out")),
        "predictions": request.tail * len(windows),
        "perplexity": {str(entry.length): entry.perplexity for entry in results},
    }


def _passkey(opened: Opened, _comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.passkey import Filler, make_samples, measure_retrieval

    request, stock = opened.request, opened.stock
    text = opened.text(8 * max(request.lengths))
    filler = Filler(text, stock.tokenizer)
    count = request.samples or PASSKEY_SAMPLES
    samples = make_samples(filler, request.lengths, request.depths, count, request.seed)
    cells = measure_retrieval(stock.model, stock.tokenizer, samples, opened.reporter, name)
    return {
        "text": dataclasses.asdict(text.record("filler")),
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "solved": sum(cell.solved for cell in cells),
        "asked": len(samples),
    }


def _recall(opened: Opened, _comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.recall import measure_recall
    from calibrator.facts import KINDS, FactSource

    request, stock = opened.request, opened.stock
    for kind in request.kinds:
        if kind not in KINDS:
            raise UsageError(f"There is no kind of fact '{kind}'.", f"Use some of: {', '.join(KINDS)}.")
    text = opened.prose(1 << 22)
    places = {length: [d for d in request.distances if d < length] for length in request.lengths}
    cells = measure_recall(
        *(stock, FactSource(text.documents, stock.tokenizer), request.kinds or tuple(KINDS), places),
        *(request.samples or RECALL_SAMPLES, request.seed, opened.reporter, name),
    )
    return {
        "text": dataclasses.asdict(text.record("filler")),
        "cells": [cell.record() for cell in cells],
    }


def _state_norm(opened: Opened, _comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.state_norm import measure_state_norms
    from calibrator.text import take_span

    request = opened.request
    longest = max(request.lengths)
    text = opened.text(2 * request.windows * longest)
    span = take_span(text, longest, request.windows)
    norms = measure_state_norms(opened.stock, span, request.lengths, opened.reporter, name)
    return {
        "text": dataclasses.asdict(text.record("held-out")),
        "norms": {str(length): [dataclasses.asdict(layer) for layer in layers] for length, layers in norms.items()},
    }


def _spectrum(opened: Opened, _comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.spectrum import measure_spectrum
    from calibrator.text import take_span

    request = opened.request
    longest = max(request.lengths)
    text = opened.text(2 * request.windows * longest)
    layers = measure_spectrum(opened.stock, take_span(text, longest, request.windows), opened.reporter, name)
    return {
        "text": dataclasses.asdict(text.record("held-out")),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }


def _harness(opened: Opened, _comparator: Comparator | None, name: str) -> Entry:
    from calibrator.evaluation.harness import measure_tasks

    request, stock = opened.request, opened.stock
    opened.reporter.line(f"{name}: {', '.join(request.harness)} at {max(request.lengths)} tokens …")
    scores = measure_tasks(
        stock.model,
        stock.tokenizer,
        request.harness,
        max_length=max(request.lengths),
        task_folder=request.harness_path,
        limit=request.limit,
        seed=request.seed,
    )
    return {"scores": [dataclasses.asdict(score) for score in scores]}


TASKS: Mapping[str, Callable[[Opened, Any, str], Entry]] = {
    "perplexity": _perplexity,
    "tail": _tail,
    "recall": _recall,
    "passkey": _passkey,
    "state-norm": _state_norm,
    "spectrum": _spectrum,
}

TASK_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("texts", "windows", "comparators"),
    "tail": ("texts", "windows", "comparators", "tail"),
    "recall": ("texts", "distances", "kinds", "samples"),
    "passkey": ("texts", "depths", "samples"),
    "state-norm": ("texts", "windows"),
    "spectrum": ("texts", "windows"),
    "harness": ("harness_path", "limit"),
}
"""The fields of a request that only some tasks, or lm-evaluation-harness, have a use for."""
OPTION_NAMES: Mapping[str, str] = {"kinds": "kind", "texts": "text", "comparators": "comparator"}

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns and rows; the first column is text."""


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables of one result."""
    return TABLES[record["task"]](record)


def _perplexity_tables(record: Mapping[str, Any]) -> list[Table]:
    first = record["models"][0]
    name = record["text"]["name"]
    if record["task"] == "tail":
        title = f"Perplexity of the same {first['predictions']} predictions of {name} after each length"
        return [_length_table(record, "perplexity", title, "{:.3f}")]
    title = f"Perplexity on {name}, {first['span_tokens']} tokens at every length. {first['passes']}"
    return [
        _length_table(record, "perplexity", title, "{:.3f}"),
        _length_table(record, "by_position", "Perplexity by position in the longest window, up to", "{:.3f}"),
    ]


def _length_table(record: Mapping[str, Any], field: str, title: str, form: str) -> Table:
    lengths = list(record["models"][0][field])
    rows = [
        (entry["model"], *(form.format(entry[field][length]) for length in lengths)) for entry in record["models"]
    ]
    return title, ("model", *(format_length(int(length)) for length in lengths)), rows


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


def _recall_tables(record: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    for entry in record["models"]:
        distances = sorted({cell["distance"] for cell in entry["cells"]})
        shown: dict[tuple[str, int], dict[int, str]] = {}
        for cell in entry["cells"]:
            values = f"{cell['tokens']:.0%}" if cell["is_span"] else f"{cell['found']}/{cell['samples']}"
            shown.setdefault((cell["kind"], cell["length"]), {})[cell["distance"]] = values
        rows = [
            (f"{kind}, {format_length(length)}", *(row.get(distance, "-") for distance in distances))
            for (kind, length), row in shown.items()
        ]
        title = (
            f"Facts that {entry['model']} finds in {record['text']['name']} (of copied spans the share of tokens)"
        )
        found.append((title, ("fact, text", *(f"{format_length(d)} back" for d in distances)), rows))
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


TABLES: Mapping[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "perplexity": _perplexity_tables,
    "tail": _perplexity_tables,
    "recall": _recall_tables,
    "passkey": _passkey_tables,
    "state-norm": _state_norm_tables,
    "spectrum": _spectrum_tables,
    "harness": _harness_tables,
}


def write_result(record: Mapping[str, Any], folder: Path, reporter: Reporter) -> list[Path]:
    """Write a result's JSON, and the pictures drawn from it, into a folder; returns the files' paths."""
    from calibrator.evaluation.pictures import draw_pictures

    folder.mkdir(parents=True, exist_ok=True)
    contents = {RESULT_NAME: (json_text(record) + "\n").encode()}
    with dispensable("There are no pictures of the result, since they cannot be drawn", reporter):
        contents |= {picture.path: picture.png for picture in draw_pictures(record)}
    for name, content in contents.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return [folder / name for name in contents]
