"""``mmod inspect``: shows a person what a checkpoint is."""

from __future__ import annotations

from collections import Counter

from converter.checkpoint_files import in_short
from converter.inspection import Inspection
from converter.reporting import Reporter


def show(inspection: Inspection, reporter: Reporter) -> None:
    """Tell a person, with one row for each number format and shape of A_log."""
    files = "1 file" if inspection.files == 1 else f"{inspection.files} files"
    formats = ", ".join(f"{count:,} in {dtype}" for dtype, count in inspection.dtypes.items())
    reporter.line(f"{inspection.name} ({inspection.kind}, {inspection.revision})")
    reporter.line(
        f"{inspection.tensors} tensors in {files}, {inspection.bytes / 1e6:,.1f} MB; parameters: {formats}"
    )
    if inspection.converted_from:
        reporter.line(f"Converted by this tool from {inspection.converted_from}.")
    if inspection.obstacle:
        reporter.line(f"It cannot be converted: {inspection.obstacle} {inspection.fix}".rstrip())
        return
    reporter.line(f"{inspection.model_type} in the {inspection.layout} layout, loaded as {inspection.load_dtype}")
    what = "ssm_a" if inspection.layout == "gguf" else "A_log"
    groups = Counter((record.dtype, record.shape) for record in inspection.A_log)
    reporter.table(
        f"{what} tensors that a conversion writes",
        ("first name", "layers", "dtype", "shape"),
        [
            (
                next(record.name for record in inspection.A_log if (record.dtype, record.shape) == group),
                str(count),
                group[0],
                " x ".join(map(str, group[1])),
            )
            for group, count in groups.items()
        ],
    )
    reporter.line(
        f"Granularities: {', '.join(inspection.granularities)}; auto takes {inspection.auto_granularity}."
    )
    if inspection.attention_layers:
        reporter.line(
            f"Layers with attention, which stays as it is: {', '.join(map(str, inspection.attention_layers))}"
        )
    if inspection.rounded_ssm:
        kinds = ", ".join(
            f"{kind} ({', '.join(f'{count} in {dtype}' for dtype, count in formats.items())})"
            for kind, formats in inspection.rounded_ssm.items()
        )
        reporter.line(f"State-space tensors that are not in F32: {kinds}")
    if inspection.stated_lengths:
        reporter.line(
            f"Length stated: {', '.join(f'{key} = {value:,}' for key, value in inspection.stated_lengths.items())}"
        )
    if inspection.left_out:
        reporter.line(f"Not copied, since no loader reads it: {in_short(inspection.left_out)}")
