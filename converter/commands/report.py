"""``mmod report``: one HTML page of conversions and measurements, with the proof of each conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.commands.requests import ReportRequest, VerifyRequest
from converter.commands.verify import sentences, verify_converted
from converter.disk import write_whole
from converter.errors import CorruptCheckpointError, MmodError, OutputError, SourceError, UsageError, system_errors
from converter.reporting import Reporter
from converter.safetensors_file import parse_json_object
from hub_cards.report import Proved, report_html


def report(request: ReportRequest, reporter: Reporter) -> dict[str, Proved]:
    """Write the page, and return what each folder's check came to.

    Raises:
        OutputError: a folder is no conversion, a file holds no result, or the page cannot be written.
        CorruptCheckpointError: a folder's factors cannot be read.
    """
    proofs: dict[Path, Proved] = {}
    results: dict[Path, Mapping[str, Any]] = {}
    for path in dict.fromkeys(request.folders):
        if path.is_dir():
            proofs[path] = _prove(path, request, reporter)
        else:
            results[path] = _read(path)
    write_whole(request.output, report_html(proofs, results).encode())
    reporter.line(f"Wrote {request.output}")
    return {str(path): proof for path, proof in proofs.items()}


def _prove(folder: Path, request: ReportRequest, reporter: Reporter) -> Proved:
    if not request.proof:
        return Proved(None, ("It was not looked at.",))
    try:
        verified = verify_converted(VerifyRequest(str(folder), base=request.base, load=False), reporter)
    except MmodError as error:
        # A page without a proof still has its charts. Where a base cannot be had, nothing is refuted.
        reporter.warn(f"{folder} is not proved: {error.message}")
        is_refuted = not isinstance(error, SourceError | UsageError)
        return Proved(False if is_refuted else None, (f"{error.message} {error.fix}".rstrip(),))
    return Proved(True, tuple(sentences(verified)))


def _read(path: Path) -> Mapping[str, Any]:
    fix = "Give a folder or a JSON file of mmod evaluate or diagnose."
    with system_errors(f"{path} cannot be read", OutputError, fix):
        content = path.read_bytes()
    try:
        return parse_json_object(content, str(path))
    except CorruptCheckpointError as error:
        raise OutputError(error.message, fix) from error
