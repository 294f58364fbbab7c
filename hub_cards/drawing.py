"""How every picture looks: one style, light panels that read alike on light and dark pages, PNG bytes."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, MUTED = "#b45309", "#1d4ed8", "#6b7280"
STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 3.9),
    "figure.dpi": 200,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.facecolor": "#fafafa",
    "axes.facecolor": "#fafafa",
    "savefig.facecolor": "#fafafa",
    "text.color": "#1f2937",
    "axes.labelcolor": "#1f2937",
    "axes.edgecolor": "#9ca3af",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A picture beside a text: its path relative to the text's folder, what it shows in words, and the PNG file."""

    path: str
    alt: str
    png: bytes = field(repr=False)


@contextmanager
def style() -> Iterator[None]:
    """While open, figures are made and saved in the house style."""
    # It says on stderr where it cannot keep a cache, which no picture needs.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure() -> tuple[Figure, Axes]:
    """A figure that needs no screen: made without pyplot, it is drawn by Agg when it is saved."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    return figure, figure.add_subplot()


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file; without the library's version in it, the same numbers give the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=_log_steps(min(values), max(values))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def is_steep(values: Sequence[float]) -> bool:
    """Whether values want a logarithmic axis."""
    return max(values) > 5 * min(values) > 0


def axis_ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round values between two others, for an axis that matplotlib does not draw."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(10, subs=_log_steps(low, high)) if is_log else MaxNLocator(5, steps=[1, 2, 5, 10])
    return [float(value) for value in locator.tick_values(low, high) if low <= value <= high]


def _log_steps(low: float, high: float) -> tuple[float, ...]:
    return (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
