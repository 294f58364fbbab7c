"""The report: one HTML file with interactive charts of conversions and measurements, which loads nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from converter.errors import OutputError
from converter.lengths import format_length
from converter.manifest import Manifest
from converter.scales import ScaleSet
from converter.scales_file import find_scales
from hub_cards.drawing import axis_ticks, is_steep
from hub_cards.plots import factors_by_layer
from hub_cards.sections import (
    Snippet,
    cells_in_longest,
    change,
    memory_note,
    memory_sentence,
    perplexity_note,
    repeating,
    settings_of,
    snippets_of,
)
from hub_cards.templates import fill_in

# The plot area of a line chart, in units of its drawing.
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 464, 30, 228
COLORS = 6


@dataclass(frozen=True)
class Value:
    """One figure: as a number, as it is read with its interval, and the band around it where one is drawn."""

    y: float
    text: str
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """Figures that belong together: a curve of a line chart, a panel of a heat map.

    Attributes:
        line: ``before``, ``sliding`` or ``after``.
        color: a number below ``COLORS``.
    """

    name: str
    line: str
    color: int
    values: Mapping[Any, Value]

    def text(self, key: Any) -> str:
        """A figure as it is read."""
        return self.values[key].text if key in self.values else "-"


@dataclass(frozen=True)
class LineChart:
    """Curves over lengths or layers.

    Attributes:
        marks: places with a word at them.
    """

    title: str
    note: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    marks: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def x_labels(self) -> dict[int, str]:
        """Each place on the x axis and how it is written."""
        places = sorted({x for one in self.series for x in one.values})
        return {x: str(x) if self.x_name == "layer" else format_length(x) for x in places}

    def x_ticks(self) -> list[int]:
        """The places that are labelled: twelve at most."""
        return [*self.x_labels][:: math.ceil(len(self.x_labels) / 12)]

    def y_ticks(self) -> list[float]:
        """The values that are labelled."""
        return axis_ticks(*self._y_range, self._is_log_y)

    def x(self, place: float) -> float:
        """Where a place on the x axis is drawn."""
        return _between(place, *self._x_range, LEFT + 10, RIGHT - 10, self.x_name != "layer")

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        return _between(value, *self._y_range, BOTTOM, TOP, self._is_log_y)

    @cached_property
    def _x_range(self) -> tuple[int, int]:
        return min(self.x_labels), max(self.x_labels)

    @cached_property
    def _y_range(self) -> tuple[float, float]:
        low, high = min(self._drawn), max(self._drawn)
        if self._is_log_y:
            return low / 1.2, high * 1.2
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return low - margin, high + margin

    @cached_property
    def _is_log_y(self) -> bool:
        return is_steep(self._drawn)

    @cached_property
    def _drawn(self) -> list[float]:
        figures = [n for one in self.series for v in one.values.values() for n in (v.y, v.low, v.high)]
        return [number for number in figures if math.isfinite(number)] or [1.0]

    def points(self, series: Series) -> list[tuple[int, Value]]:
        """What can be drawn of a curve, from left to right."""
        return [(x, value) for x, value in sorted(series.values.items()) if math.isfinite(value.y)]

    def path(self, series: Series) -> str:
        """The curve as an SVG path."""
        return _path((self.x(x), self.y(value.y)) for x, value in self.points(series))

    def band(self, series: Series) -> str:
        """The band around the curve as an SVG path; empty if there is none."""
        found = [(self.x(x), value) for x, value in self.points(series) if value.low < value.high]
        upper = [(x, self.y(value.high)) for x, value in found]
        return _path([*upper, *((x, self.y(value.low)) for x, value in reversed(found))])

    def table(self) -> list[list[str]]:
        """All figures, the columns' names first."""
        names = [self.x_name, *(one.name for one in self.series)]
        return [names, *([label, *(one.text(x) for one in self.series)] for x, label in self.x_labels.items())]


@dataclass(frozen=True)
class HeatMap:
    """Shares found, a panel a model.

    Attributes:
        row_name: what the rows are: ``tokens of text``, or ``fact``.
        panels: values by row and distance.
    """

    title: str
    note: str
    row_name: str
    panels: Sequence[Series]

    @cached_property
    def rows(self) -> dict[Any, str]:
        """Each row and how it is written."""
        rows = sorted({row for one in self.panels for row, _ in one.values})
        return {row: format_length(row) if isinstance(row, int) else str(row) for row in rows}

    @cached_property
    def columns(self) -> dict[int, str]:
        """Each distance and how it is written."""
        return {n: format_length(n) for n in sorted({n for one in self.panels for _, n in one.values})}

    def table(self) -> list[list[str]]:
        """All figures, the columns' names first."""
        names = [self.row_name, "tokens back", *(one.name for one in self.panels)]
        keys = [(row, column) for row in self.rows for column in self.columns]
        return [names] + [
            [self.rows[key[0]], self.columns[key[1]], *(one.text(key) for one in self.panels)]
            for key in keys
            if any(key in one.values for one in self.panels)
        ]


@dataclass(frozen=True)
class Proved:
    """What a check of a model against its base came to; ``holds`` is None where it could not be made."""

    holds: bool | None
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What the report says of one conversion or one measurement, beside its charts.

    Attributes:
        tiles: figures in large print: what they are, before, and after.
    """

    name: str
    sentences: Sequence[str]
    tiles: Sequence[tuple[str, str, str]] = ()
    proof: Proved | None = None
    snippets: Sequence[Snippet] = ()
    settings: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def report_html(folders: Mapping[Path, Proved], results: Mapping[Path, Mapping[str, Any]]) -> str:
    """The report as one HTML page.

    Args:
        folders: converted folders, and what their check came to.
        results: JSON objects of ``mmod evaluate`` and ``mmod diagnose``, by their files.

    Raises:
        OutputError: a folder is no conversion, or a file holds no such result.
        CorruptCheckpointError: a folder's factors cannot be read.
    """
    short = [path.resolve().name for path in (*folders, *results)]
    names = {
        path: name if short.count(name) == 1 else str(path)
        for path, name in zip((*folders, *results), short, strict=True)
    }
    known: dict[str, tuple[Path, Manifest]] = {}
    models = []
    for folder, proof in folders.items():
        manifest = Manifest.read(folder)
        if manifest is None:
            raise OutputError(f"{folder} is no converted model.", "Give folders that this tool wrote.")
        known[names[folder]] = folder, manifest
        models.append(_model(names[folder], folder, manifest, proof))
    charts: list[LineChart | HeatMap] = [*_memory(known), *_perplexity(known), *_factors(known)]
    for path, record in results.items():
        try:
            model, measured = _measured(names[path], record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise OutputError(
                f"{path} is no result of mmod evaluate or diagnose ({type(error).__name__}: {error}).",
                "Give what --json printed, or a converted folder.",
            ) from error
        models.append(model)
        charts += measured
    return fill_in(
        "report.html",
        models=models,
        memory=[chart for chart in charts if isinstance(chart, HeatMap)],
        curves=[chart for chart in charts if isinstance(chart, LineChart)],
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )


# Of converted folders


def _model(name: str, folder: Path, manifest: Manifest, proof: Proved) -> Model:
    calibration, memory, table = manifest.calibration, manifest.memory, manifest.perplexity
    sentence = f"{manifest.source.name} with scaled A"
    if manifest.length is not None:
        sentence += f", for text of up to {format_length(manifest.length)} tokens"
    if calibration is not None and calibration.train_len is not None:
        sentence += f"; it was trained on {format_length(calibration.train_len)}"
    sentences = [
        f"{sentence}.",
        f"{len(manifest.changed)} tensors were scaled, the other {manifest.identical_tensors:,} are as they were.",
    ]
    tiles, notes = [], []
    if manifest.is_worse:
        sentences.append("By its own table it is worse than the source at every length.")
    if manifest.scales_nothing:
        sentences.append("No scales were better than none, so every factor is 1.")
    if memory is not None:
        sentences.append(memory_sentence(memory) if memory.cells else memory.skills)
    if memory is not None and memory.cells:
        # The farthest fact that is found reliably in the longest text, or the largest gain there.
        cells, found = cells_in_longest(memory)
        best = found[-1] if found else max(cells, key=lambda cell: cell.converted - cell.base)
        place = f"{format_length(best.distance)} back in {format_length(best.length)}"
        tiles.append((f"{best.kind.capitalize()} {place}", f"{best.base:.0%}", f"{best.converted:.0%}"))
        notes.append(memory_note(memory))
    if table is not None:
        lengths = sorted(table.base, key=int)
        for length in dict.fromkeys([*lengths[-1:], *lengths[:1]]):
            label = f"Perplexity at {format_length(int(length))}"
            tiles.append((label, f"{table.base[length]:.2f}", f"{table.converted[length]:.2f}"))
        notes.append(perplexity_note(table))
    # Without paths of this machine.
    place = folder.resolve().name
    snippets = [*snippets_of(folder, manifest, place, is_on_hub=False), *repeating(manifest, place)]
    return Model(name, sentences, tiles, proof, snippets, settings_of(manifest), [*notes, *manifest.notes])


Known = Mapping[str, tuple[Path, Manifest]]
"""Converted folders by what they are called on the page."""


def _curves(known: Known, name: str, window: int | None = None) -> list[tuple[str, str, int]]:
    """Name, line and colour of what is drawn of a model: as trained, converted, and on a sliding window."""
    color, sliding = 1 + [*known].index(name) % (COLORS - 1), f"sliding window of {window}"
    if len(known) == 1:
        return [("as trained", "before", 0), ("converted", "after", color), (sliding, "sliding", 0)]
    source, sources = known[name][1].source.name, {manifest.source.name for _, manifest in known.values()}
    shared, words = (0, sliding) if len(sources) == 1 else (color, f"{source}, {sliding}")
    return [(f"{source}, as trained", "before", shared), (name, "after", color), (words, "sliding", shared)]


def _distinct(series: Iterable[Series]) -> list[Series]:
    """Series without those that are there already, since several models may have one source."""
    found: list[Series] = []
    for one in series:
        if one.values and not any((one.name, one.values) == (other.name, other.values) for other in found):
            found.append(one)
    return found


def _perplexity(known: Known) -> Iterator[LineChart]:
    tables = {name: m.perplexity for name, (_, m) in known.items() if m.perplexity is not None}
    if not tables:
        return
    series = []
    for name, table in tables.items():
        before, after, sliding = _curves(known, name, table.sliding_window)
        lengths = sorted(int(length) for length in table.base)
        converted = {}
        for n in lengths:
            was, now, error = table.base[str(n)], table.converted[str(n)], table.standard_error.get(str(n))
            text = f"{now:.2f}, {change(was, now)}"
            if error is not None:
                spread = math.exp(min(1.96 * error, 100.0))
                text += f" (95 %: {change(was, now / spread)} to {change(was, now * spread)})"
            converted[n] = Value(now, text)
        series += [Series(*before, {n: _number(table.base[str(n)]) for n in lengths}), Series(*after, converted)]
        if table.sliding is not None and table.sliding_window is not None:
            steady = {n: _number(table.sliding) for n in lengths if n >= table.sliding_window}
            series.append(Series(*sliding, steady))
    measured = {(table.text.name, table.span_tokens, table.dtype) for table in tables.values()}
    notes = [f"On {text}; every length covers the same {span:,} tokens." for text, span, _ in sorted(measured)]
    if len(measured) > 1:
        notes.append("Different text, spans or number formats do not compare.")
    chart = LineChart("Perplexity by length", " ".join(notes), "tokens", "perplexity", _distinct(series))
    made = [m.calibration for _, m in known.values() if m.calibration is not None]
    marks = {c.calibrated_len: "calibrated to" for c in made} | {c.train_len: "trained" for c in made}
    low, high = min(chart.x_labels), max(chart.x_labels)
    # Where models differ in them, the words would lie upon each other.
    shown = marks if len(marks) < 3 else {}
    yield replace(chart, marks={x: word for x, word in shown.items() if x is not None and low <= x <= high})


def _memory(known: Known) -> Iterator[HeatMap]:
    tables = {name: m.memory for name, (_, m) in known.items() if m.memory is not None and m.memory.cells}
    panels, steady = [], []
    for name, table in tables.items():
        before, after, sliding = _curves(known, name, table.window)
        cells = {(cell.kind, cell.length, cell.distance): cell for cell in table.cells}
        found = {key: Value(c.converted, f"{c.converted:.0%} ± {100 * c.error:.0f}") for key, c in cells.items()}
        panels += [Series(*before, {key: _percent(c.base) for key, c in cells.items()}), Series(*after, found)]
        steady.append(Series(*sliding, {key: _percent(c.sliding) for key, c in cells.items()}))
    texts = ", ".join(sorted({table.text.name for table in tables.values()}))
    yield from _heat_maps("", f"Facts hidden in {texts}; ± is half of the 95 % interval.", [*panels, *steady])


def _heat_maps(of: str, note: str, panels: Sequence[Series]) -> Iterator[HeatMap]:
    """A map for each kind of fact, of panels whose values are by kind, length and distance."""
    for kind in dict.fromkeys(key[0] for one in panels for key in one.values):
        parts = (
            replace(one, values={key[1:]: value for key, value in one.values.items() if key[0] == kind})
            for one in panels
        )
        yield HeatMap(f"Share found: {kind}{of}", note, "tokens of text", _distinct(parts))


def _factors(known: Known) -> Iterator[LineChart]:
    series, notes = [], []
    for name, (folder, manifest) in known.items():
        if not manifest.changed or find_scales(folder) is None:
            continue
        scales = ScaleSet.load(str(folder))
        values = {}
        for layer, (low, middle, high) in factors_by_layer(scales).items():
            text = f"{middle:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")
            # Bands of several models would hide each other.
            values[layer] = Value(middle, text, low, high) if len(known) == 1 else Value(middle, text)
        series.append(Series(*_curves(known, name)[1], values))
        notes.append(f"One factor per {scales.granularity}.")
    if series:
        notes.append("The median of each layer's factors, and the range of the middle 90 %; 1 changes nothing.")
        yield LineChart("Scale factors by layer", " ".join(dict.fromkeys(notes)), "layer", "s", series)


# Of measurements


def _measured(name: str, record: Mapping[str, Any]) -> tuple[Model, list[LineChart | HeatMap]]:
    """A result of ``mmod evaluate`` or ``mmod diagnose`` as a part of the report."""
    text, axes = record["text"]["name"], ("tokens", "perplexity")
    if "verdict" in record:
        sliding = record["sliding"]
        curves = [
            _curve("one pass", "before", 0, record["by_position"]),
            _curve(f"sliding window of {sliding['window']}", "sliding", 1, sliding["by_position"]),
        ]
        charts: list[LineChart | HeatMap] = [
            LineChart(f"Perplexity by position: {name}", f"On {text}, up to each position.", *axes, curves)
        ]
        if shares := {(cell["kind"], cell["distance"]): _share(cell) for cell in record["recall"]}:
            title = f"Share found in {format_length(record['target_len'])} tokens: {name}"
            panel = Series(record["model"], "before", 0, shares)
            charts.append(HeatMap(title, f"Facts hidden in {text}.", "fact", [panel]))
        return Model(f"{name}: {record['model']}", [str(sentence) for sentence in record["verdict"]]), charts
    versions = [(f"{package} version", str(version)) for package, version in record["versions"].items()]
    model = Model(name, [f"Measured on {text}, on {record['device']} in {record['dtype']}."], settings=versions)
    entries = record["models"]
    if record["task"] == "perplexity":
        note = f"{entries[0]['span_tokens']:,} tokens at every length. {entries[0]['passes']}"
        titles = {
            "perplexity": (f"Perplexity by length: {name}", note),
            "by_position": (f"Perplexity by position: {name}", "In the longest window, up to each position."),
        }
        return model, [
            LineChart(*title, *axes, [_curve(one["model"], "after", i, one[key]) for i, one in enumerate(entries)])
            for key, title in titles.items()
        ]
    panels = []
    for one in entries:
        cells = {(cell["kind"], cell["length"], cell["distance"]): _share(cell) for cell in one["cells"]}
        panels.append(Series(one["model"], "after", 0, cells))
    return model, [*_heat_maps(f" ({name})", f"Facts hidden in {text}.", panels)]


def _curve(name: str, line: str, color: int, values: Mapping[str, Any]) -> Series:
    return Series(name, line, color % COLORS, {int(length): _number(float(y)) for length, y in values.items()})


def _share(cell: Mapping[str, Any]) -> Value:
    """What was found of one kind at one place: of copied spans the share of tokens, else that of whole answers."""
    prompts = f"{cell['samples']} prompts"
    if cell["is_span"]:
        return Value(float(cell["tokens"]), f"{cell['tokens']:.0%} of the tokens, {prompts}")
    share = cell["found"] / cell["samples"]
    return Value(share, f"{share:.0%} (95 %: {cell['low']:.0%} to {cell['high']:.0%}), {prompts}")


def _number(value: float) -> Value:
    return Value(value, f"{value:.2f}")


def _percent(share: float) -> Value:
    return Value(share, f"{share:.0%}")


# Geometry


def _between(value: float, low: float, high: float, start: float, end: float, is_log: bool) -> float:
    """Where a value lies between two places, in tenths of a unit; in the middle if there is no distance."""
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " L".join(f"{x:g} {y:g}" for x, y in points)
