"""The public API: what the commands do, as functions that return values and print nothing unless asked to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.commands.requests import BakeRequest, ConvertRequest, EvaluateRequest, VerifyRequest
from converter.inspection import Inspection
from converter.inspection import inspect as inspect_snapshot
from converter.reporting import SILENT, Reporter
from converter.scales import ScaleSet
from converter.source import resolve

if TYPE_CHECKING:
    from converter.baking import BakeReport
    from converter.proof import Proof


def bake(
    model: str | Path,
    output: str | Path,
    scales: ScaleSet | str | Path,
    *,
    reporter: Reporter = SILENT,
    **options: Any,
) -> BakeReport:
    """Write scales into a copy of a checkpoint or GGUF file, and prove the copy.

    Args:
        model: Hub id, folder, GGUF file or ``demo``.
        output: folder to write.
        scales: a scale set, or a converted folder, scales file or Hub id.
        options: further fields of :class:`converter.commands.requests.BakeRequest`, such as ``overwrite``.

    Raises:
        MmodError: whatever keeps the copy from being complete; nothing is left behind then.
    """
    from converter.commands.bake import bake_scales

    given, location = (scales, "scales") if isinstance(scales, ScaleSet) else (None, str(scales))
    request = BakeRequest(str(model), Path(output), location, **options)
    return bake_scales(request, reporter, given)[1]


def verify(converted: str | Path, *, reporter: Reporter = SILENT, **options: Any) -> Proof:
    """Prove that the scaled tensors of a converted model equal the formula, and all others the base.

    Args:
        converted: folder or Hub id.
        options: further fields of :class:`converter.commands.requests.VerifyRequest`, such as ``base``.

    Raises:
        VerificationError: it does not.
    """
    from converter.commands.verify import verify_converted

    return verify_converted(VerifyRequest(str(converted), **options), reporter).proof


def inspect(model: str | Path, *, revision: str | None = None, trust_a_log: bool = False) -> Inspection:
    """What a checkpoint or GGUF file is and which tensors a conversion would change, from headers alone."""
    return inspect_snapshot(
        resolve(str(model), revision=revision, compose=True, weights=False), trust_a_log=trust_a_log
    )


def calibrate(model: str | Path, *, reporter: Reporter = SILENT, **options: Any) -> ScaleSet:
    """Find the scales of a checkpoint. Nothing is written.

    Args:
        model: Hub id, folder or ``demo``.
        options: further fields of :class:`converter.commands.requests.ConvertRequest`: ``data``, ``target_len``,
            ``train_len``, ``method``, ``device``, ...

    Raises:
        MmodError: the model or a text cannot be used.
    """
    from converter.commands.convert import find_scales, prepare
    from converter.temporary import temporary_folder

    with temporary_folder() as folder, ExitStack() as journals:
        request = ConvertRequest(str(model), output=folder / "scaled", windows=0, **options)
        plan = prepare(request, reporter, None)
        return find_scales(plan, folder, journals, reporter)[1].scales


def evaluate(*models: str | Path, reporter: Reporter = SILENT, **options: Any) -> dict[str, Any]:
    """Measure models, by default their perplexity by length; the result is that of ``mmod evaluate --json``.

    Args:
        models: Hub ids, folders or ``demo``.
        options: further fields of :class:`converter.commands.requests.EvaluateRequest`: ``lengths``, ``text``,
            ``task``, ...

    Raises:
        MmodError: a model or text cannot be used.
    """
    from converter.commands.evaluate import evaluate as run

    return run(EvaluateRequest(models=tuple(map(str, models)), **options), reporter, reporter)
