"""The sections of a model card, written from the manifest."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.command_line import command_line
from converter.layouts.architectures import find_architecture
from converter.layouts.config_values import section
from converter.lengths import format_length
from converter.manifest import (
    ORIGINS,
    CalibrationRecord,
    ChangedTensor,
    Manifest,
    MemoryCell,
    MemoryTable,
    PerplexityTable,
    SourceRecord,
    TaskTable,
)
from converter.safetensors_file import parse_json_object
from hub_cards.drawing import Picture
from hub_cards.serving import CACHING, MLX_LM, MLX_MAMBA2, STATE, llama_server, mlx_server, runtimes_of
from hub_cards.templates import fenced, fill_in, fold, markdown_table, plain

HUB = "https://huggingface.co"
FOLDER = "FOLDER_OF_THE_SOURCE"
RANGE = ("min", "mean", "max")


def write_sections(
    folder: Path, manifest: Manifest, pictures: Sequence[Picture], name: str, repo_id: str | None
) -> str:
    """All sections of a card, as ``card.md`` has them.

    Args:
        folder: the converted folder.
        name: of the model, the card's title.
        repo_id: where the model will be; None for a path to fill in.
    """
    place, calibration = repo_id or "path/to/this/folder", manifest.calibration
    shown = {Path(picture.path).stem: f"![{plain(picture.alt)}]({picture.path})" for picture in pictures}
    served = not manifest.scales_only and manifest.source.quantisation not in ("gguf", "mlx")
    text = fill_in(
        "card.md",
        **{"HUB": HUB, "m": manifest, "c": calibration, "name": name, "repo_id": repo_id, "place": place},
        **{function.__name__: function for function in HELPERS},
        pictures=defaultdict(str, shown),
        values=sum(math.prod(tensor.shape) for tensor in manifest.changed),
        origin=_origin(calibration) if calibration else "",
        changed_names=_changed_names(manifest.changed),
        perplexity_rows=_perplexity_rows(manifest.perplexity, calibration),
        memory_rows=_memory_rows(manifest),
        task_rows=[*_short_rows(manifest), *_harness_rows(manifest.tasks)],
        recall_line=_recall_line(manifest, place),
        factor_rows=_factor_rows(manifest),
        snippets=snippets_of(folder, manifest, place, is_on_hub=repo_id is not None),
        evidence_of_serving=_evidence_of_serving(manifest.source) if served else "",
        rounding=_rounding(manifest.changed),
        repeating=repeating(manifest, place),
        settings=[(key, plain(value)) for key, value in settings_of(manifest)],
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def linked(source: SourceRecord) -> str:
    """The source's name, leading to its page where it has one."""
    name = plain(source.name)
    return f"[{name}]({HUB}/{source.name})" if source.kind == "hub" else f"**{name}**"


def _origin(calibration: CalibrationRecord) -> str:
    return ORIGINS.get(calibration.train_len_origin, calibration.train_len_origin)


def _changed_names(changed: Sequence[ChangedTensor]) -> str:
    patterns = Counter((re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.rule) for tensor in changed)
    return ", ".join(f"{count} `{pattern}` ({rule})" for (pattern, rule), count in patterns.items())


def _perplexity_rows(table: PerplexityTable | None, calibration: CalibrationRecord | None) -> list[tuple[str, ...]]:
    if table is None:
        return []
    remarks: dict[int | None, str] = {}
    if calibration is not None:
        remarks = {calibration.train_len: " (trained)", calibration.calibrated_len: " (calibrated to)"}
    rows: list[tuple[str, ...]] = []
    for length in sorted(table.base, key=int):
        before, after = table.base[length], table.converted[length]
        error = table.standard_error.get(length)
        rows.append(
            (
                f"{format_length(int(length))}{remarks.get(int(length), '')}",
                f"{before:.2f}",
                f"**{after:.2f}**" if round(after, 2) < round(before, 2) else f"{after:.2f}",
                change(before, after) + (f" ± {100 * error:.1f}" if error is not None else ""),
            )
        )
    if table.sliding is not None:
        rows.append((f"any, sliding window of {table.sliding_window}", f"{table.sliding:.2f}", "", ""))
    return rows


def perplexity_note(table: PerplexityTable) -> str:
    """How perplexity was measured."""
    text = (
        f"Measured on {table.text.name}, which the scales have not seen, in {table.dtype}: exp of the mean "
        f"next-token loss. Every length tiles the same span of {table.span_tokens:,} tokens with windows that "
        f"start from zero state, so the rows compare. {table.passes}"
    )
    if table.sliding is not None:
        text += (
            f" The source on a sliding window of {table.sliding_window} tokens has {table.sliding:.2f}, for twice "
            "the passes. Its state is reset every half window, so it remembers nothing beyond its window: a flat "
            "perplexity alone is no memory."
        )
    return text


def _memory_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    short = short_cells(manifest)
    rows: list[tuple[str, ...]] = []
    for cell in manifest.memory.cells if manifest.memory else ():
        if cell not in short:
            mark = "**" if cell.converted > max(cell.base, cell.sliding) else ""
            converted = f"{mark}{cell.converted:.0%}{mark} ± {100 * cell.error:.0f}"
            rows.append((_fact(cell), f"{cell.base:.0%}", f"{cell.sliding:.0%}", converted))
    return rows


def _fact(cell: MemoryCell) -> str:
    return f"{cell.kind}, {format_length(cell.distance)} back in {format_length(cell.length)}"


def short_cells(manifest: Manifest) -> list[MemoryCell]:
    """Facts that were asked for within the length that the source was trained on."""
    trained = manifest.calibration.train_len if manifest.calibration else None
    return [cell for cell in manifest.memory.cells if cell.length <= trained] if manifest.memory and trained else []


def _short_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    return [
        (_fact(cell), f"{cell.samples:,}", f"{cell.base:.0%}", f"{cell.converted:.0%} ± {100 * cell.error:.0f}")
        for cell in short_cells(manifest)
    ]


def _harness_rows(tasks: TaskTable | None) -> Iterator[tuple[str, ...]]:
    for score in tasks.scores if tasks else ():
        share = score.metric.startswith(("acc", "exact"))
        base, converted = (f"{value:.1%}" if share else f"{value:.2f}" for value in (score.base, score.converted))
        error = f" ± {196 * score.error:.1f}" if share and score.error is not None else ""
        yield f"{score.task}, {score.metric}", f"{score.samples:,}", base, converted + error


def _recall_line(manifest: Manifest, place: str) -> str:
    """The command that asks for the facts of the short tasks again; empty if there are none."""
    cells, memory = short_cells(manifest), manifest.memory
    if memory is None or not cells:
        return ""
    options = {
        "task": "recall",
        "lengths": ",".join(sorted({str(cell.length) for cell in cells})),
        "distances": ",".join(dict.fromkeys(str(cell.distance) for cell in cells)),
        "kind": tuple(dict.fromkeys(cell.kind for cell in cells)),
        "samples": cells[0].samples,
        "text": memory.text.name.removesuffix(" (unwrapped)"),
    }
    return command_line("mmod evaluate", [_source_place(manifest.source), place], options)


def memory_note(memory: MemoryTable) -> str:
    """How memory was measured."""
    samples = max(cell.samples for cell in memory.cells)
    return (
        f"Found in {samples} prompts each, filled up with {memory.text.name}. An answer counts where each of its "
        "tokens is the most likely one; of copied spans it is the share of tokens. ± is half of the 95 % interval. "
        f"The sliding window is the source on the last {memory.window} tokens alone."
    )


def memory_sentence(memory: MemoryTable) -> str:
    """A sentence on one kind of fact in the longest text measured."""
    cells, found = cells_in_longest(memory)
    text = f"In {format_length(cells[0].length)} tokens this model"
    if found:
        reach = found[-1]
        return (
            f"{text} finds a {reach.kind} {format_length(reach.distance)} tokens back in {reach.converted:.0%} of "
            f"{reach.samples} prompts; the source in {reach.base:.0%}."
        )
    if any(cell.converted > cell.base + 2 * cell.error for cell in cells):
        return f"{text} finds more than the source, and misses one in ten or more."
    return f"{text} remembers no further than the source."


def cells_in_longest(memory: MemoryTable) -> tuple[list[MemoryCell], list[MemoryCell]]:
    """Facts of the first kind in the longest text by distance, and those up to which nine of ten are found."""
    place = max(cell.length for cell in memory.cells), memory.cells[0].kind
    cells = sorted((c for c in memory.cells if (c.length, c.kind) == place), key=lambda c: c.distance)
    return cells, [*itertools.takewhile(lambda cell: cell.converted >= 0.9, cells)]


def change(before: float, after: float) -> str:
    """A relative change in percent with its sign; n/a if a value is not finite."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return "n/a"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f} %"


def _factor_rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    for tensor in manifest.changed:
        dtypes = dict.fromkeys((tensor.source_dtype, tensor.dtype))
        ranges = (" / ".join(f"{s[key]:.3f}" for key in RANGE) for s in (tensor.requested, tensor.effective))
        yield f"`{tensor.name}`", " → ".join(dtypes), *ranges


@dataclass(frozen=True)
class Snippet:
    """Lines to copy, and what they are for: empty for stock transformers."""

    purpose: str
    code: str
    language: str = "sh"

    def to_markdown(self) -> str:
        return f"{self.purpose}:\n\n{fenced(self.code, self.language)}".removeprefix(":\n\n")


def snippets_of(folder: Path, manifest: Manifest, place: str, is_on_hub: bool) -> list[Snippet]:
    """How a converted model is loaded and served."""
    length = max(manifest.entries.values(), default=None)
    if manifest.scales_only:
        return [Snippet("", command_line("mmod bake", ["MODEL_OR_FILE", "OUTPUT"], {"scales": place}))]
    if manifest.source.quantisation == "gguf":
        file = min((path.name for path in folder.glob("*.gguf")), default="model.gguf")
        fetch = f"hf download {place} --include '*.gguf' --local-dir .\n" if is_on_hub else ""
        return [Snippet("With llama.cpp", fetch + llama_server(file if is_on_hub else f"{place}/{file}", length))]
    if manifest.source.quantisation == "mlx":
        return [Snippet("With mlx-lm", mlx_server(place))]
    served = [
        Snippet(f"With {runtime.name}", runtime.lines(place, length)) for runtime in runtimes_of(manifest.source)
    ]
    packed = _is_packed(folder, manifest.source)
    stock = (
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', CompressedTensorsConfig' * packed}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}"'
        f"{', quantization_config=CompressedTensorsConfig(dequantize=True)' * packed})"
    )
    return [Snippet("", stock, "python"), *served]


def _is_packed(folder: Path, source: SourceRecord) -> bool:
    """Whether weights must be unpacked while they load: stock Mamba initialises what packing removes."""
    if source.quantisation != "compressed-tensors" or source.model_type not in ("mamba", "mamba2"):
        return False
    config = parse_json_object((folder / "config.json").read_bytes(), "config.json")
    return section(config, "quantization_config").get("format") == "pack-quantized"


def _evidence_of_serving(source: SourceRecord) -> str:
    """Which of the programs that serve this architecture were run."""
    runtimes = runtimes_of(source)
    kinds = {
        "was run on converted models of this architecture": [r for r in runtimes if source.model_type in r.run],
        "was not run here, its source was read": [r for r in runtimes if source.model_type not in r.run],
    }
    said = [f"{', '.join(r.name for r in found)}: {words}." for words, found in kinds.items() if found]
    if any(runtime.caches_prefixes for runtime in runtimes):
        said += [STATE, CACHING]
    if source.model_type == "mamba2" and MLX_LM in runtimes:
        said.append(MLX_MAMBA2)
    return " ".join(said)


def _rounding(changed: Sequence[ChangedTensor]) -> float:
    """The most by which loading moves a tensor's smallest, mean or largest factor, in percent."""
    return max((100 * abs(t.effective[key] / t.requested[key] - 1) for t in changed for key in RANGE), default=0.0)


def repeating(manifest: Manifest, place: str) -> Iterator[Snippet]:
    """The commands that make a model again and prove it."""
    yield Snippet("This command made the model", manifest.command)
    again = "The scales alone, written into the source again, give the same weights bit for bit"
    yield Snippet(again, _bake_line(manifest, place))
    if not manifest.scales_only:
        base = _source_place(manifest.source) if manifest.source.kind == "folder" else None
        yield Snippet(
            "And this compares every tensor with the source's and with the formula. On the Hub, files with the "
            "source's SHA-256 are not read",
            command_line("mmod verify", [place], {"base": base}),
        )


def settings_of(manifest: Manifest) -> list[tuple[str, str]]:
    """What a model was made with: texts, settings and versions."""
    calibration = manifest.calibration
    rows = [(text.role + " text", f"{text.name}, {text.tokens:,} tokens") for text in manifest.texts]
    if calibration is not None:
        target, trained = calibration.target_len, calibration.train_len
        shown = {
            "method": calibration.method,
            "target length": f"{target:,} tokens" if target else "",
            "calibrated for": f"{calibration.calibrated_len:,} tokens" if calibration.reach else "",
            "training length": f"{trained:,} tokens ({_origin(calibration)})" if trained is not None else "",
            "seed": str(calibration.seed),
            "step kept": f"{calibration.kept_step} of {calibration.steps}",
            "guard": calibration.guard,
            "time": f"{calibration.seconds:.0f} s on {calibration.device}",
        }
        rows += filter(lambda row: row[1], shown.items())
        # The method's own, where they are not left to a default.
        has_row = {"method", "target_len", "train_len", "seed", "steps"}
        given = [row for row in calibration.settings.items() if row[0] not in has_row and row[1] not in (None, "")]
        rows += [(key.replace("_", " "), str(value)) for key, value in given]
    return rows + [(f"{package} version", version) for package, version in manifest.versions.items()]


def _bake_line(manifest: Manifest, place: str) -> str:
    """The command that writes a model's scales into its source again, with all its options."""
    source, tokenizer = manifest.source, manifest.tokenizer
    scaled = [tensor for tensor in manifest.changed if tensor.rule.startswith("A_log")]
    kept = bool(scaled) and all(tensor.dtype == tensor.source_dtype != "F32" for tensor in scaled)
    options = {
        "revision": source.revision if source.kind == "hub" else None,
        "scales": place,
        "a_log_dtype": "keep" if kept else None,
        "tokenizer": "FOLDER_OF_THE_TOKENIZER" if tokenizer and tokenizer.kind == "folder" else None,
        "trust_a_log": source.layout != "gguf" and find_architecture(source.model_type) is None,
        "anyway": "--anyway" in manifest.command,
        "raise_position_limit": "--raise-position-limit" in manifest.command,
        "rope": manifest.rope,
        "compose": source.composed_from is not None,
    }
    return command_line("mmod bake", [_source_place(source), "OUTPUT"], options)


def _source_place(source: SourceRecord) -> str:
    """The source in a command: its name, or a placeholder for a local path."""
    if source.kind != "folder":
        return source.name
    return "FILE_OF_THE_SOURCE" if source.quantisation == "gguf" else FOLDER


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# What the template calls.
HELPERS = (
    *(count, plain, linked, format_length, fenced, fold, markdown_table),
    *(change, memory_sentence, memory_note, perplexity_note),
)
