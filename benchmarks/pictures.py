"""Pictures of evaluations, drawn from their JSON alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from converter.lengths import format_length
from hub_cards.drawing import AFTER, BEFORE, MUTED, Picture, log_axis, new_figure, png_bytes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (BEFORE, AFTER, "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", MUTED)
MARKERS = "os^Dv<>P"
SOLVED, FAILED = "#15803d", "#b91c1c"

Drawn = tuple["Figure", str]


def draw_pictures(record: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Draw what a result has to show; the same result gives the same bytes.

    Args:
        record: the JSON object of one evaluation.
    """
    with style():
        drawn = [(name, *draw(record)) for name, draw in DRAWINGS.get(record["task"], {}).items()]
        return tuple(Picture(f"{name}.png", alt, png_bytes(figure)) for name, figure, alt in drawn)


def _by_length(record: Mapping[str, Any]) -> Drawn:
    return _perplexity(record, "perplexity", "length", "window (tokens)", "window length")


def _by_position(record: Mapping[str, Any]) -> Drawn:
    return _perplexity(
        record, "by_position", "position", "position up to (tokens)", "position in the longest window"
    )


def _perplexity(record: Mapping[str, Any], field: str, title: str, label: str, words: str) -> Drawn:
    """Perplexities of one field of the models' entries, a line a model."""
    figure, axes = new_figure()
    lines = {entry["model"]: _points(entry[field]) for entry in record["models"]}
    _lines(figure, axes, lines)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")
    axes.set_title(f"Perplexity by {title}, {record['text']['name']}", pad=10)
    return figure, _words(f"Line chart of perplexity against {words}", lines)


def _passkey(record: Mapping[str, Any]) -> Drawn:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    models = record["models"]
    columns = min(len(models), 4)
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(max(3.2, 2.6 * columns), 0.6 + 2.4 * rows), layout="constrained")
    counts = []
    for index, entry in enumerate(models):
        axes = figure.add_subplot(rows, columns, index + 1)
        cells = entry["cells"]
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        share = {(cell["length"], cell["depth"]): cell["solved"] / cell["samples"] for cell in cells}
        grid = [[int(share[length, depth] == 1) for length in lengths] for depth in depths]
        axes.imshow(grid, cmap=ListedColormap([FAILED, SOLVED]), vmin=0, vmax=1, aspect="auto")
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                text = f"{share[length, depth]:.0%}"
                axes.text(x, y, text, ha="center", va="center", color="white", fontsize=8)
        axes.grid(False)
        axes.set_xticks(range(len(lengths)), [format_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(_fold(entry["model"]), fontsize=10)
        if index % columns == 0:
            axes.set_ylabel("depth of the key")
        counts.append(f"{entry['model']}: {sum(map(sum, grid))} of {len(cells)} cells solved")
    figure.supxlabel("length (tokens)", fontsize=11)
    return (
        figure,
        f"Grids of pass keys found, length against depth, green where every sample was: {'; '.join(counts)}.",
    )


def _recall(record: Mapping[str, Any]) -> Drawn:
    """A heat map of length by distance for each model and kind of fact."""
    from matplotlib.figure import Figure

    models = record["models"]
    kinds = list(dict.fromkeys(cell["kind"] for cell in models[0]["cells"]))
    figure = Figure(figsize=(2.6 * max(2, len(models)), 0.6 + 1.7 * len(kinds)), layout="constrained")
    words = []
    for row, kind in enumerate(kinds):
        for column, entry in enumerate(models):
            axes = figure.add_subplot(len(kinds), len(models), row * len(models) + column + 1)
            share = {
                (cell["length"], cell["distance"]): cell["tokens"]
                if cell["is_span"]
                else cell["found"] / cell["samples"]
                for cell in entry["cells"]
                if cell["kind"] == kind
            }
            lengths, distances = (sorted({place[axis] for place in share}) for axis in (0, 1))
            grid = [[share.get((length, distance), math.nan) for distance in distances] for length in lengths]
            axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
            for (length, distance), value in share.items():
                color = "white" if value > 0.6 else "#1f2937"
                place = distances.index(distance), lengths.index(length)
                axes.text(*place, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=7)
            axes.grid(False)
            axes.set_xticks(range(len(distances)), [format_length(d) for d in distances], fontsize=7)
            axes.set_yticks(range(len(lengths)), [format_length(length) for length in lengths], fontsize=7)
            axes.set_title(f"{_fold(entry['model'])}: {kind}", fontsize=8)
            longest = max(lengths)
            found = ", ".join(
                f"{share[longest, d]:.0%} {format_length(d)} back" for d in distances if (longest, d) in share
            )
            words.append(f"{entry['model']}, {kind} in {format_length(longest)} tokens: {found}")
    figure.supxlabel("tokens between the fact and the end", fontsize=9)
    figure.supylabel("length of the text", fontsize=9)
    return figure, f"Heat maps of facts found of 100 by length and distance. {'; '.join(words)}."


def _state_norm(record: Mapping[str, Any]) -> Drawn:
    figure, axes = new_figure()
    lines = {}
    for entry in record["models"]:
        norms = entry["norms"]
        lines[f"{entry['model']}: largest layer"] = {
            int(length): max(layer["norm"] for layer in layers) for length, layers in norms.items()
        }
        lines[f"{entry['model']}: smallest layer"] = {
            int(length): min(layer["norm"] for layer in layers) for length, layers in norms.items()
        }
    _lines(figure, axes, lines, pairs=True)
    axes.set_xlabel("text behind the state (tokens)")
    axes.set_ylabel("norm of a layer's state")
    axes.set_title(f"State norm by length, {record['text']['name']}", pad=10)
    return figure, _words("Line chart of the largest and smallest layer's state norm against length", lines)


def _spectrum(record: Mapping[str, Any]) -> Drawn:
    from matplotlib.colors import LogNorm

    values = [value for entry in record["models"] for layer in entry["layers"] for value in layer["lost"]]
    if not values:
        return _unit_spectrum(record)
    norm = LogNorm(max(min(values), 1e-7), max(values))
    return _layer_maps(record, "lost", norm, "viridis_r", "1 - exp(-|A|Δ), forgotten a step")


def _unit_spectrum(record: Mapping[str, Any]) -> Drawn:
    from matplotlib.colors import Normalize

    return _layer_maps(record, "at_unit_step", Normalize(0, 1), "viridis", "exp(-|A|)")


def _layer_maps(record: Mapping[str, Any], field: str, norm: Any, colors: str, label: str) -> Drawn:
    """A heat map a model: a row a layer, its eigenvalues from the slowest to the fastest."""
    import numpy as np
    from matplotlib.figure import Figure

    models = record["models"]
    figure = Figure(figsize=(max(4.2, 3.4 * len(models)), 3.9), layout="constrained")
    medians = []
    image: Any = None
    for index, entry in enumerate(models):
        axes = figure.add_subplot(1, len(models), index + 1)
        rows = [layer[field] for layer in entry["layers"] if layer[field]]
        width = max(map(len, rows))
        grid = np.array([np.interp(np.linspace(0, 1, width), np.linspace(0, 1, len(row)), row) for row in rows])
        image = axes.imshow(grid, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
        axes.grid(False)
        axes.set_xticks([0, width - 1], ["slowest", "fastest"])
        axes.set_title(_fold(entry["model"]), fontsize=10)
        if index == 0:
            axes.set_ylabel("layer")
        medians.append(f"{entry['model']} {float(np.median(grid)):.3g}")
    figure.colorbar(image, ax=figure.axes, label=label, pad=0.02)
    return (
        figure,
        f"Heat map of {label} for every layer's eigenvalues, slowest first; median: {', '.join(medians)}.",
    )


def _decay_rates(record: Mapping[str, Any]) -> Drawn:
    figure, axes = new_figure()
    values: list[float] = []
    medians = []
    width = 0.8 / len(record["models"])
    for index, entry in enumerate(record["models"]):
        rates = [layer["decay_rates"] for layer in entry["layers"]]
        places = [place - 0.4 + (index + 0.5) * width for place in range(len(rates))]
        middles = [row[len(row) // 2] for row in rates]
        color = COLORS[index % len(COLORS)]
        axes.vlines(places, [row[-1] for row in rates], [row[0] for row in rates], color=color, linewidth=1.5)
        axes.plot(places, middles, MARKERS[index % len(MARKERS)], color=color, label=_fold(entry["model"]))
        values += [value for row in rates for value in (row[0], row[-1])]
        medians.append(f"{entry['model']} {sorted(middles)[len(middles) // 2]:.3g}")
    log_axis(axes, values)
    axes.set_xlabel("layer")
    axes.set_ylabel("|A|: median and range")
    axes.set_title("Decay rates by layer", pad=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, f"Range and median of |A| in each layer; median over layers: {', '.join(medians)}."


DRAWINGS: dict[str, dict[str, Callable[[Mapping[str, Any]], Drawn]]] = {
    "perplexity": {"perplexity": _by_length, "position": _by_position},
    "tail": {"tail": _by_length},
    "recall": {"recall": _recall},
    "passkey": {"passkey": _passkey},
    "state-norm": {"state-norm": _state_norm},
    "spectrum": {"spectrum": _spectrum, "spectrum-unit": _unit_spectrum, "decay-rates": _decay_rates},
}


def _points(values: Mapping[str, float]) -> dict[int, float]:
    return {int(length): value for length, value in values.items()}


def _lines(figure: Figure, axes: Axes, lines: Mapping[str, Mapping[int, float]], pairs: bool = False) -> None:
    """A line a model over lengths; ``pairs`` draws every two lines in one colour, the second dashed."""
    for index, (label, points) in enumerate(lines.items()):
        number = index // 2 if pairs else index
        dashes = "--" if pairs and index % 2 else "-"
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(
            *zip(*points.items(), strict=True), dashes + marker, color=COLORS[number % len(COLORS)], label=label
        )
    lengths = sorted({length for points in lines.values() for length in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_length(length) for length in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    values = [value for points in lines.values() for value in points.values()]
    if min(values) > 0 and max(values) > 4 * min(values):
        log_axis(axes, values)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)


def _words(start: str, lines: Mapping[str, Mapping[int, float]]) -> str:
    parts = []
    for label, points in lines.items():
        ends = (f"{points[length]:.4g} at {format_length(length)}" for length in (min(points), max(points)))
        parts.append(f"{label} from {' to '.join(ends)}")
    return f"{start}: {'; '.join(parts)}."


def _fold(name: str) -> str:
    """A model's name in lines short enough for a small panel."""
    return re.sub(r", | \+ ", "\n", name)
