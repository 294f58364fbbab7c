"""The report: one HTML file with interactive charts of conversions and measurements, which loads nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converter.drawing import axis_ticks, is_steep
from converter.errors import OutputError
from converter.lengths import format_length
from converter.manifest import Manifest, MemoryCell, MemoryTable, PerplexityTable
from converter.scales_file import find_scales, load_scales
from hub_cards.plots import factors_by_layer
from hub_cards.sections import (
    Snippet,
    change,
    memory_note,
    memory_sentence,
    perplexity_note,
    repeating,
    settings_of,
    snippets_of,
)

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


@dataclass(frozen=True)
class LineChart:
    """Curves over lengths or layers.

    Attributes:
        x_labels: each place on the axis and how it is written.
        marks: places with a word at them.
    """

    title: str
    note: str
    x_name: str
    y_name: str
    x_labels: Mapping[int, str]
    series: Sequence[Series]
    marks: Mapping[int, str]
    is_log_x: bool = True

    def x(self, place: float) -> float:
        """Where a place on the x axis is drawn."""
        first, last = min(self.x_labels), max(self.x_labels)
        return _between(place, first, last, LEFT + 10, RIGHT - 10, self.is_log_x)

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        low, high = self._range
        return _between(value, low, high, BOTTOM, TOP, self._is_log_y)

    @cached_property
    def _is_log_y(self) -> bool:
        return is_steep(self._drawn)

    @cached_property
    def _drawn(self) -> list[float]:
        figures = [n for one in self.series for v in one.values.values() for n in (v.y, v.low, v.high)]
        return [number for number in figures if math.isfinite(number)] or [1.0]

    @cached_property
    def _range(self) -> tuple[float, float]:
        low, high = min(self._drawn), max(self._drawn)
        if self._is_log_y:
            return low / 1.2, high * 1.2
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return low - margin, high + margin

    def x_ticks(self) -> list[int]:
        """The places that are labelled: twelve at most."""
        return sorted(self.x_labels)[:: math.ceil(len(self.x_labels) / 12)]

    def y_ticks(self) -> list[float]:
        """The values that are labelled."""
        return axis_ticks(*self._range, self._is_log_y)

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

    def columns(self) -> list[str]:
        return [self.x_name, *(series.name for series in self.series)]

    def rows(self) -> list[list[str]]:
        return [[label, *_texts(self.series, x)] for x, label in sorted(self.x_labels.items())]


@dataclass(frozen=True)
class HeatMap:
    """Shares by row and column, a panel a model."""

    title: str
    note: str
    row_name: str
    row_labels: Mapping[Any, str]
    column_labels: Mapping[int, str]
    panels: Sequence[Series]

    def rows_of(self, panel: Series) -> list[Any]:
        return [row for row in self.row_labels if any(row == key[0] for key in panel.values)]

    def columns_of(self, panel: Series) -> list[int]:
        return [column for column in self.column_labels if any(column == key[1] for key in panel.values)]

    def columns(self) -> list[str]:
        return [self.row_name, "tokens back", *(panel.name for panel in self.panels)]

    def rows(self) -> list[list[str]]:
        return [
            [row, column, *_texts(self.panels, (r, c))]
            for r, row in self.row_labels.items()
            for c, column in self.column_labels.items()
            if any((r, c) in panel.values for panel in self.panels)
        ]


@dataclass(frozen=True)
class Proved:
    """What a check of a model against its base came to; ``holds`` is None where it could not be made."""

    holds: bool | None
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """One figure before and after, in large print."""

    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Model:
    """What the report says of one conversion or one measurement, beside its charts."""

    name: str
    sentences: Sequence[str]
    tiles: Sequence[Tile] = ()
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
    import jinja2

    manifests = {folder: Manifest.read(folder) for folder in folders}
    short = [path.resolve().name for path in (*folders, *results)]
    names = {
        path: name if short.count(name) == 1 else str(path)
        for path, name in zip((*folders, *results), short, strict=True)
    }
    known: dict[str, tuple[Path, Manifest]] = {}
    models = []
    for folder, manifest in manifests.items():
        if manifest is None:
            raise OutputError(f"{folder} is no converted model.", "Give folders that this tool wrote.")
        known[names[folder]] = folder, manifest
        models.append(_model(names[folder], folder, manifest, folders[folder]))
    memory, curves = [*_memory(known)], [*_perplexity(known), *_factors(known)]
    for path, record in results.items():
        try:
            model, charts = _measured(names[path], record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise OutputError(
                f"{path} is no result of mmod evaluate or diagnose ({type(error).__name__}: {error}).",
                "Give what --json printed, or a converted folder.",
            ) from error
        models.append(model)
        memory += [chart for chart in charts if isinstance(chart, HeatMap)]
        curves += [chart for chart in charts if isinstance(chart, LineChart)]
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return environment.get_template("report.html").render(models=models, memory=memory, curves=curves, frame=frame)


# Of converted folders


def _model(name: str, folder: Path, manifest: Manifest, proof: Proved) -> Model:
    calibration = manifest.calibration
    sentence = f"{manifest.source.name} with scaled A"
    if manifest.length is not None:
        sentence += f", for text of up to {format_length(manifest.length)} tokens"
    if calibration is not None and calibration.train_len is not None:
        sentence += f"; it was trained on {format_length(calibration.train_len)}"
    sentences = [
        f"{sentence}.",
        f"{len(manifest.changed)} tensors were scaled, the other {manifest.identical_tensors:,} are as they were.",
    ]
    if manifest.is_worse:
        sentences.append("By its own table it is worse than the source at every length.")
    if manifest.scales_nothing:
        sentences.append("No scales were better than none, so every factor is 1.")
    if manifest.memory is not None and manifest.memory.cells:
        sentences.append(memory_sentence(manifest.memory))
    elif manifest.memory is not None:
        sentences.append(manifest.memory.skills)
    return Model(
        name=name,
        sentences=sentences,
        tiles=[*_memory_tile(manifest.memory), *_perplexity_tiles(manifest.perplexity)],
        proof=proof,
        # Without paths of this machine.
        snippets=[
            *snippets_of(folder, manifest, folder.resolve().name, is_on_hub=False),
            *repeating(manifest, folder.resolve().name),
        ],
        settings=settings_of(manifest),
        notes=[
            *([perplexity_note(manifest.perplexity)] if manifest.perplexity else []),
            *([memory_note(manifest.memory)] if manifest.memory and manifest.memory.cells else []),
            *manifest.notes,
        ],
    )


def _memory_tile(memory: MemoryTable | None) -> Iterator[Tile]:
    """The farthest fact that the converted model finds reliably in the longest text, or its largest gain there."""
    if memory is None or not memory.cells:
        return
    longest = max(cell.length for cell in memory.cells)
    cells = [cell for cell in memory.cells if cell.length == longest and cell.kind == memory.cells[0].kind]
    found = [cell for cell in cells if cell.converted >= 0.9]
    best = max(found, key=lambda c: c.distance) if found else max(cells, key=lambda c: c.converted - c.base)
    place = f"{format_length(best.distance)} back in {format_length(longest)}"
    yield Tile(f"{best.kind.capitalize()} {place}", f"{best.base:.0%}", f"{best.converted:.0%}")


def _perplexity_tiles(table: PerplexityTable | None) -> Iterator[Tile]:
    lengths = sorted(table.base, key=int) if table is not None else []
    for length in dict.fromkeys([*lengths[-1:], *lengths[:1]]):
        assert table is not None
        label = f"Perplexity at {format_length(int(length))}"
        yield Tile(label, f"{table.base[length]:.2f}", f"{table.converted[length]:.2f}")


def _distinct(series: Iterable[Series]) -> list[Series]:
    """Series without those that are there already, since several models may have one source."""
    found: list[Series] = []
    for one in series:
        if one.values and not any((one.name, one.values) == (other.name, other.values) for other in found):
            found.append(one)
    return found


Known = Mapping[str, tuple[Path, Manifest]]
"""Converted folders by what they are called on the page."""


@dataclass(frozen=True)
class _Curves:
    """Name, line and colour of what is drawn of a model; names of models stand there if there are several."""

    before: tuple[str, str, int]
    after: tuple[str, str, int]
    sliding: tuple[str, str, int]

    @classmethod
    def of(cls, known: Known, name: str, window: int | None = None) -> _Curves:
        color, steady = 1 + [*known].index(name) % (COLORS - 1), f"sliding window of {window}"
        if len(known) == 1:
            return cls(("as trained", "before", 0), ("converted", "after", color), (steady, "sliding", 0))
        source = known[name][1].source.name
        is_shared = len({manifest.source.name for _, manifest in known.values()}) == 1
        return cls(
            (f"{source}, as trained", "before", 0 if is_shared else color),
            (name, "after", color),
            (steady if is_shared else f"{source}, {steady}", "sliding", 0),
        )


def _perplexity(known: Known) -> Iterator[LineChart]:
    tables = {name: m.perplexity for name, (_, m) in known.items() if m.perplexity is not None}
    if not tables:
        return
    series = []
    for name, table in tables.items():
        curves = _Curves.of(known, name, table.sliding_window)
        lengths = sorted(int(length) for length in table.base)
        series += [
            Series(*curves.before, {n: Value(table.base[str(n)], f"{table.base[str(n)]:.2f}") for n in lengths}),
            Series(*curves.after, {n: _after(table, str(n)) for n in lengths}),
        ]
        if table.sliding is not None and table.sliding_window is not None:
            steady = {n: Value(table.sliding, f"{table.sliding:.2f}") for n in lengths if n >= table.sliding_window}
            series.append(Series(*curves.sliding, steady))
    labels = {int(length): format_length(int(length)) for table in tables.values() for length in table.base}
    measured = {(table.text.name, table.span_tokens, table.dtype) for table in tables.values()}
    notes = [f"On {text}; every length covers the same {span:,} tokens." for text, span, _ in sorted(measured)]
    if len(measured) > 1:
        notes.append("Different text, spans or number formats do not compare.")
    made = [m.calibration for _, m in known.values() if m.calibration is not None]
    marks = {c.calibrated_len: "calibrated to" for c in made} | {c.train_len: "trained" for c in made}
    # Where models differ in them, the words would lie upon each other.
    places = [place for place in marks if place is not None and min(labels) <= place <= max(labels)]
    yield LineChart(
        "Perplexity by length",
        " ".join(notes),
        "tokens",
        "perplexity",
        labels,
        _distinct(series),
        {place: marks[place] for place in places} if len(marks) < 3 else {},
    )


def _after(table: PerplexityTable, length: str) -> Value:
    """A converted model's perplexity with its change, and the 95 % interval of that."""
    before, after = table.base[length], table.converted[length]
    text, error = f"{after:.2f}, {change(before, after)}", table.standard_error.get(length)
    if error is not None:
        spread = math.exp(min(1.96 * error, 100.0))
        text += f" (95 %: {change(before, after / spread)} to {change(before, after * spread)})"
    return Value(after, text)


def _memory(known: Known) -> Iterator[HeatMap]:
    tables = {name: m.memory for name, (_, m) in known.items() if m.memory is not None and m.memory.cells}
    for kind in dict.fromkeys(cell.kind for table in tables.values() for cell in table.cells):
        panels, steady = [], []
        for name, table in tables.items():
            curves = _Curves.of(known, name, table.window)
            cells = {(cell.length, cell.distance): cell for cell in table.cells if cell.kind == kind}
            panels += [
                Series(
                    *curves.before, {place: Value(cell.base, f"{cell.base:.0%}") for place, cell in cells.items()}
                ),
                Series(*curves.after, {place: _found(cell) for place, cell in cells.items()}),
            ]
            shares = {place: Value(cell.sliding, f"{cell.sliding:.0%}") for place, cell in cells.items()}
            steady.append(Series(*curves.sliding, shares))
        texts = ", ".join(sorted({table.text.name for table in tables.values()}))
        note = f"Facts hidden in {texts}; ± is half of the 95 % interval."
        yield _heat_map(f"Share found: {kind}", note, "tokens of text", _distinct([*panels, *steady]))


def _found(cell: MemoryCell) -> Value:
    return Value(cell.converted, f"{cell.converted:.0%} ± {100 * cell.error:.0f}")


def _heat_map(title: str, note: str, row_name: str, panels: Sequence[Series]) -> HeatMap:
    rows, columns = (dict.fromkeys(key[axis] for panel in panels for key in panel.values) for axis in (0, 1))
    return HeatMap(
        title,
        note,
        row_name,
        {row: format_length(row) if isinstance(row, int) else str(row) for row in sorted(rows)},
        {column: format_length(column) for column in sorted(columns)},
        panels,
    )


def _factors(known: Known) -> Iterator[LineChart]:
    series, notes = [], []
    for name, (folder, manifest) in known.items():
        if not manifest.changed or find_scales(folder) is None:
            continue
        scales = load_scales(str(folder))
        values = {}
        for layer, (low, middle, high) in factors_by_layer(scales).items():
            text = f"{middle:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")
            # Bands of several models would hide each other.
            values[layer] = Value(middle, text, low, high) if len(known) == 1 else Value(middle, text)
        series.append(Series(*_Curves.of(known, name).after, values))
        notes.append(f"One factor per {scales.granularity}.")
    if series:
        note = "The median of each layer's factors, and the range of the middle 90 %; 1 leaves a layer as it was."
        labels = {layer: str(layer) for one in series for layer in one.values}
        words = " ".join(dict.fromkeys([*notes, note]))
        yield LineChart("Scale factors by layer", words, "layer", "s", labels, series, {}, is_log_x=False)


# Of measurements


def _measured(name: str, record: Mapping[str, Any]) -> tuple[Model, list[LineChart | HeatMap]]:
    """A result of ``mmod evaluate`` or ``mmod diagnose`` as a part of the report."""
    if "verdict" in record:
        return _diagnosis(name, record)
    text = record["text"]["name"]
    model = Model(
        name,
        [f"Measured on {text}, on {record['device']} in {record['dtype']}."],
        settings=[(f"{package} version", str(version)) for package, version in record["versions"].items()],
    )
    entries = record["models"]
    if record["task"] == "perplexity":
        curves = {
            "perplexity": (
                f"Perplexity by length: {name}",
                f"{entries[0]['span_tokens']:,} tokens at every length. {entries[0]['passes']}",
            ),
            "by_position": (f"Perplexity by position: {name}", "In the longest window, up to each position."),
        }
        return model, [
            _by_length(title, note, [(one["model"], "after", one[field]) for one in entries])
            for field, (title, note) in curves.items()
        ]
    charts: list[LineChart | HeatMap] = []
    for kind in dict.fromkeys(cell["kind"] for one in entries for cell in one["cells"]):
        panels = []
        for one in entries:
            cells = {(cell["length"], cell["distance"]): cell for cell in one["cells"] if cell["kind"] == kind}
            panels.append(Series(one["model"], "after", 0, {place: _share(cell) for place, cell in cells.items()}))
        charts.append(
            _heat_map(f"Share found: {kind} ({name})", f"Facts hidden in {text}.", "tokens of text", panels)
        )
    return model, charts


def _diagnosis(name: str, record: Mapping[str, Any]) -> tuple[Model, list[LineChart | HeatMap]]:
    sliding = record["sliding"]
    lines = [
        ("one pass", "before", record["by_position"]),
        (f"sliding window of {sliding['window']}", "sliding", sliding["by_position"]),
    ]
    charts: list[LineChart | HeatMap] = [
        _by_length(f"Perplexity by position: {name}", f"On {record['text']['name']}, up to each position.", lines)
    ]
    shares = {(cell["kind"], cell["distance"]): _share(cell) for cell in record["recall"]}
    if shares:
        title = f"Share found in {format_length(record['target_len'])} tokens: {name}"
        panels = [Series(record["model"], "before", 0, shares)]
        charts.append(_heat_map(title, f"Facts hidden in {record['text']['name']}.", "fact", panels))
    return Model(f"{name}: {record['model']}", [str(sentence) for sentence in record["verdict"]]), charts


def _by_length(title: str, note: str, lines: Sequence[tuple[str, str, Mapping[str, Any]]]) -> LineChart:
    series = [
        Series(
            name,
            line,
            color % COLORS,
            {int(length): Value(float(y), f"{float(y):.2f}") for length, y in values.items()},
        )
        for color, (name, line, values) in enumerate(lines)
    ]
    labels = {length: format_length(length) for one in series for length in one.values}
    return LineChart(title, note, "tokens", "perplexity", labels, series, {})


def _share(cell: Mapping[str, Any]) -> Value:
    """What was found of one kind at one place: of copied spans the share of tokens, else that of whole answers."""
    prompts = f"{cell['samples']} prompts"
    if cell["is_span"]:
        return Value(float(cell["tokens"]), f"{cell['tokens']:.0%} of the tokens, {prompts}")
    share = cell["found"] / cell["samples"]
    return Value(share, f"{share:.0%} (95 %: {cell['low']:.0%} to {cell['high']:.0%}), {prompts}")


# Geometry


def _between(value: float, low: float, high: float, start: float, end: float, is_log: bool) -> float:
    """Where a value lies between two places, in tenths of a unit; in the middle if there is no distance."""
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " L".join(f"{x:g} {y:g}" for x, y in points)


def _texts(series: Iterable[Series], key: Any) -> list[str]:
    return [one.values[key].text if key in one.values else "-" for one in series]
