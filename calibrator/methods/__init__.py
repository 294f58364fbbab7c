"""The methods, by name; adding one takes its module and one line here.

A module has ``calibrate(problem)``, which moves the factors on the model, has ``problem.validation`` judge them
and returns the candidate to keep and the number of steps. A module that can do without text and model has
``scales_without_data(A_log, settings)`` as well, in plain NumPy, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from calibrator.settings import Settings
from converter.errors import UsageError
from converter.scales import Granularity, ScaleSet, Target, auto_granularity, offered_granularities


@dataclass(frozen=True)
class Method:
    """One way to find scales.

    Attributes:
        module: where it is.
        options: of the settings that only some methods have, those of this one, in sets of which one may be given.
        auto: which granularity ``auto`` stands for: ``finest`` is one factor an eigenvalue, ``coarse`` one a
            channel or else a layer, ``layer`` one a layer.
        target: what is scaled.
        data_free: whether the module has ``scales_without_data``.
    """

    module: str
    options: tuple[tuple[str, ...], ...]
    auto: str = "finest"
    target: Target = "A"
    data_free: bool = False

    @property
    def all_options(self) -> frozenset[str]:
        """The options of all sets."""
        return frozenset().union(*self.options)

    def granularity(self, shape: tuple[int, ...]) -> Granularity:
        """The granularity that ``auto`` stands for with an A_log of ``shape``."""
        offered = offered_granularities(shape)
        if self.auto == "finest":
            return auto_granularity(shape)
        return "channel" if self.auto == "coarse" and "channel" in offered else "layer"


_HERE = "calibrator.methods."
GRADIENT = ("steps", "lr", "streams")
SPSA = ("steps", "lr", "probes", "preset")
METHODS: Mapping[str, Method] = {
    "gradient": Method(_HERE + "gradient", (GRADIENT,)),
    "spsa": Method(_HERE + "spsa", (SPSA,), "layer"),
    "constant": Method(_HERE + "constant", (("factor",),), "layer", data_free=True),
    "floor": Method(_HERE + "floor", (("tau",),)),
    "winsorize": Method(_HERE + "winsorize", (("quantile",),), data_free=True),
    "mambaextend": Method(_HERE + "mambaextend", (GRADIENT, SPSA), "coarse", target="delta"),
}
OPTIONS = tuple(sorted(frozenset().union(*(method.all_options for method in METHODS.values()))))


def find_method(name: str, given: Iterable[str]) -> Method:
    """The method of that name.

    Args:
        given: the options of ``OPTIONS`` that were given.

    Raises:
        UsageError: there is none, it has no such option, or not together with another.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method '{name}'.", f"Use one of: {', '.join(METHODS)}.")
    method, wanted = METHODS[name], set(given)
    for option in sorted(wanted - method.all_options):
        owners = ", ".join(other for other, owner in METHODS.items() if option in owner.all_options)
        raise UsageError(f"--method {name} has no --{option}.", f"It belongs to: {owners}.")
    if not any(wanted.issubset(options) for options in method.options):
        sets = " or ".join(" ".join(f"--{option}" for option in options) for options in method.options)
        raise UsageError("These options belong to two ways of calibrating.", f"Give some of {sets}.")
    return method


def scales_without_data(A_log: Iterable[tuple[str, NDArray[np.float64]]], settings: Settings) -> ScaleSet | None:
    """The scales of a method that needs neither text nor model, or None if it needs them.

    Args:
        A_log: name and values of each tensor; read one after the other.

    Raises:
        UsageError: a setting that the method cannot use.
    """
    method = METHODS[settings.method]
    if not method.data_free:
        return None
    scales: ScaleSet | None = import_module(method.module).scales_without_data(A_log, settings)
    return scales
