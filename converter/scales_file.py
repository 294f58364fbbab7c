"""mmod/scales.safetensors: a scale set on the disk, in a converted folder or on the Hub.

Its tensors bear names that no model has, so that no loader takes factors for weights. Earlier conversions have
the file beside their weights, with the names of the A_log tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from converter.errors import CorruptCheckpointError, SourceError
from converter.manifest import FORMER_SCALES_NAME, OWN_FOLDER, SCALES_NAME, Manifest
from converter.safetensors_file import TensorInfo, header_bytes
from converter.scales import FORMS, GRANULARITIES, Form, Granularity, ScaleSet, Target
from converter.shards import SafetensorsShard, read_bytes
from converter.source import HUB_ID, Snapshot, resolve

_PREFIX = "mmod.log_s:"
_NAMES = (SCALES_NAME, FORMER_SCALES_NAME)


def save_scales(folder: Path, scales: ScaleSet) -> Path:
    """Write the scale set into ``folder`` and return the file's path. The same scales give the same bytes."""
    names = sorted(scales.log_s)
    metadata = {"form": scales.form, "granularity": scales.granularity, "target": scales.target}
    infos = [TensorInfo(_PREFIX + name, "F32", scales.log_s[name].shape) for name in names]
    path = folder / SCALES_NAME
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        header_bytes(infos, metadata) + b"".join(scales.log_s[name].astype("<f4").tobytes() for name in names)
    )
    return path


@dataclass(frozen=True)
class StoredScales:
    """A scale set with the manifest that lay beside it, if one did."""

    scales: ScaleSet
    manifest: Manifest | None


def load_scales(location: str) -> ScaleSet:
    """Read a scale set. Arguments and errors are those of :func:`load_stored_scales`."""
    return load_stored_scales(location).scales


def load_stored_scales(location: str) -> StoredScales:
    """Read a scale set and its manifest.

    Args:
        location: the file, a converted folder, or the Hub id of a converted model.

    Raises:
        SourceError: there is none.
        CorruptCheckpointError: the file breaks its format.
    """
    path = Path(location).expanduser()
    file = find_scales(path) if path.is_dir() else path if path.is_file() else None
    if file is not None:
        folder = file.parent.parent if file.parent.name == OWN_FOLDER else file.parent
        return StoredScales(_read_scales(str(file), lambda: open(file, "rb")), Manifest.read(folder))
    if not path.exists() and HUB_ID.fullmatch(location):
        snapshot = resolve(location, compose=True, weights=False)
        return StoredScales(scales_of(snapshot), snapshot.manifest)
    raise SourceError(
        f"{location} holds no {SCALES_NAME}.", "Give that file, a folder that this tool wrote, or its Hub id."
    )


def find_scales(folder: Path) -> Path | None:
    """Where a converted folder keeps its scales, or None where it keeps none."""
    return next((path for name in _NAMES if (path := folder / name).is_file()), None)


def scales_of(converted: Snapshot) -> ScaleSet:
    """The scales of a converted folder or Hub model.

    Raises:
        SourceError: it has none.
        CorruptCheckpointError: the file breaks its format.
    """
    name = next((name for name in _NAMES if name in converted.own), SCALES_NAME)
    return _read_scales(converted.name, lambda: converted.open(name))


def _read_scales(name: str, open_file: Callable[[], BinaryIO]) -> ScaleSet:
    """Read a scale set from the file that ``open_file`` opens. Raises CorruptCheckpointError."""
    shard = SafetensorsShard.open(name, open_file)
    form, granularity, target = (shard.metadata.get(key) for key in ("form", "granularity", "target"))
    known = form in FORMS and granularity in GRANULARITIES and target in ("A", "delta")
    if not known or any(info.dtype != "F32" for info in shard.tensors):
        raise CorruptCheckpointError(
            f"{name} holds no scales (form {form}, granularity {granularity}, target {target}).",
            f"Give the {SCALES_NAME} of a conversion.",
        )
    log_s = {
        info.name.removeprefix(_PREFIX): np.frombuffer(read_bytes(shard, info), "<f4").reshape(info.shape).copy()
        for info in shard.tensors
    }
    return ScaleSet(cast(Form, form), cast(Granularity, granularity), log_s, cast(Target, target))
