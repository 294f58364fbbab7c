"""The formula of scales, which calibration runs, baking writes and verification checks.

A Mamba layer discretises its state transition matrix A = -exp(A_log) as exp(Δ_t A). Scaling the spectrum
of A (Mamba Modulation, section 5) changes A_log alone:

* ``linear``:  A -> s·A,        A_log -> A_log + log s
* ``power``:   |A| -> |A|^s,    A_log -> A_log · s
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from converter.errors import UsageError
from converter.terms import FORMS, GRANULARITIES, Form, Granularity

__all__ = ["FORMS", "GRANULARITIES", "Form", "Granularity", "ScaleSet"]

Array = TypeVar("Array", bound=Any)


def scaled_A_log(A_log: Array, log_s: Array, form: Form, exp: Callable[[Array], Array]) -> Array:
    """The A_log of the scaled spectrum, for NumPy arrays and torch tensors alike.

    Args:
        A_log: any shape.
        log_s: natural logarithm of the factors; broadcasts against ``A_log``.
        form: ``linear`` (A -> s·A) or ``power`` (|A| -> |A|^s).
        exp: the elementwise exponential of the arrays' library (``np.exp``, ``torch.exp``).
    """
    return A_log + log_s if form == "linear" else A_log * exp(log_s)


def offered_granularities(shape: tuple[int, ...]) -> tuple[Granularity, ...]:
    """Granularities that an A_log of this shape allows, coarsest first.

    Shapes with one axis longer than 1, (heads,) or (1, 1, heads, 1), have one eigenvalue a head. Shapes
    (d_inner, d_state) have one a channel and state; (heads, head_dim, d_state) have heads of channels.
    """
    axes = [size for size in shape if size != 1]
    if len(axes) <= 1:
        return ("layer", "head")
    if len(axes) == 2:
        return ("layer", "channel", "state", "element")
    return ("layer", "head", "channel", "state", "element")


def auto_granularity(shape: tuple[int, ...]) -> Granularity:
    """The granularity ``auto`` stands for: one factor an eigenvalue."""
    return offered_granularities(shape)[-1]


def factor_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the factors of one layer, which broadcasts against an A_log of ``shape``.

    Raises:
        UsageError: the architecture has no such granularity.
    """
    if granularity not in offered_granularities(shape):
        raise UsageError(
            f"An A_log of shape {tuple(shape)} has no granularity '{granularity}'.",
            f"Use one of: {', '.join(offered_granularities(shape))}.",
        )
    if granularity == "layer":
        return (1,) * len(shape)
    if granularity == "element":
        return tuple(shape)
    if granularity == "state":
        return (1,) * (len(shape) - 1) + (shape[-1],)
    if granularity == "channel":
        return (*tuple(shape[:-1]), 1)
    heads = max(range(len(shape)), key=lambda axis: shape[axis]) if len(offered_granularities(shape)) == 2 else 0
    return tuple(size if axis == heads else 1 for axis, size in enumerate(shape))


@dataclass(frozen=True)
class ScaleSet:
    """Factors for every scaled layer of one model.

    Attributes:
        form: how a factor acts on A.
        granularity: how many eigenvalues share a factor.
        log_s: name of an A_log tensor, as the checkpoint's files spell it in the transformers layout, to the
            natural logarithm of its factors, float32, in a shape that broadcasts against that A_log.
    """

    form: Form
    granularity: Granularity
    log_s: Mapping[str, NDArray[np.float32]]

    @classmethod
    def ones(cls, shapes: Mapping[str, tuple[int, ...]], granularity: Granularity, form: Form) -> ScaleSet:
        """The scale set that changes nothing: s = 1 in every layer.

        Args:
            shapes: name of each A_log to its shape.
        """
        zeros = {key: np.zeros(factor_shape(shape, granularity), np.float32) for key, shape in shapes.items()}
        return cls(form, granularity, zeros)

    @classmethod
    def load(cls, location: str) -> ScaleSet:
        """Read the scales of a converted folder, scales file or Hub id (with or without ``@REVISION``)."""
        from converter.scales_file import load_stored_scales

        return load_stored_scales(location).scales

    @contextmanager
    def applied_to(self, model: Any) -> Iterator[Any]:
        """While open, a loaded transformers model runs scaled; then its parameters are what they were.

        In float32 the scaled parameters are those of the baked file, bit for bit.

        Raises:
            UsageError: the scales belong to another model.
        """
        parameters = {name: values for name, values in model.named_parameters() if name.endswith("A_log")}
        names = same_layers(self.log_s, parameters)
        if names is None:
            raise unfit("its layers with an A_log are others")
        scaled = [
            (parameters[name], self.bake(key, parameters[name].detach().double().cpu().numpy()))
            for key, name in names.items()
        ]
        kept = [parameter.detach().clone() for parameter, _ in scaled]
        try:
            for parameter, values in scaled:
                parameter.data.copy_(parameter.new_tensor(values))
            yield model
        finally:
            for (parameter, _), before in zip(scaled, kept, strict=True):
                parameter.data.copy_(before)

    def factors(self, key: str) -> NDArray[np.float64]:
        """The factors s of one layer, float64."""
        return np.exp(self.log_s[key].astype(np.float64))

    def bake(self, key: str, A_log: NDArray[Any]) -> NDArray[np.float64]:
        """The scaled A_log of one layer, in float64 and not yet rounded to the dtype that is written."""
        return scaled_A_log(A_log.astype(np.float64), self.log_s[key].astype(np.float64), self.form, np.exp)


def unfit(difference: str) -> UsageError:
    """The error for scales that were found for another model."""
    return UsageError(
        f"The scales belong to another model: {difference}.", "Give the scales of a conversion of this very model."
    )


def layer_number(name: str) -> int | None:
    """The layer's number in a tensor's name; None if there is none."""
    found = re.search(r"(?:^|\.)(?:layers|blk)\.(\d{1,6})\.", name)
    return int(found[1]) if found else None


def same_layers(keys: Iterable[str], others: Iterable[str]) -> dict[str, str] | None:
    """Each A_log's name to its name elsewhere: the same, or that of the same layer; None if layers differ."""
    others = list(others)
    by_layer = {layer_number(name): name for name in others}
    by_layer[None] = ""
    found = {key: key if key in others else by_layer.get(layer_number(key), "") for key in keys}
    return found if sorted(found.values()) == sorted(others) else None
