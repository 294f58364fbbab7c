"""mmod.json: what was done to a checkpoint, to which, with what, and how to repeat it.

The manifest lies beside the converted weights. All else that is this tool's lies in a folder of its own, since
other programs take every safetensors file beside the weights for weights. The manifest names no path, login or
host of the machine that wrote it, and no date. How long a calibration took is there, so the manifests of two equal
runs differ in that one number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.disk import write_whole
from converter.errors import CorruptCheckpointError, ManifestError
from converter.json_text import NUMBER_NAMES, json_text
from converter.safetensors_file import LFS_ADVICE, is_lfs_pointer, parse_json_object

MANIFEST_NAME = "mmod.json"
OWN_FOLDER = "mmod"
ORIGINS = {"option": "as given", "family table": "as published", "measured": "as measured"}
"""How the training length is known, in words."""
SCALES_NAME = f"{OWN_FOLDER}/scales.safetensors"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that was converted.

    Attributes:
        name: Hub id, ``demo`` name, or the last part of a local folder's path.
        kind: ``hub``, ``folder`` or ``demo``.
        revision: commit of a Hub source; ``sha256:…`` over config.json and parts of the weights for the others.
        layout: ``state-spaces``, ``transformers`` or ``gguf``.
        model_type: transformers' name of the architecture.
        quantisation: ``gguf``, ``mlx`` or the quantiser's name in config.json; empty for plain weights.
        composed_from: the manifest of the source where that was itself converted (``--compose``), else None.
    """

    name: str
    kind: str
    revision: str
    layout: str
    model_type: str
    composed_from: dict[str, Any] | None = None
    quantisation: str = ""


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that was added to a checkpoint without one; fields as in :class:`SourceRecord`."""

    name: str
    kind: str
    revision: str


@dataclass(frozen=True)
class ChangedTensor:
    """One tensor whose bytes differ from the source's.

    Attributes:
        name, source_name: in the converted files and in the source's.
        rule: ``A_log + log s``, ``A_log * s``, ``ssm_a * s`` or ``-(|ssm_a| ^ s)``.
        source_dtype, dtype: safetensors names (``F64``, ``F32``, ``F16``, ``BF16``).
        requested: smallest, geometric mean and largest factor asked for, as {"min", "mean", "max"}.
        effective: the same of the factors that stock transformers runs once it has loaded the tensor in
            ``load_dtype`` of the manifest.
    """

    name: str
    source_name: str
    rule: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    requested: dict[str, float]
    effective: dict[str, float]


@dataclass(frozen=True)
class TextRecord:
    """A text that was read: ``role`` is ``calibration`` or ``held-out``.

    Attributes:
        name: Hub data set id, bundled text or file name (never a path).
        tokens: how many tokens were read.
        sha256: over those token ids, little-endian int32.
        documents: how many documents they are of.
    """

    name: str
    role: str
    tokens: int
    sha256: str
    documents: int = 1


@dataclass(frozen=True)
class Reach:
    """How long a text may be in which facts at one distance are still found.

    Attributes:
        kind: of the facts.
        distance: tokens between a fact and the end of the text.
        lengths: of the texts, in tokens, each twice the one before. In all of them the lower end of the one-sided
            95 % interval of the share found is at least a half.
        samples: prompts of each length. found: of them, those in which the whole answer was found.
        low: that lower end for the longest.
    """

    kind: str
    distance: int
    lengths: list[int]
    samples: int
    found: list[int]
    low: float


@dataclass(frozen=True)
class CalibrationRecord:
    """How the scales were found.

    Attributes:
        settings: every setting of the method, as plain values.
        train_len, target_len: tokens; None if they are neither known nor needed. With ``reach`` the target is the
            longest length of that, and the one to calibrate for stands in ``settings``.
        train_len_origin: ``option``, ``family table``, ``measured`` or ``unknown``.
        steps: optimiser steps taken; ``kept_step`` is the iterate that validation chose (0 = unscaled).
        guard: a sentence when the short-context guard decided which iterate was kept, else "".
        seconds: wall time of the calibration; ``device``: what it ran on (``cpu``, ``NVIDIA H100 80GB HBM3``).
        history: one dict a validated iterate; see :meth:`calibrator.validation.Candidate.record`.
    """

    method: str
    settings: dict[str, Any]
    train_len: int | None
    train_len_origin: str
    target_len: int | None
    seed: int
    steps: int
    kept_step: int
    guard: str
    seconds: float
    device: str
    history: list[dict[str, Any]] = field(default_factory=list)
    reach: Reach | None = None

    @property
    def calibrated_len(self) -> int | None:
        """Tokens that were calibrated for."""
        return self.settings["target_len"] if self.reach else self.target_len


@dataclass(frozen=True)
class PerplexityTable:
    """Held-out perplexity before and after, every length over the same span of text.

    Attributes:
        span_tokens: tokens of the span that each length tiles.
        dtype: the dtype both models ran in.
        base, converted: window length in tokens to perplexity. JSON keys are strings.
        standard_error: length to the standard error of log(converted / base), from a paired bootstrap
            over blocks of windows; empty if a length has fewer than two windows.
        sliding: perplexity of the source on a sliding window of ``sliding_window`` tokens with its state reset
            every half window, over the same span.
        passes: how the windows were run, in words.
    """

    text: TextRecord
    span_tokens: int
    dtype: str
    base: dict[str, float]
    converted: dict[str, float]
    standard_error: dict[str, float] = field(default_factory=dict)
    sliding: float | None = None
    sliding_window: int | None = None
    passes: str = ""


@dataclass(frozen=True)
class MemoryCell:
    """Facts of one kind, asked for at one length of text and distance from its end.

    Attributes:
        kind: ``pass key``, ``random span``, …
        length: tokens of the prompt. distance: tokens between the fact and the prompt's end.
        samples: prompts.
        base, sliding, converted: share found, of the source, of the source on a sliding window, of this model. Of
            copied spans it is the share of the tokens, of other facts that of whole answers.
        error: half of the 95 % interval of ``converted``.
    """

    kind: str
    length: int
    distance: int
    samples: int
    base: float
    sliding: float
    converted: float
    error: float


@dataclass(frozen=True)
class MemoryTable:
    """Facts found in long text before and after.

    Attributes:
        text: the filler.
        skills: what the source recalls within its training length, in words.
        kept: what of that was compared, in words.
        window: of the sliding window, in tokens.
        cells: empty if the source recalls nothing.
    """

    text: TextRecord
    skills: str
    kept: str
    window: int
    cells: list[MemoryCell] = field(default_factory=list)


@dataclass(frozen=True)
class TaskScore:
    """What the source and this model scored on one task of lm-evaluation-harness.

    Attributes:
        samples: documents asked.
        error: standard error of ``converted``; None where the harness gives none.
    """

    task: str
    metric: str
    samples: int
    base: float
    converted: float
    error: float | None = None


@dataclass(frozen=True)
class TaskTable:
    """Tasks of lm-evaluation-harness before and after.

    Attributes:
        max_length: tokens that a prompt and its answer may have.
        limit: documents of each task; None for all.
    """

    max_length: int
    limit: int | None
    scores: list[TaskScore]


@dataclass(frozen=True)
class Manifest:
    """All of mmod.json.

    Attributes:
        command: the command line that repeats the conversion, with names in place of local paths.
        load_dtype: dtype in which stock transformers loads the weights by default (``bfloat16``, …).
        identical_tensors: number of tensors whose bytes are the source's.
        entries: what was rewritten of config.json, or of a GGUF header: lengths of text. ``text_config.KEY`` is
            an entry of the config's text part.
        rope: the extension of the rotary positions that config.json declares, such as ``yarn:4``.
        scales_only: no weights lie beside the manifest, only the scales.
        scales_of: the checkpoint that the scales were found on, where this is another.
        target_len: tokens that given scales are for; None for what ``calibration`` says.
        memory, tasks: None if it was not measured.
        versions: package to version.
        tokenizer: None if the checkpoint has its own, or was not recorded.
        files: path to the SHA-256 of every file that was written, but for the card and its pictures, this manifest
            and licences.
        notes: sentences the card repeats (text that stood in for another, dtype rounding, …).
    """

    source: SourceRecord
    form: str
    granularity: str
    load_dtype: str
    changed: list[ChangedTensor]
    identical_tensors: int
    texts: list[TextRecord]
    calibration: CalibrationRecord | None
    perplexity: PerplexityTable | None
    versions: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    rope: str | None = None
    scales_of: SourceRecord | None = None
    scales_only: bool = False
    memory: MemoryTable | None = None
    tasks: TaskTable | None = None
    tokenizer: TokenizerRecord | None = None
    target_len: int | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def scales_nothing(self) -> bool:
        """Whether every factor is 1, and no positions are extended: the copy is its source."""
        return self.rope is None and all(set(tensor.requested.values()) == {1.0} for tensor in self.changed)

    @property
    def is_worse(self) -> bool:
        """Whether perplexity is higher than the source's at every length that was measured."""
        table = self.perplexity
        if table is None or not table.base:
            return False
        # One without a finite perplexity is worse.
        return not any(math.isfinite(value) and not value > table.base[n] for n, value in table.converted.items())

    @property
    def length(self) -> int | None:
        """Tokens that the scales are for, to which the tokenizer is raised: the target, else the stated length."""
        calibrated = self.calibration and self.calibration.target_len
        return calibrated or self.target_len or max(self.entries.values(), default=None)

    @property
    def name_ending(self) -> str:
        """The ending of a default name: ``scales``, ``gguf``, ``mlx`` or ``hf``."""
        runtime = self.source.quantisation if self.source.quantisation in ("gguf", "mlx") else "hf"
        return "scales" if self.scales_only else runtime

    def makes_the_weights_of(self, other: Manifest) -> bool:
        """Whether both describe the same weights: equal sources, scaled alike."""
        return (self.source, self.changed, self.scales_only) == (other.source, other.changed, other.scales_only)

    def to_json(self) -> str:
        """The manifest as indented JSON with its seal and a final newline."""
        content = json.loads(json_text(dataclasses.asdict(self)))
        return json_text({**content, "seal": seal_of(content)}) + "\n"

    def write(self, folder: Path) -> Path:
        """Write mmod.json into ``folder``, whole or not at all, and return its path. Raises OutputError."""
        return write_whole(folder / MANIFEST_NAME, self.to_json().encode())

    @classmethod
    def from_json(cls, content: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse mmod.json.

        Raises:
            ManifestError: not UTF-8, not JSON, another schema version, or a field missing or of the wrong type.
        """
        if is_lfs_pointer(content):
            raise ManifestError(f"{where} is a git-lfs pointer, not the file itself.", LFS_ADVICE)
        try:
            data = parse_json_object(content, where)
            version = data["schema_version"]
        except (CorruptCheckpointError, KeyError) as error:
            raise ManifestError(f"{where} is no manifest of this tool: {str(error).rstrip('.')}.") from error
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{where} has schema version {version!r}; this version reads {SCHEMA_VERSION}.",
                "Use the mmod-convert that wrote it, or convert again.",
            )
        return typing.cast(Manifest, _build(cls, data, where))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a converted folder, or None if there is none."""
        path = folder / MANIFEST_NAME
        return cls.from_json(path.read_bytes()) if path.is_file() else None


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its seal, however the JSON is laid out.

    It shows an edit. It is no signature: anyone can compute it.
    """
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _build(kind: Any, data: Any, where: str) -> Any:
    """Turn parsed JSON into a value of the annotated type ``kind``, checking as it goes."""
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: expected an object for {kind.__name__}, found {type(data).__name__}.")
        hints = typing.get_type_hints(kind)
        parameters = inspect.signature(kind).parameters
        required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if missing := sorted(required - data.keys()):
            raise ManifestError(f"{where}: {kind.__name__} lacks {', '.join(missing)}.")
        known = parameters.keys() & data.keys()
        return kind(**{name: _build(hints[name], data[name], f"{where}.{name}") for name in known})
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _build(next(arg for arg in typing.get_args(kind) if arg is not type(None)), data, where)
    if origin in (list, tuple):
        if not isinstance(data, list):
            raise ManifestError(f"{where}: expected a list, found {type(data).__name__}.")
        return origin(_build(typing.get_args(kind)[0], item, where) for item in data)
    if origin is dict:
        if not isinstance(data, dict):
            raise ManifestError(f"{where}: expected an object, found {type(data).__name__}.")
        return {key: _build(typing.get_args(kind)[1], value, f"{where}.{key}") for key, value in data.items()}
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is float and isinstance(data, str) and data in NUMBER_NAMES:
        return NUMBER_NAMES[data]
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ManifestError(f"{where}: expected {kind.__name__}, found {data!r}.")
    return data
