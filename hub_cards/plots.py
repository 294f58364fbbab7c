"""The card's pictures: what is found in long text, perplexity by length, and factors by layer.

Each is drawn on a light panel of its own, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.lengths import format_length
from converter.manifest import OWN_FOLDER, CalibrationRecord, Manifest, MemoryTable, PerplexityTable
from converter.scales import ScaleSet, layer_number
from converter.scales_file import find_scales
from hub_cards.drawing import AFTER, BEFORE, MUTED, Picture, is_steep, log_axis, new_figure, png_bytes, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_pictures(folder: Path, manifest: Manifest) -> tuple[Picture, ...]:
    """Draw what the manifest and the folder's factors allow; the same folder gives the same bytes.

    Raises:
        CorruptCheckpointError: the factors or the weights cannot be read.
    """
    figures: dict[str, Callable[[], tuple[Figure, str]]] = {}
    if manifest.memory is not None and manifest.memory.cells:
        figures["memory"] = partial(_memory, manifest.memory)
    if manifest.perplexity is not None:
        figures["perplexity"] = partial(_perplexity, manifest.perplexity, manifest.calibration)
    if manifest.changed and find_scales(folder) is not None:
        figures["factors"] = partial(_factors, ScaleSet.load(str(folder)))
    with style():
        drawn = {name: draw() for name, draw in figures.items()}
        return tuple(
            Picture(f"{OWN_FOLDER}/{name}.png", alt, png_bytes(figure)) for name, (figure, alt) in drawn.items()
        )


def _perplexity(table: PerplexityTable, calibration: CalibrationRecord | None) -> tuple[Figure, str]:
    figure, axes = new_figure()
    lengths = sorted(int(length) for length in table.base)
    before = [table.base[str(length)] for length in lengths]
    after = [table.converted[str(length)] for length in lengths]
    axes.plot(lengths, before, "o-", color=BEFORE, label="source", linewidth=2)
    axes.plot(lengths, after, "s-", color=AFTER, label="this model", linewidth=2)
    if table.sliding is not None:
        words = f"source, sliding window of {table.sliding_window}"
        axes.axhline(table.sliding, color=BEFORE, label=words, linestyle="--", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_length(length) for length in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.margins(y=0.12)
    finite = [value for value in [*before, *after] if math.isfinite(value)]
    if finite and is_steep(finite):
        log_axis(axes, finite)
    if calibration is not None:
        for length, words in ((calibration.train_len, "trained"), (calibration.calibrated_len, "calibrated to")):
            if length is None:
                continue
            axes.axvline(length, color=MUTED, linestyle=":", linewidth=1.2)
            place = axes.get_xaxis_transform()
            axes.text(length, 1.0, f" {words}", color=MUTED, fontsize=9, transform=place, va="top")
    axes.set_xlabel("window (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title("Held-out perplexity by length", pad=10)
    axes.legend(loc="best")
    shown = [lengths[0], lengths[-1]] if len(lengths) > 1 else lengths
    ends = "; ".join(
        f"at {format_length(n)} tokens {table.base[str(n)]:.2f} for the source and {table.converted[str(n)]:.2f} "
        "for this model"
        for n in shown
    )
    if table.sliding is not None:
        ends += f"; {table.sliding:.2f} for the source on a sliding window"
    return figure, f"Line chart of perplexity against window length: {ends}."


def _memory(memory: MemoryTable) -> tuple[Figure, str]:
    """Three heat maps of length by distance for the first kind of fact: source, sliding window, this model."""
    from matplotlib.figure import Figure as NewFigure

    kind = memory.cells[0].kind
    cells = {(cell.length, cell.distance): cell for cell in memory.cells if cell.kind == kind}
    lengths, distances = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    panels = ("source", "sliding window", "this model")
    figure = NewFigure(layout="constrained", figsize=(7.2, 0.7 * len(lengths) + 1.8))
    for axes, title, field in zip(
        figure.subplots(1, 3, sharey=True), panels, ("base", "sliding", "converted"), strict=True
    ):
        values = np.full((len(lengths), len(distances)), np.nan)
        for (length, distance), cell in cells.items():
            values[lengths.index(length), distances.index(distance)] = getattr(cell, field)
        axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            color = "white" if value > 0.6 else "#1f2937"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(distances)), [format_length(distance) for distance in distances], fontsize=9)
        axes.set_yticks(range(len(lengths)), [format_length(length) for length in lengths])
        axes.set_title(title, fontsize=11)
        axes.grid(False)
    figure.supxlabel("tokens between the fact and the end", fontsize=10)
    figure.supylabel("length of the text", fontsize=10)
    figure.suptitle(f"Share found, %: {kind}", fontweight="bold", fontsize=12, x=0.02, ha="left")
    longest = max(lengths)
    words = "; ".join(
        f"{format_length(cell.distance)} tokens back {cell.base:.0%} by the source, {cell.sliding:.0%} by a "
        f"sliding window and {cell.converted:.0%} by this model"
        for (length, _), cell in sorted(cells.items())
        if length == longest
    )
    return figure, f"Heat maps of facts found ({kind}) by length and distance; in {longest} tokens: {words}."


def _factors(scales: ScaleSet) -> tuple[Figure, str]:
    """The median and the middle 90 % of each layer's factors."""
    by_layer = factors_by_layer(scales)
    layers = [scales.factors(name) for name in scales.log_s]
    figure, axes = new_figure()
    axes.axhline(1.0, color=MUTED, linewidth=1)
    places = np.arange(len(by_layer))
    low, middle, high = np.array([*by_layer.values()]).T
    if scales.granularity != "layer":
        axes.fill_between(places, low, high, color=AFTER, alpha=0.2, linewidth=0, label="middle 90 %", step="mid")
    axes.plot(places, middle, "o-", color=AFTER, linewidth=1.5, label="median")
    step = math.ceil(len(by_layer) / 12)
    axes.set_xticks(places[::step], [str(layer) for layer in [*by_layer][::step]])
    axes.set_xlabel("layer")
    axes.set_ylabel("s")
    smallest, largest = min(map(np.min, layers)), max(map(np.max, layers))
    if is_steep([min(low), max(high)]):
        log_axis(axes, [float(min(low)), float(max(high))])
    axes.set_title("Scale factors s by layer", pad=10)
    axes.legend(loc="best")
    typical = np.exp(np.mean([np.log(factors).mean() for factors in layers]))
    return figure, (
        f"Scale factors of {len(layers)} layers, one per {scales.granularity}: from {smallest:.3g} to "
        f"{largest:.3g}, geometric mean {typical:.3g}; 1 leaves a layer as it was."
    )


def factors_by_layer(scales: ScaleSet) -> dict[int, tuple[float, float, float]]:
    """The middle 90 % of each layer's factors and their median, as lower end, median, upper end, by its number."""
    by_layer: dict[int, list[NDArray[np.float64]]] = {}
    for name in scales.log_s:
        by_layer.setdefault(layer_number(name) or 0, []).append(scales.factors(name).reshape(-1))
    middle = {n: np.quantile(np.concatenate(s), (0.05, 0.5, 0.95)).tolist() for n, s in sorted(by_layer.items())}
    return {n: tuple(quantiles) for n, quantiles in middle.items()}
