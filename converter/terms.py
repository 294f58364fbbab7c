"""The words for what a scale is: its form and how many eigenvalues share one. No NumPy here."""

from typing import Literal

Form = Literal["linear", "power"]
Granularity = Literal["layer", "head", "channel", "state", "element"]

FORMS: tuple[Form, ...] = ("linear", "power")
GRANULARITIES: tuple[Granularity, ...] = ("layer", "head", "channel", "state", "element")
