"""What each command can be asked: every option is stated here once, for the command line and for Python alike.

An option with a panel is one that few people need: ``--help-all`` shows it, ``--help`` does not. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from converter.lengths import format_length, parse_length, parse_lengths, parse_target, parse_train_len
from converter.terms import Form

if TYPE_CHECKING:
    from hub_cards.destination import Destination


LENGTH: dict[str, Any] = {"parser": parse_length, "metavar": "LENGTH"}
LENGTHS: dict[str, Any] = {"parser": parse_lengths, "metavar": "LENGTH,LENGTH,..."}
SHOWN_AS: Mapping[Callable[[str], Any], Callable[[Any], str]] = {
    parse_length: format_length,
    parse_lengths: lambda lengths: ",".join(map(format_length, lengths)),
}
"""How a user would write a default that a parser gives."""

MethodName = Literal["gradient", "spsa", "constant", "floor", "winsorize"]

# Options in a panel are shown by --help-all only.
_CALIBRATION, _PUSH, _OUTPUT, _MACHINE, _TEXT, _MODEL, _JOB = (
    partial(Option, rich_help_panel=panel)
    for panel in ("Calibration", "Push", "Output", "Machine", "Text", "Model", "Job")
)

Model = Annotated[str, Argument(help="Hub id, local folder, or demo, demo:mamba, demo:recall.", show_default=False)]
AnyModel = Annotated[
    str, Argument(help="Hub id, local folder, GGUF file, or demo, demo:mamba.", show_default=False)
]
Models = Annotated[
    tuple[str, ...], Argument(help="Hub ids, local folders, or demo; several are compared.", show_default=False)
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a Hub id.")]
Tokenizer = Annotated[str | None, Option(help="Folder or Hub id, for a model without a tokenizer.")]
TrainLen = Annotated[
    int | None,
    Option(
        parser=parse_train_len,
        metavar="LENGTH",
        help="Length the model was trained at; known for many families, measured for others.",
    ),
]
Text = Annotated[tuple[str, ...], Option(help="File, folder, JSONL or Hub data set; a bundled novel by default.")]
_LARGEST_SEED = (1 << 63) - 1
Seed = Annotated[int, _MACHINE(help="Random seed.", min=0, max=_LARGEST_SEED)]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
AllowSlow = Annotated[bool, _MACHINE(help="Run on CUDA without the compiled kernels.")]
HubKernels = Annotated[bool, _MACHINE(help="Take kernels that are not installed from the Hub, without asking.")]
TrustALog = Annotated[
    bool, _MODEL(help="Scale every tensor named *A_log of an unknown architecture as the log of a decay.")
]
Overwrite = Annotated[bool, Option(help="Replace an existing conversion.")]
ALogDtype = Annotated[
    Literal["float32", "keep"], _OUTPUT(help="Number format of the scaled A_log; keep is the source's.")
]
RaisePositionLimit = Annotated[
    bool,
    _OUTPUT(
        help="State the new length for a model with position embeddings too. It was not trained on such positions."
    ),
]
Rope = Annotated[
    str | None,
    _OUTPUT(
        help="Extend rotary positions N times in config.json: yarn:N or linear:N; without :N text decides.",
        metavar="TYPE:N",
    ),
]
Compose = Annotated[bool, _MODEL(help="Scale a model that was converted already.")]
RepoId = Annotated[str | None, Option(help="Hub id to push to; your user, model and length by default.")]
DryRun = Annotated[bool, Option(help="Check everything, show what would happen, write and send nothing.")]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Where and how to push; see :class:`hub_cards.destination.Destination`."""

    repo_id: RepoId = None
    private: Annotated[bool, _PUSH(help="Create a private repository, as for a source that is not public.")] = False
    public: Annotated[bool, _PUSH(help="Publish what came from a private, gated or local source.")] = False
    push_revision: Annotated[str | None, _PUSH(help="Branch to push to.")] = None
    commit_message: Annotated[str | None, _PUSH(help="Commit message.")] = None
    yes_overwrite: Annotated[
        bool, _PUSH(help="Push over a repository that holds another conversion or something else.")
    ] = False
    push_anyway: Annotated[
        bool, _PUSH(help="Push a model that is worse than its source at every length measured.")
    ] = False
    dry_run: DryRun = False

    def given(self) -> list[str]:
        """The options of a push that were given."""
        names = [field.name for field in fields(PushOptions) if field.name != "dry_run"]
        return ["--" + name.replace("_", "-") for name in names if getattr(self, name)]

    def destination(self, scales_of: Path | None = None) -> Destination:
        """The same for the Hub side."""
        from hub_cards.destination import Destination

        values = {field.name: getattr(self, field.name) for field in fields(PushOptions)}
        return Destination(revision=values.pop("push_revision"), scales_of=scales_of, **values)


@dataclass(frozen=True)
class ConvertRequest(PushOptions):
    """A conversion: calibrate a checkpoint and write its scaled copy."""

    model: Model
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder to write; by default the model's name and length.")
    ] = None
    target_len: Annotated[
        int | Literal["auto"] | None,
        Option(
            parser=parse_target,
            metavar="LENGTH",
            help="Length to calibrate for; 32k by default, 8k for the demos. auto finds one by what is recalled.",
        ),
    ] = None
    train_len: TrainLen = None
    revision: Annotated[str | None, _MODEL(help="Branch, tag or commit of a Hub id.")] = None
    data: Annotated[
        tuple[str, ...],
        Option(
            help="Text to calibrate on: file, folder, JSONL or Hub data set, optionally with =WEIGHT; repeatable. "
            "PG19 by default."
        ),
    ] = ()
    held_out: Annotated[str | None, Option(help="Text to measure on before and after.")] = None
    method: Annotated[MethodName, Option(help="How to find the scales.")] = "gradient"
    tokenizer: Tokenizer = None
    overwrite: Overwrite = False
    device: Device = "auto"
    push: Annotated[bool, Option(help="Push the result to the Hub.")] = False
    on: Annotated[
        str | None,
        Option(metavar="HARDWARE", help="Run as a job on this hardware of the Hub, such as a10g-small, and push."),
    ] = None
    timeout: Annotated[str, _JOB(help="Time after which the Hub ends the job, such as 90m or 6h.")] = "6h"
    yes: Annotated[bool, _JOB(help="Start the job without asking whether its price is right.")] = False
    trust_a_log: TrustALog = False
    compose: Compose = False
    join_documents: Annotated[bool, _TEXT(help="Let windows run from one document into the next.")] = False
    windows: Annotated[
        int, _TEXT(help="Windows of the longest length to measure before and after; 0 to measure nothing.", min=0)
    ] = 2
    granularity: Annotated[
        Literal["auto", "layer", "head", "channel", "state", "element"],
        _CALIBRATION(help="What shares a factor; by default nothing does."),
    ] = "auto"
    form: Annotated[Form, _CALIBRATION(help="linear (A·s) or power (|A|^s).")] = "linear"
    max_short_loss: Annotated[
        float, _CALIBRATION(help="Allowed rise of perplexity up to the training length, as a fraction.", min=0)
    ] = 0.005
    seed: Annotated[int, _CALIBRATION(help="Random seed.", min=0, max=_LARGEST_SEED)] = 0
    attention_window: Annotated[
        int | None,
        _CALIBRATION(**LENGTH, help="Hybrids: tokens of a long text that attention sees; --target-len by default."),
    ] = None
    steps: Annotated[int | None, _CALIBRATION(help="gradient, spsa: optimiser steps.", min=1)] = None
    lr: Annotated[float | None, _CALIBRATION(help="gradient, spsa: learning rate of log s.")] = None
    streams: Annotated[
        int | None,
        _CALIBRATION(
            help="gradient: long texts in each step; one for each process of torchrun by default.",
            min=1,
        ),
    ] = None
    factor: Annotated[float | None, _CALIBRATION(help="constant: the factor; searched for by default.")] = None
    quantile: Annotated[
        float | None, _CALIBRATION(help="winsorize: clip A at this quantile and at 1 minus it; 0.25 by default.")
    ] = None
    tau: Annotated[
        float | None,
        _CALIBRATION(
            help="floor: slowest time constant in tokens; the training length, half or twice it by default."
        ),
    ] = None
    probes: Annotated[int | None, _CALIBRATION(help="spsa: pairs of perturbed factors in a step.", min=1)] = None
    preset: Annotated[Literal["paper"] | None, _CALIBRATION(help="spsa: the setting of the paper's figures.")] = (
        None
    )
    a_log_dtype: ALogDtype = "float32"
    raise_position_limit: RaisePositionLimit = False
    rope: Rope = None
    memory: Annotated[
        Literal["auto", "keep", "checkpoint", "offload", "stream"],
        _MACHINE(
            help="What layers keep for the gradients: all activations, their input, or that on the host. stream "
            "keeps the weights on the host, which auto does where they do not fit."
        ),
    ] = "auto"
    allow_slow: AllowSlow = False
    hub_kernels: HubKernels = False

    def method_options(self) -> dict[str, Any]:
        """The options given that only some methods have."""
        from calibrator.methods import OPTIONS

        return {option: getattr(self, option) for option in OPTIONS if getattr(self, option) is not None}


@dataclass(frozen=True)
class DemoRequest(ConvertRequest):
    """A conversion of a bundled model."""

    model: Annotated[str, Argument(help="demo, demo:mamba or demo:recall.")] = "demo"


@dataclass(frozen=True)
class BakeRequest:
    """Known scales, written into a copy of a checkpoint."""

    model: AnyModel
    output: Annotated[Path, Argument(help="Folder to write.", show_default=False)]
    scales: Annotated[
        str, Option(help="Scales file, converted folder, or Hub id with or without @REVISION.", show_default=False)
    ]
    revision: Revision = None
    tokenizer: Tokenizer = None
    overwrite: Overwrite = False
    proof: Annotated[
        bool, Option("--proof/--no-proof", help="Compare every tensor with the source afterwards.")
    ] = True
    a_log_dtype: ALogDtype = "float32"
    raise_position_limit: RaisePositionLimit = False
    rope: Rope = None
    trust_a_log: TrustALog = False
    compose: Compose = False
    anyway: Annotated[
        bool, Option(help="Scale a model whose A_log is not the one that the scales were found for.")
    ] = False


@dataclass(frozen=True)
class VerifyRequest:
    """A converted model to prove."""

    converted: Annotated[str, Argument(help="Converted folder or Hub id.", show_default=False)]
    base: Annotated[
        str | None, Option(help="Hub id or folder of the base; by default the one that mmod.json names.")
    ] = None
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a converted Hub id.")] = None
    base_revision: Annotated[
        str | None, Option(help="Branch, tag or commit of the base; by default the one that mmod.json names.")
    ] = None
    quick: Annotated[bool, Option(help="Read headers and scaled tensors only, and do not load the model.")] = False
    load: Annotated[
        bool | None,
        Option(
            "--load/--no-load",
            help="Load the model with stock transformers as well; by default a folder is, a Hub id is not.",
        ),
    ] = None


@dataclass(frozen=True)
class InspectRequest:
    """A checkpoint to describe."""

    model: AnyModel
    revision: Revision = None
    trust_a_log: TrustALog = False


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """The options of every command that measures models."""

    text: Text = ()
    seed: Seed = 0
    revision: Revision = None
    tokenizer: Tokenizer = None
    trust_a_log: TrustALog = False
    device: Device = "auto"
    allow_slow: AllowSlow = False
    hub_kernels: HubKernels = False


@dataclass(frozen=True)
class DiagnoseRequest(MeasureRequest):
    """One model to measure on long text."""

    model: Model
    target_len: Annotated[int, Option(**LENGTH, help="Length that the model is wanted for.")] = 16384
    train_len: TrainLen = None
    rope: Annotated[
        str | None, Option(help="Diagnose with rotary positions extended: yarn:N or linear:N.", metavar="TYPE:N")
    ] = None


@dataclass(frozen=True)
class AskRequest(MeasureRequest):
    """A question to put at the end of a long text."""

    models: Models
    question: Annotated[str, Option(help="What the text ends with; models go on from there.", show_default=False)]
    hide: Annotated[str, Option(help="Sentence to hide in the text.")] = ""
    back: Annotated[int, Option(**LENGTH, help="Tokens between the hidden sentence and the end.")] = 448
    length: Annotated[
        int | None,
        Option(**LENGTH, help="Tokens to read; 16k by default, the whole text where --hide is not given."),
    ] = None
    tokens: Annotated[int, Option(help="Tokens of an answer.", min=1)] = 8


@dataclass(frozen=True)
class EvaluateRequest(MeasureRequest):
    """Models to measure, one after the other."""

    models: Models
    task: Annotated[Literal["perplexity", "recall"], Option(help="What to measure.")] = "perplexity"
    lengths: Annotated[
        tuple[int, ...], Option(**LENGTHS, help="Window lengths; for perplexity they tile one span.")
    ] = (256, 4096, 16384)
    windows: Annotated[int, Option(help="perplexity: windows of the longest length.", min=1)] = 2
    distances: Annotated[
        tuple[int, ...], Option(**LENGTHS, help="recall: tokens between a fact and the end of the prompt.")
    ] = (64, 448, 1024, 2048, 4096)
    kind: Annotated[
        tuple[str, ...],
        Option(
            help="recall: random span, slice, pass key, 1 pair, 4 pairs or 16 pairs; repeatable, all by default."
        ),
    ] = ()
    samples: Annotated[int, Option(help="recall: questions for each length and distance.", min=1)] = 32
    chunks: Annotated[
        int | None,
        Option(**LENGTH, help="recall: read texts in chunks of this length; the surest one answers (OPRM)."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PushRequest(PushOptions):
    """A converted folder to push."""

    folder: Annotated[Path, Argument(help="Converted folder.", show_default=False)]
    push_revision: Annotated[str | None, Option("--revision", help="Branch to push to.")] = None
    scales_only: Annotated[bool, Option(help="Push the scales without the weights.")] = False


@dataclass(frozen=True)
class CardRequest:
    """Converted folders whose cards are rewritten."""

    folders: Annotated[tuple[Path, ...], Argument(help="Converted folders.", show_default=False)]
    repo_id: Annotated[str | None, Option(help="Hub id of the model, for the lines that load it.")] = None
    tasks: Annotated[
        Path | None,
        Option(metavar="FILE", help="Scores of lm-evaluation-harness to show: evaluation.json of its benchmark."),
    ] = None


@dataclass(frozen=True)
class ReportRequest:
    """Conversions and measurements to show on one page."""

    folders: Annotated[
        tuple[Path, ...],
        Argument(help="Converted folders; JSON files of evaluate or diagnose, too.", show_default=False),
    ]
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="HTML file to write.")] = Path(
        "report.html"
    )
    base: Annotated[str | None, Option(help="Folder of the base, where mmod.json names a local one.")] = None
    proof: Annotated[bool, Option("--proof/--no-proof", help="Verify each folder against its base.")] = True
