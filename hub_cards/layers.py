"""The numbers behind the card's pictures: each scaled layer's factors, and its A before and after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converter.errors import CorruptCheckpointError
from converter.manifest import SCALES_NAME
from converter.safetensors_file import parse_index, to_float64
from converter.scales import ScaleSet
from converter.scales_file import find_scales, load_stored_scales
from converter.shards import SafetensorsShard, read_bytes

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ScaledLayer:
    """One layer of a converted model.

    Attributes:
        number: the layer's place in the model, as its tensors' names give it.
        factors: s, in the shape in which they are shared (a scalar a layer, a row of heads, a column of channels).
        before, after: |A| = exp(A_log), in A_log's shape.
    """

    number: int
    factors: Values
    before: Values
    after: Values


def read_layers(folder: Path) -> tuple[ScaledLayer, ...]:
    """Every layer that has factors, in the model's order; empty where the folder keeps no factors.

    |A| before lies beside the factors; in earlier conversions it is found from |A| after and the factors.

    Raises:
        CorruptCheckpointError: a file is damaged, or factors stand for a tensor that the folder lacks.
    """
    if find_scales(folder) is None:
        return ()
    stored = load_stored_scales(str(folder))
    scales = stored.scales
    if stored.base:
        return _of_base(scales, stored.base_values())
    A_logs = _read_tensors(folder, scales.log_s.keys())
    layers = []
    for name, A_log in A_logs.items():
        factors = scales.factors(name)
        before = A_log - np.log(factors) if scales.form == "linear" else A_log / factors
        layers.append(ScaledLayer(_layer_number(name), factors, np.exp(before), np.exp(A_log)))
    return tuple(sorted(layers, key=lambda layer: layer.number))


def _of_base(scales: ScaleSet, base: Mapping[str, Values]) -> tuple[ScaledLayer, ...]:
    layers = [
        ScaledLayer(_layer_number(name), scales.factors(name), np.exp(A_log), np.exp(scales.bake(name, A_log)))
        for name, A_log in base.items()
    ]
    return tuple(sorted(layers, key=lambda layer: layer.number))


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else 0


def _read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Values]:
    """Named tensors of a converted folder, exact in float64."""
    index = folder / "model.safetensors.index.json"
    shards = parse_index(index.read_bytes(), index.name).files if index.is_file() else ("model.safetensors",)
    wanted = set(names)
    found: dict[str, Values] = {}
    for shard in (_open_shard(folder / name) for name in shards):
        for tensor in shard.tensors:
            if tensor.name in wanted:
                found[tensor.name] = to_float64(read_bytes(shard, tensor), tensor.dtype).reshape(tensor.shape)
    if missing := sorted(wanted - found.keys()):
        raise CorruptCheckpointError(f"{SCALES_NAME} has factors for {missing[0]}, which the weights lack.")
    return found


def _open_shard(path: Path) -> SafetensorsShard:
    return SafetensorsShard.open(path.name, lambda: path.open("rb"))
