"""The methods, by name; adding one takes its module and one line here.

A module, called as its method, has ``calibrate(problem)``, which moves the factors on the model, has
``problem.validation`` judge them and returns the candidate to keep and the number of steps. A module that can do
without text and model has ``scales_without_data(A_log, settings)`` as well, in plain NumPy, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from calibrator.settings import Settings
from converter.errors import UsageError
from converter.scales import Granularity, ScaleSet, auto_granularity


@dataclass(frozen=True)
class Method:
    """One way to find scales.

    Attributes:
        options: of the settings that only some methods have, those of this one.
        by_layer: whether the granularity ``auto`` is one factor a layer, not one an eigenvalue.
        data_free: whether the module has ``scales_without_data``.
    """

    options: tuple[str, ...]
    by_layer: bool = False
    data_free: bool = False

    def granularity(self, shape: tuple[int, ...]) -> Granularity:
        """The granularity that ``auto`` stands for with an A_log of ``shape``."""
        return "layer" if self.by_layer else auto_granularity(shape)


METHODS: Mapping[str, Method] = {
    "gradient": Method(("steps", "lr", "streams")),
    "spsa": Method(("steps", "lr", "probes", "preset"), by_layer=True),
    "constant": Method(("factor",), by_layer=True, data_free=True),
    "floor": Method(("tau",)),
    "winsorize": Method(("quantile",), data_free=True),
}
OPTIONS = tuple(sorted(frozenset().union(*(method.options for method in METHODS.values()))))


def find_method(name: str, given: Iterable[str]) -> Method:
    """The method of that name.

    Args:
        given: the options of ``OPTIONS`` that were given.

    Raises:
        UsageError: there is none, or it has no such option.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method '{name}'.", f"Use one of: {', '.join(METHODS)}.")
    for option in sorted(set(given).difference(METHODS[name].options)):
        owners = ", ".join(other for other, owner in METHODS.items() if option in owner.options)
        raise UsageError(f"--method {name} has no --{option}.", f"It belongs to: {owners}.")
    return METHODS[name]


def scales_without_data(A_log: Iterable[tuple[str, NDArray[np.float64]]], settings: Settings) -> ScaleSet | None:
    """The scales of a method that needs neither text nor model, or None if it needs them.

    Args:
        A_log: name and values of each tensor; read one after the other.

    Raises:
        UsageError: a setting that the method cannot use.
    """
    if not METHODS[settings.method].data_free:
        return None
    scales: ScaleSet | None = import_module(f"{__name__}.{settings.method}").scales_without_data(A_log, settings)
    return scales
