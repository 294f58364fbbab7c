"""The words for what a scale is: its form, how many eigenvalues share one, what it scales. No NumPy here."""

from typing import Literal

Form = Literal["linear", "power"]
Granularity = Literal["layer", "head", "channel", "state", "element"]
Target = Literal["A", "delta"]

FORMS: tuple[Form, ...] = ("linear", "power")
GRANULARITIES: tuple[Granularity, ...] = ("layer", "head", "channel", "state", "element")
