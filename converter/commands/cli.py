"""The command line: ``mmod-convert`` is the main job, ``mmod`` has it and every other verb.

Nothing here imports torch or transformers before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from converter.commands import parameters, requests
from converter.commands.parameters import Output, register
from converter.errors import UsageError
from converter.interruption import Interrupted
from converter.reporting import Reporter

if TYPE_CHECKING:
    from hub_cards.destination import Destination

NOTHING_GAINED = 3
"""Exit status of a conversion whose every factor is 1."""

app = typer.Typer(name="mmod", no_args_is_help=True, rich_markup_mode="rich")
convert_app = typer.Typer(name="mmod-convert", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _mmod(version: Annotated[bool, parameters.SHOWN["version"]] = False) -> None:
    """Make Mamba checkpoints read long text: calibrate scales of A, and bake them into the weights."""


@register("convert", requests.ConvertRequest, app)
@register("mmod-convert", requests.ConvertRequest, convert_app)
def convert(request: requests.ConvertRequest, output: Output) -> None:
    """Calibrate a Mamba checkpoint for long context and bake the scales into its A_log."""
    from converter.commands.convert import convert as run

    if request.on:
        from converter.commands.jobs import convert_on

        output.json(convert_on(request, output.reporter))
        return
    if not request.push and (given := request.given()):
        raise UsageError(f"{given[0]} does nothing without --push.", "Add --push, or leave it out.")
    destination = request.destination() if request.push else None
    conversion = run(request, output.reporter, destination)
    if not conversion.written:
        return
    manifest, plan, url = conversion.manifest, conversion.plan, None
    nothing_gained = manifest is not None and manifest.scales_nothing
    if destination is not None and nothing_gained:
        output.reporter.line("Nothing is pushed.")
    elif destination is not None and manifest is not None:
        url = _push(plan.output, destination, output.reporter)["url"]
    table = manifest.perplexity if manifest else None
    output.json(
        {
            "output": str(plan.output),
            "source": plan.snapshot.name,
            "revision": plan.snapshot.revision,
            "method": request.method,
            "perplexity": {"base": table.base, "converted": table.converted} if table else None,
            "changed_tensors": len(manifest.changed if manifest else plan.changing),
            "identical_tensors": manifest.identical_tensors if manifest else None,
            "url": url,
        }
    )
    if nothing_gained:
        raise typer.Exit(NOTHING_GAINED)


@register("demo", requests.DemoRequest, app)
def demo(request: requests.DemoRequest, output: Output) -> None:
    """Convert a small bundled model, and show what it predicts and recalls before and after."""
    convert(request, output)


@register("diagnose", requests.DiagnoseRequest, app)
def diagnose(request: requests.DiagnoseRequest, output: Output) -> None:
    """Tell whether a model needs scaling: loss and recall on long text against a sliding window."""
    from converter.commands.diagnose import diagnose as run

    output.json(run(request, output.reporter, output.answer))


@register("ask", requests.AskRequest, app)
def ask(request: requests.AskRequest, output: Output) -> None:
    """Hide a sentence in a long text and ask models for it, side by side."""
    from converter.commands.ask import ask as run

    output.json(run(request, output.reporter, output.answer))


@register("evaluate", requests.EvaluateRequest, app)
def evaluate(request: requests.EvaluateRequest, output: Output) -> None:
    """Measure models: perplexity by length, or recall by length and distance."""
    from converter.commands.evaluate import evaluate as run

    run(request, output.reporter, output.answer, output.json)


@register("bake", requests.BakeRequest, app)
def bake(request: requests.BakeRequest, output: Output) -> None:
    """Write the scales of an earlier conversion into a checkpoint or GGUF file, without calibrating."""
    from converter.checkpoint_files import in_short
    from converter.commands.bake import bake_scales

    snapshot, report = bake_scales(request, output.reporter)
    proved = "compared with the source" if request.proof else "not compared with the source (--no-proof)"
    output.reporter.line(
        f"{len(report.changed)} tensors were scaled, {report.identical} copied; {proved}. "
        f"The model is in {request.output}."
    )
    if report.left_out:
        output.reporter.line(f"Not copied, since no loader reads it: {in_short(report.left_out)}")
    output.json(
        {
            "output": str(request.output),
            "source": snapshot.name,
            "revision": snapshot.revision,
            "changed_tensors": len(report.changed),
            "identical_tensors": report.identical,
            "proved": request.proof,
            "left_out": list(report.left_out),
        }
    )


@register("verify", requests.VerifyRequest, app)
def verify(request: requests.VerifyRequest, output: Output) -> None:
    """Prove that the scaled tensors of a converted model equal the formula, and all others the base.

    On the Hub, a file whose SHA-256 is the base's is not read. Where the two differ, one of them is read: with the
    other's A_log in it, it must have the other's SHA-256. A model that is not proved ends in exit status 1.
    """
    from converter.commands.verify import sentences, verify_converted

    verified = verify_converted(request, output.reporter)
    proof = verified.proof
    for sentence in sentences(verified):
        output.answer.line(sentence)
    output.json(
        {
            "converted": verified.converted.name,
            "base": verified.base.name,
            "base_revision": verified.base.revision,
            "identical_tensors": proof.identical,
            "changed_tensors": proof.changed,
            "equal_by_hash": list(proof.by_hash),
            "not_proved": list(proof.unproved),
        }
    )


@register("inspect", requests.InspectRequest, app)
def inspect(request: requests.InspectRequest, output: Output) -> None:
    """Say what a checkpoint is and which tensors a conversion would change, from headers alone.

    The exit status is 1 where it cannot be converted.
    """
    from converter.commands import api
    from converter.commands.inspect import show

    inspection = api.inspect(request.model, revision=request.revision, trust_a_log=request.trust_a_log)
    show(inspection, output.answer)
    output.json(dataclasses.asdict(inspection))
    if inspection.obstacle:
        raise typer.Exit(1)


@register("push", requests.PushRequest, app)
def push(request: requests.PushRequest, output: Output) -> None:
    """Push a converted folder to the Hub in one commit; what is there already is not sent."""
    if request.scales_only:
        from hub_cards.publish import scales_alone

        with scales_alone(request.folder) as alone:
            done = _push(alone, request.destination(scales_of=request.folder), output.reporter)
    else:
        done = _push(request.folder, request.destination(), output.reporter)
    output.json(done)


@register("card", requests.CardRequest, app)
def card(request: requests.CardRequest, output: Output) -> None:
    """Write the model card of a converted folder again, keeping what was added by hand."""
    from converter.manifest import Manifest
    from hub_cards.card import make_card
    from hub_cards.task_scores import read_tasks

    if (request.repo_id or request.tasks) and len(request.folders) > 1:
        raise UsageError(
            "--repo-id and --tasks are of one model, and several folders are given.", "Give one folder."
        )
    written = []
    for folder in request.folders:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise UsageError(f"{folder} is no converted model.", "Give a folder that this tool wrote.")
        if request.tasks is not None:
            manifest = dataclasses.replace(manifest, tasks=read_tasks(request.tasks, folder, manifest))
            manifest.write(folder)
        card = make_card(folder, manifest, source_card=None, repo_id=request.repo_id)
        path = card.write(folder, output.reporter)
        written.append(str(path))
        output.reporter.line(f"Wrote {path}")
    output.json({"cards": written})


@register("report", requests.ReportRequest, app)
def report(request: requests.ReportRequest, output: Output) -> None:
    """Write one HTML page with interactive charts of conversions and measurements, and what verify says of them.

    A conversion that is not what its manifest says is shown as such, and ends in exit status 1.
    """
    from converter.commands.report import report as run

    proofs = run(request, output.reporter)
    output.json({"report": str(request.output), "proved": {name: proof.holds for name, proof in proofs.items()}})
    if any(proof.holds is False for proof in proofs.values()):
        raise typer.Exit(1)


def _push(folder: Path, destination: Destination, reporter: Reporter) -> dict[str, Any]:
    """Show what a push would send, then push; returns the plan, address and commit as plain values."""
    from hub_cards.publish import plan_push
    from hub_cards.publish import push as send

    plan = plan_push(folder, destination, reporter=reporter)
    plan.show(reporter)
    if destination.dry_run:
        return {**plan.to_json(), "url": None, "commit": None}
    try:
        result = send(plan, reporter=reporter)
    except Interrupted:
        reporter.warn(f"{folder} is complete. Go on with: {destination.push_line(folder)}")
        raise
    reporter.line(f"Pushed to {result.url}" if result.commit else f"{result.url} holds the same already.")
    return {**plan.to_json(), "url": result.url, "commit": result.commit}
