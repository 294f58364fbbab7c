"""Scores of lm-evaluation-harness for a card, read from what its benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path

from converter.errors import UsageError
from converter.manifest import Manifest, TaskScore, TaskTable
from converter.source import resolve


def read_tasks(path: Path, folder: Path, manifest: Manifest) -> TaskTable:
    """What lm-evaluation-harness found of the source and of a converted folder, for its card.

    Args:
        path: JSON of ``benchmarks.measures --task harness``, of these two models in this order.

    Raises:
        UsageError: it is something else.
    """
    try:
        record = json.loads(path.read_bytes())
        before, after = record["models"]
        if (before["revision"], after["revision"]) != (
            manifest.source.revision,
            resolve(str(folder), compose=True).revision,
        ):
            raise ValueError("it measured other models")
        scores = []
        for old, new in zip(before["scores"], after["scores"], strict=True):
            metric = next(
                (name for name in ("acc_norm", "acc") if name in new["metrics"]), next(iter(new["metrics"]))
            )
            base, converted = (float(score["metrics"][metric]) for score in (old, new))
            error = new["metrics"].get(f"{metric}_stderr")
            scores.append(TaskScore(new["task"], metric, new["samples"], base, converted, error))
        return TaskTable(max(record["settings"]["lengths"]), record["settings"].get("limit"), scores)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UsageError(
            f"{path} has no scores of the source and of {folder}: {error}.",
            "Write it with: python -m benchmarks.measures SOURCE CONVERTED --task harness --output FOLDER",
        ) from error
