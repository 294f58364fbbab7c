"""The numbers behind the card's pictures: each scaled layer's factors, and its A before and after."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converter.errors import CorruptCheckpointError
from converter.manifest import SCALES_NAME, Manifest
from converter.safetensors_file import parse_index, read_header, to_float64

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


def read_layers(folder: Path, manifest: Manifest) -> tuple[ScaledLayer, ...]:
    """Every layer that has factors, in the model's order; empty where the folder keeps no factors.

    |A| before is found from |A| after and the factors, so that nothing but the converted folder is needed.

    Raises:
        CorruptCheckpointError: a file is damaged, or factors stand for a tensor that the folder lacks.
    """
    if not (folder / SCALES_NAME).is_file():
        return ()
    log_factors = _read_tensors(folder, dict.fromkeys(_names(folder / SCALES_NAME), SCALES_NAME))
    files = _weight_files(folder)
    if missing := sorted(log_factors.keys() - files.keys()):
        raise CorruptCheckpointError(f"{SCALES_NAME} has factors for {missing[0]}, which the weights lack.")
    A_logs = _read_tensors(folder, {name: files[name] for name in log_factors})
    layers = []
    for name, log_s in log_factors.items():
        A_log = A_logs[name]
        before = A_log - log_s if manifest.form == "linear" else A_log / np.exp(log_s)
        layers.append(ScaledLayer(_layer_number(name), np.exp(log_s), np.exp(before), np.exp(A_log)))
    return tuple(sorted(layers, key=lambda layer: layer.number))


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else 0


def _names(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [tensor.name for tensor in read_header(file, path.name).tensors]


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name to the weight file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return dict(parse_index(index.read_bytes(), index.name).shards)
    return dict.fromkeys(_names(folder / "model.safetensors"), "model.safetensors")


def _read_tensors(folder: Path, files: dict[str, str]) -> dict[str, Values]:
    """Named tensors, exact in float64."""
    found: dict[str, Values] = {}
    for file_name in dict.fromkeys(files.values()):
        with (folder / file_name).open("rb") as file:
            header = read_header(file, file_name)
            for tensor in header.tensors:
                if files.get(tensor.name) == file_name:
                    file.seek(header.starts[tensor.name])
                    found[tensor.name] = to_float64(file.read(tensor.nbytes), tensor.dtype).reshape(tensor.shape)
    return found
