"""Whether scales found on one checkpoint fit another: a copy in another format, a quantised copy, a fine-tune.

The factors multiply A, so A_log decides: a checkpoint with the A_log of the scales' base takes them, however its
other weights are stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import LayoutError, UsageError
from converter.layouts import Checkpoint
from converter.safetensors_file import TORCH_NAMES, rounded
from converter.scales import ScaleSet, factor_shape, same_layers, unfit

Values = NDArray[np.float64]
_Order = Callable[[NDArray[Any]], NDArray[Any]]
# An exponential and its logarithm in float32 move A_log by less than this; neighbouring heads lie further apart.
_SLACK = 2e-6
CLOSE = 0.01
"""How far an A_log may lie from the base's for the same scales to be taken: A within one percent."""


@dataclass(frozen=True)
class Fit:
    """A scale set under the names, shapes and order of the checkpoint that takes it.

    Attributes:
        agreement: a sentence on how closely A_log is the base's.
    """

    scales: ScaleSet
    agreement: str


def fit_scales(
    checkpoint: Checkpoint, scales: ScaleSet, base: Mapping[str, Values], *, anyway: bool = False
) -> Fit:
    """Bring a scale set into a checkpoint's terms, if its A_log is the one that the scales were found for.

    Args:
        base: A_log of the checkpoint that the scales were found on, by the scales' names.
        anyway: take the scales whatever A_log is.

    Raises:
        UsageError: the scales belong to another model; the first tensor that differs is named.
        LayoutError: a tensor holds no A_log.
    """
    names = same_layers(checkpoint.A_log, scales.log_s)
    if names is None:
        strange = sorted(scales.log_s.keys() ^ checkpoint.A_log.keys())
        raise unfit(f"{strange[0]} is not in both ({len(strange)} such names)")
    found = {name: _read_A_log(checkpoint, name) for name in names}
    for name, of_base in names.items():
        if found[name].size != base[of_base].size:
            raise unfit(f"{name} has {found[name].size} values, its A_log had {base[of_base].size}")
    orders = _orders(checkpoint)
    fitted = {words: _renamed(checkpoint, scales, names, arranged) for words, arranged in orders.items()}
    # The largest difference in each tensor, against a base that was reordered and rounded on its way.
    candidates = [
        (
            {
                name: float(np.abs(values - arranged(rounded(base[names[name]].reshape(-1), rounding))).max())
                for name, values in found.items()
            },
            order,
            rounding,
        )
        for order, arranged in orders.items()
        for rounding in ("F32", "BF16", "F16")
    ]
    distance, order, rounding = min(candidates, key=lambda candidate: max(candidate[0].values()))
    farthest, chosen = max(distance.values()), fitted[order].log_s
    for also, other, _ in candidates:
        is_same = all(np.array_equal(factors, chosen[name]) for name, factors in fitted[other].log_s.items())
        if max(also.values()) <= _SLACK and not is_same:
            raise UsageError(
                f"Heads of {checkpoint.snapshot.name} have the same A_log, so their order cannot be told.",
                "Scale the original checkpoint and convert that, or find scales with --granularity layer.",
            )
    limit = _SLACK if checkpoint.layout == "gguf" else CLOSE
    if farthest > limit and not anyway:
        first = next(name for name, value in distance.items() if value > limit)
        raise UsageError(
            f"{first} is not the A_log that the scales were found for: they differ by up to {distance[first]:.2g}.",
            "Give a copy or fine-tune of the scales' base, or add --anyway to scale it all the same.",
        )
    words = f"A_log is that of the scales' base{order}"
    if farthest > _SLACK:
        words += f" to within {farthest:.2g}"
    elif rounding != "F32":
        words += f", rounded to {TORCH_NAMES[rounding]}"
    return Fit(fitted[order], f"{words}.")


def _read_A_log(checkpoint: Checkpoint, name: str) -> Values:
    """One A_log, flat. Raises LayoutError if an ``ssm_a`` is not negative."""
    values = checkpoint.A_log[name].read().reshape(-1)
    if checkpoint.layout != "gguf":
        return values
    if not (values < 0).all():
        raise LayoutError(f"{name} holds values that are not negative, so it is no -exp(A_log).")
    return np.log(-values)


def _orders(checkpoint: Checkpoint) -> dict[str, _Order]:
    """In words how a file may order the heads of an A_log, and what reorders the base's values like that.

    As it stands, and as llama.cpp's converter of Qwen3.5 has it: value heads dealt out over their key heads.
    """
    orders: dict[str, _Order] = {"": lambda values: values}
    groups = checkpoint.config.get(f"{checkpoint.model_type}.ssm.group_count")
    sizes = {math.prod(tensor.shape) for tensor in checkpoint.A_log.values()}
    if checkpoint.layout == "gguf" and isinstance(groups, int) and len(sizes) == 1:
        heads = sizes.pop()
        if 1 < groups < heads and heads % groups == 0:
            orders[", with its value heads in llama.cpp's order"] = lambda values: values.reshape(
                groups, heads // groups
            ).T.reshape(-1)
    return orders


def _renamed(checkpoint: Checkpoint, scales: ScaleSet, names: Mapping[str, str], arranged: _Order) -> ScaleSet:
    log_s = {}
    for name, of_base in names.items():
        factors, shape = scales.log_s[of_base], checkpoint.A_log[name].shape
        if factors.size == math.prod(shape):
            factors = arranged(factors.reshape(-1))
        due = factor_shape(shape, scales.granularity)
        # Another number of factors is for plan_changes to refuse.
        log_s[name] = factors.reshape(due) if factors.size == math.prod(due) else factors
    return dataclasses.replace(scales, log_s=log_s)
