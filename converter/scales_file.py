"""mmod/scales.safetensors: a scale set on the disk, in a converted folder or on the Hub.

Its tensors have names that no model uses, so that no loader takes factors for weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from converter.errors import CorruptCheckpointError, SourceError
from converter.layouts import Tensor
from converter.manifest import OWN_FOLDER, SCALES_NAME, Manifest
from converter.safetensors_file import DTYPE_BITS, TensorInfo, header_bytes
from converter.scales import FORMS, GRANULARITIES, Form, Granularity, ScaleSet
from converter.shards import SafetensorsShard, opening, read_bytes
from converter.source import HUB_ID, Snapshot, resolve

_LOG_S, _A_LOG, _SHA256 = "mmod.log_s:", "mmod.A_log:", "sha256:"


def save_scales(folder: Path, scales: ScaleSet, base: Mapping[str, Tensor]) -> Path:
    """Write a scale set into ``folder`` and return the file's path. The same scales give the same bytes.

    Args:
        base: each A_log that the scales were found on, which says later which models they fit.
    """
    metadata = {"form": scales.form, "granularity": scales.granularity}
    factors = [
        (TensorInfo(f"{_LOG_S}{name}", "F32", log_s.shape), log_s.astype("<f4").tobytes())
        for name, log_s in sorted(scales.log_s.items())
    ]
    A_logs = [
        (TensorInfo(f"{_A_LOG}{name}", tensor.dtype, tensor.shape), read_bytes(tensor.shard, tensor.info))
        for name, tensor in sorted(base.items())
    ]
    digests = {f"{_SHA256}{info.name.removeprefix(_A_LOG)}": sha256(data).hexdigest() for info, data in A_logs}
    entries = sorted([*factors, *A_logs], key=lambda entry: -DTYPE_BITS[entry[0].dtype])
    path = folder / SCALES_NAME
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        header_bytes([info for info, _ in entries], metadata | digests) + b"".join(data for _, data in entries)
    )
    return path


@dataclass(frozen=True)
class StoredScales:
    """A scale set as it was stored.

    Attributes:
        base: each A_log that the scales were found on, by the scales' names.
        manifest: what lay beside it, if something did.
        location: where to find the very same again: a Hub id has its commit behind it.
    """

    scales: ScaleSet
    base: Mapping[str, Tensor]
    manifest: Manifest | None
    location: str

    def base_values(self) -> dict[str, NDArray[np.float64]]:
        """The values of ``base``."""
        return {name: tensor.read() for name, tensor in self.base.items()}


def load_stored_scales(location: str) -> StoredScales:
    """Read a scale set and its manifest.

    Args:
        location: the file, a converted folder, or the Hub id of a converted model or of scales alone; with or
            without ``@REVISION``.

    Raises:
        SourceError: there is none.
        CorruptCheckpointError: the file breaks its format.
    """
    path = Path(location).expanduser()
    file = find_scales(path) if path.is_dir() else path if path.is_file() else None
    if file is not None:
        folder = file.parent.parent if file.parent.name == OWN_FOLDER else file.parent
        manifest = Manifest.read(folder)
        return dataclasses.replace(_read_scales(str(file), file, manifest), location=location)
    name, _, revision = location.partition("@")
    if not path.exists() and HUB_ID.fullmatch(name):
        snapshot = resolve(name, revision=revision or None, compose=True, weights=False)
        return dataclasses.replace(scales_of(snapshot), location=f"{name}@{snapshot.revision}")
    raise SourceError(
        f"{location} holds no {SCALES_NAME}.", "Give that file, a folder that this tool wrote, or its Hub id."
    )


def find_scales(folder: Path) -> Path | None:
    """Where a converted folder keeps its scales, or None if it keeps none."""
    path = folder / SCALES_NAME
    return path if path.is_file() else None


def scales_of(converted: Snapshot) -> StoredScales:
    """The scales of a converted folder or Hub model.

    Raises:
        SourceError: it has none.
        CorruptCheckpointError: the file breaks its format.
    """
    return _read_scales(f"{converted.name}/{SCALES_NAME}", converted.fetch(SCALES_NAME), converted.manifest)


def _read_scales(name: str, path: Path, manifest: Manifest | None) -> StoredScales:
    """Read a scale set. Raises CorruptCheckpointError."""
    shard = SafetensorsShard.open(name, opening(path))
    form, granularity = (shard.metadata.get(key) for key in ("form", "granularity"))
    known = form in FORMS and granularity in GRANULARITIES
    A_logs = [info for info in shard.tensors if info.name.startswith(_A_LOG)]
    factors = [info for info in shard.tensors if info not in A_logs]
    if not known or any(info.dtype != "F32" for info in factors):
        raise CorruptCheckpointError(
            f"{name} holds no scales (form {form}, granularity {granularity}).",
            f"Give the {SCALES_NAME} of a conversion.",
        )
    log_s = {
        info.name.removeprefix(_LOG_S): np.frombuffer(read_bytes(shard, info), "<f4").reshape(info.shape).copy()
        for info in factors
    }
    base = {info.name.removeprefix(_A_LOG): Tensor(info.name, info, shard) for info in A_logs}
    for key, tensor in base.items():
        if shard.metadata.get(f"{_SHA256}{key}") != sha256(read_bytes(shard, tensor.info)).hexdigest():
            raise CorruptCheckpointError(f"{name}: the base's {key} is not what its SHA-256 says.", "Get it again.")
    if base.keys() != log_s.keys():
        raise CorruptCheckpointError(f"{name} has factors and A_log of different tensors.", "Get it again.")
    scales = ScaleSet(cast(Form, form), cast(Granularity, granularity), log_s)
    return StoredScales(scales, base, manifest, name)
