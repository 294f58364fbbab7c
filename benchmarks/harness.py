"""LongBench, RULER, LAMBADA and any other task of lm-evaluation-harness, on a model as this tool loads it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.errors import CalibrationError, UsageError
from converter.lengths import format_length

PACKAGES = ("lm_eval", "accelerate")
INSTALL = "Install what is missing from the checkout of mmod-convert: pip install '.[harness]'"


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    Attributes:
        metrics: metric name to value, with ``…_stderr`` beside it where the harness gives one.
        samples: documents asked.
        new_tokens: how long an answer may get, as the task defines it; None for tasks that generate nothing.
        version: of the task's definition.
    """

    task: str
    metrics: dict[str, float]
    samples: int
    new_tokens: int | None
    version: str


def require_harness(*packages: str) -> None:
    """Raise CalibrationError where lm-evaluation-harness or one of ``packages``, which tasks need, is missing."""
    missing = [name for name in (*PACKAGES, *packages) if importlib.util.find_spec(name) is None]
    if missing:
        raise CalibrationError(
            f"Tasks of lm-evaluation-harness need {' and '.join(missing)}, which cannot be imported.", INSTALL
        )


def measure_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    max_length: int,
    window: int | None = None,
    task_folder: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Run tasks through lm-evaluation-harness.

    The harness cannot read a Mamba's length from its config and would cut every prompt to 2,048 tokens, so
    ``max_length`` is passed on: prompt and answer together have so many tokens. How many of them the answer may
    take is the task's own ``max_gen_toks``.

    Args:
        model: anything with transformers' ``forward`` and ``generate``.
        tasks: names that the harness knows, or that ``task_folder`` defines.
        max_length: tokens. RULER's tasks are made at that length.
        window: tokens at a prompt's end, answer included, that the model reads; all by default. This is a sliding
            window whose state is reset.
        task_folder: with definitions of further tasks; may hold code, which the harness runs.
        limit: documents a task, all by default.

    Raises:
        CalibrationError: the harness, or a package that a task needs, is not installed.
        UsageError: a task is not known.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # RULER makes data at each of these lengths; BABILong reads the part of its data set that is called so.
    lengths = format_length(max_length) if "babilong_qa1" in tasks else [max_length]
    known = {"max_seq_lengths": lengths, "tokenizer": tokenizer.name_or_path}
    # Reading the harness's own definitions takes seconds, which a folder that defines every task can do without.
    manager = TaskManager(include_path=task_folder, include_defaults=task_folder is None, metadata=known)
    if set(tasks) - set(manager.all_tasks):
        manager = TaskManager(include_path=task_folder, metadata=known)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UsageError(f"lm-evaluation-harness has no task {', '.join(unknown)}.", "See: lm-eval ls tasks")
    kept = window or max_length
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=kept, batch_size=1)
    try:
        # Code of tasks prints as it makes their data; stdout is for the scores.
        with contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except ImportError as error:
        raise CalibrationError(f"{', '.join(tasks)} cannot be loaded: {error}", INSTALL) from error
    assert found is not None, "only ranks other than the first get no results"
    return [_score(name, found) for name in found["results"] if name in found["configs"]]


def _score(task: str, found: Any) -> TaskScore:
    values = {key.partition(",")[0]: value for key, value in found["results"][task].items()}
    config = found["configs"][task]
    settings = config.get("generation_kwargs") or {}
    return TaskScore(
        task=task,
        metrics={
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name != "sample_len"
        },
        samples=int(found["n-samples"][task]["effective"]),
        new_tokens=settings.get("max_gen_toks"),
        version=str(found["versions"].get(task)),
    )
