"""The card's pictures: perplexity by length, factors by layer, and the spectrum before and after.

Each is drawn on a light panel of its own, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converter.drawing import AFTER, BEFORE, MUTED, Picture, log_axis, new_figure, png_bytes, style
from converter.lengths import format_length
from converter.manifest import OWN_FOLDER, CalibrationRecord, Manifest, MemoryTable, PerplexityTable
from hub_cards.layers import ScaledLayer, Values, read_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 256
"""Factors in a layer that a map can show a row each; more are summed up by quantiles."""
MOST_BARS = 24
"""Layers whose values fit as a bar each."""
MOST_POINTS = 200
"""Eigenvalues in a model that can be drawn one by one; more are summed up by quantiles."""


def draw_pictures(folder: Path, manifest: Manifest, *, redraw: bool = True) -> tuple[Picture, ...]:
    """Draw what the manifest and the folder's factors allow; the same folder gives the same bytes.

    Args:
        redraw: draw what lies in the folder already, too, rather than take it as it is.

    Raises:
        CorruptCheckpointError: the factors or the weights cannot be read.
    """
    layers = read_layers(folder) if manifest.changed else ()
    pictures = []
    with style():
        if manifest.memory is not None and manifest.memory.cells:
            figure, alt = _memory(manifest.memory)
            pictures.append(_picture(folder, "memory", figure, alt, redraw))
        if manifest.perplexity is not None:
            figure, alt = _perplexity(manifest.perplexity, manifest.calibration)
            pictures.append(_picture(folder, "perplexity", figure, alt, redraw))
        if layers:
            figure, alt = _factors(layers, manifest.granularity)
            pictures.append(_picture(folder, "factors", figure, alt, redraw))
            figure, alt = _spectrum(layers)
            pictures.append(_picture(folder, "spectrum", figure, alt, redraw))
    return tuple(pictures)


def _picture(folder: Path, name: str, figure: Figure, alt: str, redraw: bool) -> Picture:
    path = f"{OWN_FOLDER}/{name}.png"
    is_kept = (folder / path).is_file() and not redraw
    return Picture(path, alt, (folder / path).read_bytes() if is_kept else png_bytes(figure))


def _perplexity(table: PerplexityTable, calibration: CalibrationRecord | None) -> tuple[Figure, str]:
    figure, axes = new_figure()
    lengths = sorted(int(length) for length in table.base)
    before = [table.base[str(length)] for length in lengths]
    after = [table.converted[str(length)] for length in lengths]
    axes.plot(lengths, before, "o-", color=BEFORE, label="source", linewidth=2)
    axes.plot(lengths, after, "s-", color=AFTER, label="this model", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_length(length) for length in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.margins(y=0.12)
    finite = [value for value in [*before, *after] if math.isfinite(value)]
    if finite and max(finite) > 5 * min(finite):
        log_axis(axes, finite)
    if calibration is not None:
        for length, words in ((calibration.train_len, "trained"), (calibration.target_len, "calibrated to")):
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
    words = "; ".join(
        f"at {format_length(n)} tokens {table.base[str(n)]:.2f} for the source and {table.converted[str(n)]:.2f} "
        "for this model"
        for n in shown
    )
    return figure, f"Line chart of perplexity against window length: {words}."


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


def _factors(layers: Sequence[ScaledLayer], granularity: str) -> tuple[Figure, str]:
    figure, axes = new_figure()
    counts = {layer.factors.size for layer in layers}
    if counts == {1}:
        axes.axhline(1.0, color=MUTED, linewidth=1)
        places = range(len(layers))
        axes.plot(places, [layer.factors.item() for layer in layers], "o-", color=AFTER, linewidth=1.5)
        _factor_axis(axes, layers)
    elif len(counts) == 1 and counts.pop() <= MOST_ROWS:
        _factor_map(figure, axes, layers, granularity)
    else:
        axes.axhline(1.0, color=MUTED, linewidth=1)
        _spread(axes, [layer.factors for layer in layers], AFTER, "factors", 0.0)
        _factor_axis(axes, layers)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    _layer_axis(axes, layers)
    per = "" if granularity == "layer" else f" and {granularity}"
    axes.set_title(f"Scale factors s by layer{per}", pad=10)
    smallest = min(layer.factors.min() for layer in layers)
    largest = max(layer.factors.max() for layer in layers)
    typical = np.exp(np.mean([np.log(layer.factors).mean() for layer in layers]))
    return figure, (
        f"Scale factors of {len(layers)} layers, one per {granularity}: from {smallest:.3g} to {largest:.3g}, "
        f"geometric mean {typical:.3g}; 1 leaves a layer as it was."
    )


def _factor_map(figure: Figure, axes: Axes, layers: Sequence[ScaledLayer], granularity: str) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    grid = np.stack([layer.factors.reshape(-1) for layer in layers], axis=1)
    reach = max(float(np.abs(np.log(grid)).max()), 0.01)
    norm = LogNorm(np.exp(-reach), np.exp(reach))
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.set_ylabel(granularity)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, label="s", pad=0.02)
    bar.set_ticks(np.exp(np.linspace(-reach, reach, 5)).tolist())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _factor_axis(axes: Axes, layers: Sequence[ScaledLayer]) -> None:
    axes.set_ylabel("s")
    values = [float(value) for layer in layers for value in (layer.factors.min(), layer.factors.max())]
    if max(values) > 5 * min(values):
        log_axis(axes, values)


def _spectrum(layers: Sequence[ScaledLayer]) -> tuple[Figure, str]:
    figure, axes = new_figure()
    before, after = [layer.before for layer in layers], [layer.after for layer in layers]
    if sum(values.size for values in before) <= MOST_POINTS:
        for place, layer in enumerate(layers):
            offsets = (np.arange(layer.before.size) - (layer.before.size - 1) / 2) * 0.6 / layer.before.size
            pairs = (layer.before.reshape(-1), layer.after.reshape(-1))
            axes.vlines(place + offsets, *pairs, color=MUTED, linewidth=1, alpha=0.6)
            for values, color, marker, label in (
                (pairs[0], BEFORE, "o", "source"),
                (pairs[1], AFTER, "s", "this model"),
            ):
                shown = label if place == 0 else None
                axes.plot(place + offsets, values, marker, color=color, markersize=4.5, label=shown)
    else:
        _spread(axes, before, BEFORE, "source", -0.17)
        _spread(axes, after, AFTER, "this model", 0.17)
    log_axis(axes, [float(values.min()) for values in before] + [float(values.max()) for values in after])
    _layer_axis(axes, layers)
    axes.set_ylabel("|A|  (decay rate per unit of Δ)")
    axes.set_title("Spectrum of A before and after", pad=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    medians = [float(np.median(np.concatenate([v.reshape(-1) for v in values]))) for values in (before, after)]
    return figure, (
        f"Eigenvalues of A by layer, before and after scaling, on a logarithmic axis: the median of |A| goes from "
        f"{medians[0]:.3g} to {medians[1]:.3g}."
    )


def _spread(axes: Axes, layers: Sequence[Values], color: str, label: str, offset: float) -> None:
    """The median and the middle 90 % of each layer's values: bars where there is room for them, else bands.

    Args:
        offset: of the bars beside the layer's place, so that two models stand side by side.
    """
    places = np.arange(len(layers))
    low, middle, high = np.array([np.quantile(values, (0.05, 0.5, 0.95)) for values in layers]).T
    label = f"{label}: median, 90 %"
    if len(layers) <= MOST_BARS:
        axes.vlines(places + offset, low, high, color=color, linewidth=3, alpha=0.5)
        axes.plot(places + offset, middle, "o", color=color, markersize=6, label=label)
    else:
        axes.fill_between(places, low, high, color=color, alpha=0.1, linewidth=0)
        axes.plot(places, low, color=color, linewidth=0.9)
        axes.plot(places, high, color=color, linewidth=0.9)
        axes.plot(places, middle, color=color, linewidth=2.2, label=label)


def _layer_axis(axes: Axes, layers: Sequence[ScaledLayer]) -> None:
    """Layer numbers below, at most a dozen of them."""
    step = math.ceil(len(layers) / 12)
    places = range(0, len(layers), step)
    axes.set_xticks(list(places), [str(layers[place].number) for place in places])
    axes.set_xlabel("layer")
