"""The command line: ``mmod-convert`` is the main job, ``mmod`` has it and every other verb.

Nothing here imports torch or transformers before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from converter.commands.console import Console
from converter.errors import MmodError, UsageError, words_of
from converter.interruption import Interrupted, end_on_signals
from converter.json_text import json_text
from converter.lengths import parse_length, parse_lengths, parse_numbers
from converter.reporting import Reporter, printable

if TYPE_CHECKING:
    from hub_cards.destination import Destination

NOTHING_GAINED = 3
"""Exit status of a conversion whose every factor is 1."""

app = typer.Typer(name="mmod", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
convert_app = typer.Typer(name="mmod-convert", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


def _silence_libraries(quiet: bool) -> bool:
    """Keep off the progress bars of the Hub client and of datasets, which ask for this when they are imported."""
    if quiet:
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return quiet


def _show_tracebacks(wanted: bool) -> bool:
    if wanted:
        os.environ["MMOD_DEBUG"] = "1"
    return wanted


def _require_stdout(wanted: bool) -> bool:
    if wanted and sys.stdout is None:
        raise UsageError("The result cannot be written: stdout is closed.", "Leave it open, or leave out --json.")
    return wanted


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show where an error came from.", callback=_show_tracebacks, is_eager=True),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show warnings and errors only.", callback=_silence_libraries),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step.")]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on stdout; all else goes to stderr.", callback=_require_stdout
    ),
]
Model = Annotated[str, typer.Argument(help="Hub id, local folder, or demo, demo:mamba.", show_default=False)]
AnyModel = Annotated[
    str, typer.Argument(help="Hub id, local folder, GGUF file, or demo, demo:mamba.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or Hub id, where none lies beside the model.")]
TextToMeasure = Annotated[
    list[str] | None, typer.Option(help="File, folder, JSONL or Hub data set; a bundled novel by default.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Machine")]
DeviceMap = Annotated[
    str, typer.Option(help="none, or auto to spread the layers over all GPUs.", rich_help_panel="Machine")
]
Memory = Annotated[
    str,
    typer.Option(
        help="What layers keep for gradients: auto, keep (all), checkpoint (their input) or offload (that, on the "
        "host).",
        rich_help_panel="Machine",
    ),
]
AllowSlow = Annotated[
    bool, typer.Option("--allow-slow", help="Run on CUDA without the kernels.", rich_help_panel="Machine")
]
TrustALog = Annotated[
    bool,
    typer.Option("--trust-a-log", help="Take every *A_log of an unknown architecture for the log of a decay."),
]
RaisePositionLimit = Annotated[
    bool,
    typer.Option(
        "--raise-position-limit",
        help="State the new length for a model with position embeddings, too; it never saw such positions.",
        rich_help_panel="Output",
    ),
]
RepoId = Annotated[
    str | None, typer.Option(help="Where to push; your user, model and length by default.", rich_help_panel="Push")
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        help="Create the repository private, as it is for a source that is not public.",
        rich_help_panel="Push",
    ),
]
Public = Annotated[
    bool,
    typer.Option(
        "--public", help="Publish what came from a private, gated or local source.", rich_help_panel="Push"
    ),
]
PushRevision = Annotated[str | None, typer.Option(help="Branch to push to.", rich_help_panel="Push")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request.", rich_help_panel="Push")]
CommitMessage = Annotated[str | None, typer.Option(help="Message of the commit.", rich_help_panel="Push")]
PushAnyway = Annotated[
    bool,
    typer.Option(
        "--push-anyway",
        help="Push a model that is worse than its source at every length measured.",
        rich_help_panel="Push",
    ),
]
YesOverwrite = Annotated[
    bool,
    typer.Option(
        "--yes-overwrite",
        help="Push over a repository that holds something else, or another conversion.",
        rich_help_panel="Push",
    ),
]


def convert(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; by default the model's name and length.")
    ] = None,
    target_len: Annotated[
        str | None, typer.Option(help="Length to calibrate for; 32k by default, 8k for the demo.")
    ] = None,
    train_len: Annotated[
        str | None, typer.Option(help="Length the model was trained at; known for many families, else measured.")
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing conversion.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would happen, write nothing.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate on: file, folder, JSONL or Hub data set, optionally with =WEIGHT; repeatable. "
            "PG19 by default.",
            rich_help_panel="Text",
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text of the before/after table.", rich_help_panel="Text")
    ] = None,
    join_documents: Annotated[
        bool,
        typer.Option(
            "--join-documents", help="Let windows run from one document into the next.", rich_help_panel="Text"
        ),
    ] = False,
    windows: Annotated[
        int,
        typer.Option(
            help="Windows of the longest length in the table; 0 for no table.", min=0, rich_help_panel="Text"
        ),
    ] = 2,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id, where none lies beside the model.", rich_help_panel="Text")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How the scales are found: gradient, spsa, constant, winsorize, or mambaextend, which scales the "
            "time step. winsorize, and constant with --factor, need no text and no model: they measure nothing, "
            "but for the demo and with --held-out.",
            rich_help_panel="Calibration",
        ),
    ] = "gradient",
    granularity: Annotated[
        str,
        typer.Option(help="auto, layer, head, channel, state or element.", rich_help_panel="Calibration"),
    ] = "auto",
    form: Annotated[
        str, typer.Option(help="linear (A·s) or power (|A|^s).", rich_help_panel="Calibration")
    ] = "linear",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps.", min=1, rich_help_panel="Calibration")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of log s.", rich_help_panel="Calibration")] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            help="Long texts side by side in each step; one, or one a process of torchrun.",
            min=1,
            rich_help_panel="Calibration",
        ),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(help="constant: the factor; without it one is searched for.", rich_help_panel="Calibration"),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            help="winsorize: A is clipped at this quantile and at 1 minus it; 0.25 by default.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            help="floor: slowest time constant in tokens; the training length, half or twice it by default.",
            rich_help_panel="Method",
        ),
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option(
            help="spsa, mambaextend: pairs of perturbed factors in a step.", min=1, rich_help_panel="Calibration"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="spsa, mambaextend: paper, published-code or algorithm-3 repeat the setting of the paper's "
            "figures, of its code, of its text.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    max_short_loss: Annotated[
        float,
        typer.Option(
            help="Allowed rise of perplexity up to the training length, as a fraction.",
            min=0,
            rich_help_panel="Calibration",
        ),
    ] = 0.005,
    seed: Annotated[int, typer.Option(help="Of every random draw.", rich_help_panel="Calibration")] = 0,
    layout: Annotated[
        str,
        typer.Option(help="transformers, or both to add a folder for mamba_ssm.", rich_help_panel="Output"),
    ] = "transformers",
    a_log_dtype: Annotated[
        str, typer.Option(help="float32, or keep for the source's.", rich_help_panel="Output")
    ] = "float32",
    load_dtype: Annotated[
        str | None,
        typer.Option(help="dtype to validate in; the config's by default.", rich_help_panel="Output"),
    ] = None,
    raise_position_limit: RaisePositionLimit = False,
    trust_a_log: TrustALog = False,
    compose: Annotated[bool, typer.Option("--compose", help="Scale a model that was converted already.")] = False,
    device: Device = "auto",
    device_map: DeviceMap = "none",
    memory: Memory = "auto",
    allow_slow: AllowSlow = False,
    push: Annotated[
        bool, typer.Option("--push", help="Push the result to the Hub.", rich_help_panel="Push")
    ] = False,
    repo_id: RepoId = None,
    private: Private = False,
    public: Public = False,
    push_revision: PushRevision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    yes_overwrite: YesOverwrite = False,
    push_anyway: PushAnyway = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Calibrate a Mamba checkpoint for long context and bake the scales into its A_log."""
    from calibrator.settings import PRESETS
    from converter.commands.convert import Request
    from converter.commands.convert import convert as run
    from converter.scales import FORMS, GRANULARITIES

    _choose("--form", form, FORMS)
    _choose("--granularity", granularity, ("auto", *GRANULARITIES))
    _choose("--layout", layout, ("transformers", "both"))
    _choose("--a-log-dtype", a_log_dtype, ("float32", "keep"))
    _choose("--device-map", device_map, ("none", "auto"))
    _choose("--memory", memory, ("auto", "keep", "checkpoint", "offload"))
    if load_dtype is not None:
        _choose("--load-dtype", load_dtype, ("float32", "bfloat16", "float16"))
    if preset is not None:
        _choose("--preset", preset, PRESETS)
    reporter = Console(quiet=quiet, verbose=verbose)
    destination = None
    of_push = {
        "--repo-id": repo_id,
        "--private": private,
        "--public": public,
        "--push-revision": push_revision,
        "--create-pr": create_pr,
        "--commit-message": commit_message,
        "--yes-overwrite": yes_overwrite,
        "--push-anyway": push_anyway,
    }
    if not push and (given := [option for option, value in of_push.items() if value]):
        raise UsageError(f"{given[0]} does nothing without --push.", "Add --push, or leave it out.")
    if push:
        from hub_cards.destination import Destination

        destination = Destination(
            repo_id,
            private,
            public,
            push_revision,
            create_pr,
            commit_message,
            yes_overwrite,
            dry_run,
            push_anyway=push_anyway,
        )
    request = Request(
        model=model,
        output=output,
        target_len=parse_length(target_len) if target_len else None,
        train_len=parse_length(train_len) if train_len else None,
        revision=revision,
        data=tuple(data or ()),
        held_out=held_out,
        join_documents=join_documents,
        windows=windows,
        method=method,
        granularity=granularity,  # type: ignore[arg-type]
        form=form,  # type: ignore[arg-type]
        steps=steps,
        lr=lr,
        streams=streams,
        factor=factor,
        quantile=quantile,
        tau=tau,
        probes=probes,
        preset=preset,  # type: ignore[arg-type]
        max_short_loss=max_short_loss,
        seed=seed,
        layout=layout,
        a_log_dtype=a_log_dtype,  # type: ignore[arg-type]
        load_dtype=load_dtype,
        raise_position_limit=raise_position_limit,
        tokenizer=tokenizer,
        trust_a_log=trust_a_log,
        compose=compose,
        overwrite=overwrite,
        device=device,
        device_map=device_map,  # type: ignore[arg-type]
        memory=memory,  # type: ignore[arg-type]
        allow_slow=allow_slow,
        dry_run=dry_run,
    )
    conversion = run(request, reporter, destination)
    if not conversion.written:
        return
    url = None
    is_source = conversion.manifest is not None and conversion.manifest.scales_nothing
    if destination is not None and is_source:
        reporter.line("Nothing is pushed.")
    elif destination is not None and conversion.manifest is not None:
        url = _push(conversion.output, destination, reporter)["url"]
    elif destination is not None:
        from converter.commands.convert import expected_travel
        from hub_cards.publish import show_travel

        uploads, copies = expected_travel(conversion.plan)
        title = f"Weights that a push to {conversion.plan.repo_id} would move"
        show_travel(title, uploads=uploads, copies=copies, reporter=reporter)
    if as_json:
        manifest = conversion.manifest
        table = manifest.perplexity if manifest else None
        _print_json(
            {
                "output": str(conversion.output),
                "source": conversion.plan.snapshot.name,
                "revision": conversion.plan.snapshot.revision,
                "method": request.method,
                "perplexity": {"base": table.base, "converted": table.converted} if table else None,
                "changed_tensors": len(manifest.changed) if manifest else len(conversion.plan.changing),
                "identical_tensors": manifest.identical_tensors if manifest else None,
                "url": url,
            }
        )
    if is_source:
        raise typer.Exit(NOTHING_GAINED)


@app.command()
def diagnose(
    model: Model,
    target_len: Annotated[str, typer.Option(help="Length that the model is wanted for.")] = "16k",
    train_len: Annotated[
        str | None, typer.Option(help="Length the model was trained at; known for many families, else measured.")
    ] = None,
    text: TextToMeasure = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_a_log: TrustALog = False,
    device: Device = "auto",
    allow_slow: AllowSlow = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tell whether a model needs scaling: loss and recall on long text against a sliding window. Writes nothing."""
    from converter.commands.diagnose import diagnose as run
    from converter.commands.evaluate import EvaluationRequest

    reporter = Console(quiet=quiet, verbose=verbose)
    request = EvaluationRequest(
        models=(model,),
        texts=tuple(text or ()),
        lengths=(parse_length(target_len),),
        train_len=parse_length(train_len) if train_len else None,
        seed=seed,
        revision=revision,
        tokenizer=tokenizer,
        trust_a_log=trust_a_log,
        device=device,
        allow_slow=allow_slow,
    )
    record = run(request, reporter, _answer(reporter, as_json))
    if as_json:
        _print_json(record)


@app.command()
def ask(
    models: Annotated[list[str], typer.Argument(help="Hub ids, local folders, or demo; several are compared.")],
    question: Annotated[str, typer.Option(help="What stands at the end; the answer follows it.")],
    hide: Annotated[str, typer.Option(help="Sentence to hide in the text.")] = "",
    back: Annotated[str, typer.Option(help="Tokens between the hidden sentence and the end.")] = "448",
    length: Annotated[str, typer.Option(help="Tokens of the whole text.")] = "16k",
    text: TextToMeasure = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 8,
    tokenizer: Tokenizer = None,
    trust_a_log: TrustALog = False,
    device: Device = "auto",
    allow_slow: AllowSlow = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hide a sentence in a long text and ask models for it, side by side."""
    from converter.commands.ask import ask as run
    from converter.commands.evaluate import EvaluationRequest

    reporter = Console(quiet=quiet)
    request = EvaluationRequest(
        models=tuple(models),
        texts=tuple(text or ()),
        lengths=(parse_length(length),),
        tokenizer=tokenizer,
        trust_a_log=trust_a_log,
        device=device,
        allow_slow=allow_slow,
    )
    record = run(request, question, hide, parse_length(back), tokens, reporter, _answer(reporter, as_json))
    if as_json:
        _print_json(record)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Hub ids, local folders, or demo, demo:mamba; several are compared.")
    ],
    task: Annotated[
        str, typer.Option(help="perplexity, tail (last predictions only), recall, passkey, state-norm or spectrum.")
    ] = "perplexity",
    text: TextToMeasure = None,
    lengths: Annotated[str, typer.Option(help="Window lengths; for perplexity they tile one span.")] = "256,4k,16k",
    windows: Annotated[int, typer.Option(help="Windows of the longest length.", min=1)] = 2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the result's JSON and its pictures.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    tail: Annotated[int, typer.Option(help="Predictions at a window's end.", min=1, rich_help_panel="Tasks")] = 128,
    depths: Annotated[
        str, typer.Option(help="Where the pass key stands, from 0 to 1.", rich_help_panel="Tasks")
    ] = "0,0.25,0.5,0.75,1",
    distances: Annotated[
        str, typer.Option(help="Tokens between a fact and the prompt's end, for recall.", rich_help_panel="Tasks")
    ] = "64,448,1k,2k,4k",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of fact for recall: random span, slice, pass key, 1 pair, 4 pairs or 16 pairs; repeatable, "
            "all by default.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Questions for each length and place: 32 for recall, 3 for passkey by default.",
            min=1,
            rich_help_panel="Tasks",
        ),
    ] = None,
    comparator: Annotated[
        list[str] | None,
        typer.Option(
            help="Another forward pass to put beside the first model: longmamba, decimamba, constant-A=FACTOR or "
            "constant-delta=FACTOR; repeatable.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text that longmamba is fitted on.", rich_help_panel="Tasks")
    ] = None,
    train_len: Annotated[
        str | None, typer.Option(help="Length the model was trained at.", rich_help_panel="Tasks")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness in place of --task, prompts of the longest length.",
            rich_help_panel="lm-evaluation-harness",
        ),
    ] = None,
    harness_path: Annotated[
        str | None,
        typer.Option(
            help="Folder of further task definitions, whose code runs.", rich_help_panel="lm-evaluation-harness"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents a task.", min=1, rich_help_panel="lm-evaluation-harness")
    ] = None,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_a_log: TrustALog = False,
    device: Device = "auto",
    allow_slow: AllowSlow = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure converted or original models: perplexity by length, recall, state norm, spectrum, benchmarks."""
    from converter.commands.evaluate import EvaluationRequest
    from converter.commands.evaluate import evaluate as run

    reporter = Console(quiet=quiet, verbose=verbose)
    request = EvaluationRequest(
        models=tuple(models),
        task=task,
        texts=tuple(text or ()),
        data=tuple(data or ()),
        lengths=tuple(parse_lengths(lengths)),
        windows=windows,
        tail=tail,
        depths=parse_numbers("--depths", depths),
        samples=samples,
        distances=tuple(parse_lengths(distances)),
        kinds=tuple(kind or ()),
        comparators=tuple(comparator or ()),
        train_len=parse_length(train_len) if train_len else None,
        harness=tuple(name.strip() for name in harness.split(",")) if harness else (),
        harness_path=harness_path,
        limit=limit,
        seed=seed,
        revision=revision,
        tokenizer=tokenizer,
        trust_a_log=trust_a_log,
        device=device,
        allow_slow=allow_slow,
    )
    record = run(request, reporter, output, answer=_answer(reporter, as_json))
    if as_json:
        _print_json(record)


@app.command()
def bake(
    model: AnyModel,
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    scales: Annotated[
        str,
        typer.Option(
            help="Scales file, converted folder, or Hub id with or without @REVISION.", show_default=False
        ),
    ],
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing conversion.")] = False,
    a_log_dtype: Annotated[str, typer.Option(help="float32, or keep for the source's.")] = "float32",
    tokenizer: Tokenizer = None,
    trust_a_log: TrustALog = False,
    compose: Annotated[bool, typer.Option("--compose", help="Scale a model that was converted already.")] = False,
    proof: Annotated[
        bool, typer.Option("--proof/--no-proof", help="Compare every tensor with the source afterwards.")
    ] = True,
    check_load: Annotated[
        bool, typer.Option("--check-load", help="Load the result with stock transformers as well.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Scale a model whose A_log is not the one that the scales are for.")
    ] = False,
    raise_position_limit: RaisePositionLimit = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the scales of an earlier conversion into a checkpoint or GGUF file, without calibrating."""
    from converter.checkpoint_files import in_short
    from converter.commands.bake import BakeRequest, bake_scales

    _choose("--a-log-dtype", a_log_dtype, ("float32", "keep"))
    reporter = Console(quiet=quiet, verbose=verbose)
    request = BakeRequest(
        model=model,
        scales=scales,
        output=output,
        revision=revision,
        a_log_dtype=a_log_dtype,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        trust_a_log=trust_a_log,
        compose=compose,
        overwrite=overwrite,
        proof=proof,
        check_load=check_load,
        anyway=anyway,
        raise_position_limit=raise_position_limit,
    )
    baked = bake_scales(request, reporter)
    proved = "compared with the source" if proof else "not compared with the source (--no-proof)"
    reporter.line(
        f"{len(baked.report.changed)} tensors were scaled, {baked.report.identical} copied; {proved}. "
        f"The model is in {output}."
    )
    if baked.report.left_out:
        reporter.line(f"Not copied, since no loader reads it: {in_short(baked.report.left_out)}")
    if as_json:
        _print_json(
            {
                "output": str(output),
                "source": baked.snapshot.name,
                "revision": baked.snapshot.revision,
                "changed_tensors": len(baked.report.changed),
                "identical_tensors": baked.report.identical,
                "proved": proof,
                "left_out": list(baked.report.left_out),
            }
        )


@app.command()
def verify(
    converted: Annotated[str, typer.Argument(help="Converted folder or Hub id.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base; by default the one that mmod.json names.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a converted Hub id.")] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the base; by default the one that mmod.json names.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read headers and scaled tensors only, and do not load the model.")
    ] = False,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Load the model with stock transformers as well.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Prove that a converted model is its base but for the scaled tensors, and those what the formula says."""
    from converter.commands.verify import verify_converted

    reporter = Console(quiet=quiet, verbose=verbose)
    verified = verify_converted(
        converted,
        revision=revision,
        base=base,
        base_revision=base_revision,
        quick=quick,
        load=load and not quick,
        reporter=reporter,
    )
    proof, copied = verified.proof, verified.proof.state_spaces
    answer = _answer(reporter, as_json)
    answer.line(
        f"Proved against {verified.base.name} ({verified.base.revision}): {proof.changed} tensors equal the formula"
        + (f", {proof.identical} are the base's bit for bit." if proof.identical else ".")
    )
    if copied:
        answer.line(
            f"Of the copy in the state-spaces layout {copied.changed} tensors equal the formula, "
            f"{copied.identical} are the base's bit for bit."
        )
    if proof.by_hash:
        answer.line(f"Equal by the Hub's SHA-256, not read: {', '.join(proof.by_hash)}")
    for sentence in proof.unproved:
        answer.line(f"Not proved: {sentence}")
    if as_json:
        _print_json(
            {
                "converted": verified.converted.name,
                "base": verified.base.name,
                "base_revision": verified.base.revision,
                "identical_tensors": proof.identical,
                "changed_tensors": proof.changed,
                "state_spaces": (
                    {"identical_tensors": copied.identical, "changed_tensors": copied.changed} if copied else None
                ),
                "equal_by_hash": list(proof.by_hash),
                "not_proved": list(proof.unproved),
            }
        )


@app.command()
def inspect(
    model: AnyModel,
    revision: Revision = None,
    trust_a_log: TrustALog = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint is and which tensors a conversion would change, without reading its weights.

    The exit status is 1 where it cannot be converted.
    """
    from converter.commands.inspect import show
    from converter.inspection import inspect as read_inspection
    from converter.source import resolve

    snapshot = resolve(model, revision=revision, compose=True, weights=False)
    inspection = read_inspection(snapshot, trust_a_log=trust_a_log)
    show(inspection, _answer(Console(quiet=quiet, verbose=verbose), as_json))
    if as_json:
        _print_json(dataclasses.asdict(inspection))
    if inspection.obstacle:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Converted folder.", show_default=False)],
    repo_id: RepoId = None,
    private: Private = False,
    public: Public = False,
    revision: PushRevision = None,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    yes_overwrite: YesOverwrite = False,
    push_anyway: PushAnyway = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would travel, and send nothing.")] = False,
    scales_only: Annotated[
        bool, typer.Option("--scales-only", help="Push the scales without the weights.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Push a converted folder to the Hub in one commit; what the Hub has already is not sent."""
    from hub_cards.destination import Destination

    destination = Destination(
        repo_id,
        private,
        public,
        revision,
        create_pr,
        commit_message,
        yes_overwrite,
        dry_run,
        push_anyway=push_anyway,
    )
    reporter = Console(quiet=quiet, verbose=verbose)
    if scales_only:
        from hub_cards.publish import scales_alone

        with scales_alone(folder) as alone:
            done = _push(alone, dataclasses.replace(destination, scales_of=folder), reporter)
    else:
        done = _push(folder, destination, reporter)
    if as_json:
        _print_json(done)


@app.command()
def card(
    folders: Annotated[list[Path], typer.Argument(help="Converted folders.", show_default=False)],
    compare: Annotated[
        bool, typer.Option("--compare", help="Print one Markdown table of all folders, and write nothing.")
    ] = False,
    repo_id: Annotated[str | None, typer.Option(help="Where the model is, for the lines that load it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the model card of a converted folder anew, keeping what was added by hand; or compare several."""
    from converter.manifest import Manifest
    from hub_cards.card import write_card
    from hub_cards.comparison import compare as compare_folders

    reporter = Console(quiet=quiet, verbose=verbose)
    if compare:
        comparison = compare_folders(folders)
        if not comparison.comparable:
            reporter.warn("The models were measured on different text, spans or number formats.")
        if as_json:
            _print_json(dataclasses.asdict(comparison))
        else:
            _require_stdout(True)
            _deliver(printable(comparison.to_markdown()))
        return
    if repo_id is not None and len(folders) > 1:
        raise UsageError("--repo-id names one model, and several folders are given.", "Give one folder.")
    written = []
    for folder in folders:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise UsageError(f"{folder} is no converted model.", "Give a folder that this tool wrote.")
        written.append(str(write_card(folder, manifest, source_card=None, repo_id=repo_id, reporter=reporter)))
        reporter.line(f"Wrote {written[-1]}")
    if as_json:
        _print_json({"cards": written})


app.command("convert", no_args_is_help=True)(convert)
convert_app.command(no_args_is_help=True)(convert)


def _choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} is '{value}'.", f"Use one of: {', '.join(allowed)}.")


def _push(folder: Path, destination: Destination, reporter: Reporter) -> dict[str, Any]:
    """Show what a push would move, then do it; returns the plan, address and commit as plain values."""
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


def _answer(reporter: Reporter, as_json: bool) -> Reporter:
    """Where a command's answer for a person goes: to stdout, unless that holds its JSON."""
    _require_stdout(True)
    return reporter if as_json else Console(stdout=True)


def _print_json(content: dict[str, Any]) -> None:
    _deliver(json_text(content))


def _deliver(text: str) -> None:
    """Write a result to stdout, in whatever encoding that has."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _run(command: Callable[[], Any]) -> None:
    """Run a typer application; every error becomes a message and an exit code, and a traceback on demand only."""
    end_on_signals()
    threading.excepthook = sys.unraisablehook = _report_unheeded
    code: Any = 0
    try:
        command()
    except SystemExit as done:
        code = done.code
        if code == UsageError.exit_code:
            # Its words are on stderr already.
            _complain_in_json("The command line is wrong.", "See --help.", code)
    except Interrupted as error:
        code = 128 + error.number
        fix = _advice_of(error)
        _complain("\n".join(["Interrupted; no incomplete output is left.", *fix]))
        _complain_in_json("Interrupted; no incomplete output is left.", "\n".join(fix), code)
    except BaseException as error:
        code = _explain(error)
    sys.exit(_flushed(code))


def _explain(error: BaseException) -> int:
    """Say what went wrong and return the exit code."""
    if os.environ.get("MMOD_DEBUG"):
        _complain("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, MmodError):
        message, fix, code = error.message, error.fix, error.exit_code
    elif isinstance(error, OSError):
        # What the system refuses (rights, a failing disk) names its file; more than that nobody need know.
        message, fix, code = words_of(error), "", 1
    else:
        message, code = f"{type(error).__name__}: {words_of(error)}", 1
        library = re.search(r"site-packages/(\w+)", traceback.extract_tb(error.__traceback__)[-1].filename)
        cause = f"{library[1]} failed: see its version and the variables it reads. " if library else ""
        fix = f"{cause}This was not foreseen. Add --debug to see where it happened, and please report that."
    fix = "\n".join(filter(None, [fix, *_advice_of(error)]))
    _complain(f"Error: {message}\n{fix}".rstrip())
    _complain_in_json(message, fix, code)
    return code


def _advice_of(error: BaseException) -> list[str]:
    """What was noted on the error's way: how to go on from what a run has got so far."""
    return list(getattr(error, "__notes__", ()))


def _complain(text: str) -> None:
    # Where stderr is closed or full there is nobody left to tell; the exit code says it.
    with suppress(Exception):
        sys.stderr.write(f"{printable(text)}\n")


def _complain_in_json(message: str, fix: str, code: int) -> None:
    """The error as the one JSON object on stdout, where that was asked for."""
    if "--json" in sys.argv:
        with suppress(Exception):
            _print_json({"error": message, "fix": fix, "exit_code": code})


def _report_unheeded(failed: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
    """Of what failed in a library's thread or clean-up; what it means for the run, the main thread finds out."""
    if failed.exc_value is not None and os.environ.get("MMOD_DEBUG"):
        _complain("".join(traceback.format_exception(failed.exc_value)).rstrip())


def _flushed(code: Any) -> Any:
    """The exit code, once all output has left: a full disk or a closed pipe shows only then."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except Exception as error:
            # What is left in the buffer must not fail a second time when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _complain(f"Error: the result cannot be written: {words_of(error)}")
            code = code or int(stream is sys.stdout)
    return code


def main() -> None:
    """Entry point of ``mmod``."""
    _run(app)


def convert_main() -> None:
    """Entry point of ``mmod-convert``."""
    _run(convert_app)
