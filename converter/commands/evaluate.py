"""``mmod evaluate``: measures models one after the other and gives one JSON object and its tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.commands.opening import Opened, open_model
from converter.commands.provenance import read_versions
from converter.commands.requests import EvaluateRequest
from converter.errors import UsageError
from converter.lengths import format_length
from converter.reporting import Reporter

if TYPE_CHECKING:
    from calibrator.evaluation.perplexity import LengthLosses
    from calibrator.text import Text

Entry = dict[str, Any]
"""The result for one model: fields of its JSON object."""
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns and rows; the first column is text."""


@dataclass(frozen=True)
class Task:
    """Something to measure.

    Attributes:
        measure: measures an open model; gives an entry for it and for each variant of it.
        tables: the tables of a whole result.
        options: the fields of a request that belong to this task and not to every other.
        versions_of: further packages that the figures depend on.
    """

    measure: Callable[[Any, Opened], list[Entry]]
    tables: Callable[[Mapping[str, Any]], list[Table]]
    options: tuple[str, ...] = ()
    versions_of: tuple[str, ...] = ()


def evaluate(
    request: EvaluateRequest,
    reporter: Reporter,
    answer: Reporter,
    deliver: Callable[[dict[str, Any]], None] = lambda _: None,
    tasks: Mapping[str, Task] | None = None,
) -> dict[str, Any]:
    """Measure every model of a request and print the comparison.

    What was measured before a model failed is shown and delivered as well.

    Args:
        answer: shows the comparison.
        deliver: takes the result, whole or partial.
        tasks: name to task; ``TASKS`` by default.

    Returns:
        The result as a JSON object; ``models`` has an entry for every model, and where there is only one its fields
        stand at the top level too.

    Raises:
        MmodError: a model, text or option cannot be used.
    """
    tasks = TASKS if tasks is None else tasks
    task = tasks[request.task]
    check_options(request, tasks)
    if request.text:
        from calibrator.text import TextSource, require_texts, require_unweighted

        sources = [TextSource.parse(text) for text in request.text]
        require_unweighted(sources)
        require_texts(sources)
    from calibrator.model import device_name

    entries: list[Entry] = []
    machine: dict[str, str] = {}
    try:
        for model in request.models:
            with open_model(model, request, reporter, several=len(request.models) > 1) as opened:
                machine = {"device": device_name(opened.stock), "dtype": opened.stock.dtype_name}
                known = {"model": opened.snapshot.name, "revision": opened.snapshot.revision}
                entries += [known | entry for entry in task.measure(request, opened)]
    finally:
        if entries:
            if len({json.dumps(entry.get("text")) for entry in entries}) > 1:
                reporter.warn("The models read the text in different tokens, so their figures do not compare.")
            settings = {name: getattr(request, name) for name in ("lengths", *task.options) if name != "text"}
            record = {
                "task": request.task,
                "text": entries[0].get("text"),
                "seed": request.seed,
                "settings": {name: value for name, value in settings.items() if value not in (None, ())},
                **machine,
                "versions": read_versions(task.versions_of),
                "models": entries,
            }
            for title, columns, rows in task.tables(record):
                answer.table(title, columns, rows)
            record |= entries[0] if len(entries) == 1 else {}
            deliver(record)
    return record


def check_options(request: EvaluateRequest, tasks: Mapping[str, Task]) -> None:
    """Refuse options that would do nothing. Raises UsageError."""
    name = request.task
    for field in dataclasses.fields(request):
        owners = [owner for owner, task in tasks.items() if field.name in task.options]
        if owners and name not in owners and getattr(request, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise UsageError(f"{name} has no use for --{option}.", f"It belongs to: {', '.join(owners)}.")
    if request.revision and len(request.models) > 1:
        raise UsageError("--revision belongs to one model, and several are given.", "Measure them one by one.")


def _perplexity(request: EvaluateRequest, opened: Opened) -> list[Entry]:
    from calibrator.evaluation.perplexity import measure_lengths
    from calibrator.text import take_span

    text = opened.text(2 * request.windows * max(request.lengths))
    span = take_span(text, max(request.lengths), request.windows)
    results = measure_lengths(opened.stock, span, request.lengths, opened.reporter, opened.snapshot.name)
    return [perplexity_entry(text, span.numel(), results)]


def perplexity_entry(text: Text, span_tokens: int, results: list[LengthLosses]) -> Entry:
    """Perplexity by length, and by position in the longest window."""
    from calibrator.evaluation.perplexity import how_measured

    return {
        "text": dataclasses.asdict(text.record("held-out")),
        "span_tokens": span_tokens,
        "perplexity": {str(entry.length): entry.perplexity for entry in results},
        "by_position": {str(edge): math.exp(loss) for edge, loss in results[-1].by_position.items()},
        "passes": how_measured(results),
    }


# Tokens to draw fillers from, over those of the longest prompt.
FILLER = 8


def _recall(request: EvaluateRequest, opened: Opened) -> list[Entry]:
    from calibrator.evaluation.baselines import in_chunks
    from calibrator.evaluation.recall import measure_recall
    from calibrator.facts import KINDS, FactSource

    for kind in request.kind:
        if kind not in KINDS:
            raise UsageError(f"There is no kind of fact '{kind}'.", f"Use some of: {', '.join(KINDS)}.")
    text, stock = opened.text(FILLER * max(request.lengths)), opened.stock
    places = {length: [d for d in request.distances if d < length] for length in request.lengths}
    cells = measure_recall(
        *(stock, FactSource(text.documents, stock.tokenizer), request.kind or tuple(KINDS), places),
        *(request.samples, request.seed, opened.reporter, opened.snapshot.name),
        in_chunks(request.chunks) if request.chunks else None,
    )
    if not cells:
        raise UsageError(
            f"No fact fits into {format_length(max(request.lengths))} tokens at any of the distances.",
            "Give longer --lengths, or shorter --distances.",
        )
    return [{"text": dataclasses.asdict(text.record("filler")), "cells": [cell.record() for cell in cells]}]


def perplexity_tables(record: Mapping[str, Any]) -> list[Table]:
    """By length, and by position in the longest window."""
    name, first = record["text"]["name"], record["models"][0]
    title = f"Perplexity on {name}, {first['span_tokens']} tokens at every length. {first['passes']}"
    return [
        length_table(record, "perplexity", title),
        length_table(record, "by_position", "Perplexity by position in the longest window, up to"),
    ]


def length_table(record: Mapping[str, Any], field: str, title: str) -> Table:
    """A row a model of the figures in one field, which has them by length."""
    lengths = list(record["models"][0][field])
    rows = [(entry["model"], *(f"{entry[field][length]:.3f}" for length in lengths)) for entry in record["models"]]
    return title, ("model", *(format_length(int(length)) for length in lengths)), rows


def _recall_tables(record: Mapping[str, Any]) -> list[Table]:
    found: list[Table] = []
    chunks = record["settings"].get("chunks")
    how = f", read in chunks of {format_length(chunks)}," if chunks else ""
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
            f"Facts that {entry['model']}{how} finds in {record['text']['name']} (copied spans: share of tokens)"
        )
        found.append((title, ("fact, text", *(f"{format_length(d)} back" for d in distances)), rows))
    return found


TASKS: Mapping[str, Task] = {
    "perplexity": Task(_perplexity, perplexity_tables, ("text", "windows")),
    "recall": Task(_recall, _recall_tables, ("text", "distances", "kind", "samples", "chunks")),
}
