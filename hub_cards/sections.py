"""The sections of a model card, written from the manifest."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from converter.command_line import command_line
from converter.drawing import Picture
from converter.layouts.architectures import find_architecture
from converter.lengths import format_length
from converter.manifest import (
    CalibrationRecord,
    ChangedTensor,
    Manifest,
    MemoryCell,
    MemoryTable,
    PerplexityTable,
    Reach,
    SourceRecord,
)
from hub_cards.markdown import fenced, fold, markdown_table, plain
from hub_cards.serving import CACHING, MLX_LM, MLX_MAMBA2, Runtime, llama_server, mlx_server, runtimes_of

HUB = "https://huggingface.co"
FOLDER = "FOLDER_OF_THE_SOURCE"
RULES = {
    "linear": "A → s·A, written as `A_log + log s`",
    "power": "|A| → |A|^s, written as `A_log · s`",
}

GGUF_RULES = {"linear": "A → s·A, written into `ssm_a`", "power": "|A| → |A|^s, written into `ssm_a`"}

ORIGINS = {"option": "as given", "family table": "as published", "measured": "as measured"}

EFFECTS = {
    "linear": "A factor above 1 makes the state forget faster, one below 1 slower.",
    "power": "A factor above 1 moves |A| away from 1, one below 1 towards it.",
}

PAPER = """@misc{lu2025mambamodulation,
  title = {Mamba Modulation: On the Length Generalization of Mamba},
  author = {Lu, Peng and Huang, Jerry and Zeng, Qiuhao and Wang, Xinyu and Chen, Boxing and
            Langlais, Philippe and Cui, Yufei},
  year = {2025},
  eprint = {2509.19633},
  archivePrefix = {arXiv}
}"""


def _linked(source: SourceRecord) -> str:
    """The source's name, leading to its page where it has one."""
    name = plain(source.name)
    return f"[{name}]({HUB}/{source.name})" if source.kind == "hub" else f"**{name}**"


CITATION = (
    "## Citation\n\nThe source model's card says how to cite it. The method is from "
    f"[arXiv:2509.19633](https://arxiv.org/abs/2509.19633):\n\n{fenced(PAPER, 'bibtex')}"
)


def write_sections(
    folder: Path, manifest: Manifest, pictures: Sequence[Picture], name: str, repo_id: str | None
) -> str:
    """All sections of a card.

    Args:
        folder: the converted folder.
        name: of the model, the card's title.
        repo_id: where the model will be; None for a path to fill in.
    """
    shown = {Path(picture.path).stem: f"![{plain(picture.alt)}]({picture.path})" for picture in pictures}
    place = repo_id or "path/to/this/folder"
    sections = [
        f"# {plain(name)}",
        _badge(manifest) if repo_id else "",
        _what_scales_fit(manifest) if manifest.scales_only else _what_changed(manifest),
        _memory(manifest, shown),
        _short_tasks(manifest, place),
        _perplexity(manifest.perplexity, manifest.calibration, shown),
        _scales(manifest, shown),
        _use(folder, manifest, place, is_on_hub=repo_id is not None),
        _limits(manifest),
        _repeat(manifest, place),
        CITATION,
    ]
    return "\n\n".join(filter(None, sections))


def _badge(manifest: Manifest) -> str:
    """What `mmod verify` proves of a model whose base others can read, as a picture that leads to its command."""
    if manifest.scales_only or manifest.source.kind == "folder":
        return ""
    said = f"{manifest.identical_tensors} tensors identical, {len(manifest.changed)} scaled"
    picture = f"https://img.shields.io/badge/mmod_verify-{quote(said)}-2ea44f"
    return f"[![mmod verify: {said}]({picture})](#repeat-and-verify)"


def _what_scales_fit(manifest: Manifest) -> str:
    found_on = manifest.scales_of or manifest.source
    values = sum(math.prod(tensor.shape) for tensor in manifest.changed)
    return (
        f"This repository holds no weights. It holds factors for {count(len(manifest.changed), 'A_log tensor')} "
        f"({count(values, 'value')}) of {_linked(found_on)}, and that A_log itself. They fit every model with that "
        "A_log: the model itself, its quantised copies (GGUF, MLX, FP8, AWQ, GPTQ), and fine-tunes and merges that "
        "left A_log as it was. Any other is refused."
    )


def _what_changed(manifest: Manifest) -> str:
    source, calibration = manifest.source, manifest.calibration
    commit, goal = "", ""
    if source.kind == "hub":
        commit = f" (commit [`{source.revision[:12]}`]({HUB}/{source.name}/tree/{source.revision}))"
    if calibration is not None:
        goal = f" by {calibration.method}, which reads no text and knows of no length"
        if calibration.target_len is not None:
            goal = f" for text of up to {format_length(calibration.target_len)} tokens"
        if calibration.train_len is not None:
            goal += f"; it was trained on {format_length(calibration.train_len)} ({_origin(calibration)})"
    what = "with the spectrum of its state transition matrix A rescaled"
    sentences = [f"This is {_linked(source)}{commit} {what}{goal}."]
    if calibration is not None and calibration.reach is not None:
        sentences.append(reach_sentence(calibration.reach))
    if manifest.scales_of is not None:
        sentences.append(
            f"The factors were found on {_linked(manifest.scales_of)} and written into this copy of it as they are."
        )
    if source.composed_from is not None:
        sentences.append("The source was itself made by this tool; its scales and these multiply.")
    if manifest.is_worse:
        sentences.append("**By its own table it is worse than the source at every length.**")
    if not manifest.scales_nothing:
        values = sum(math.prod(tensor.shape) for tensor in manifest.changed)
        sentences += [
            f"Exactly {count(len(manifest.changed), 'tensor')}, {count(values, 'value')}, changed: "
            f"{_changed_patterns(manifest.changed)}.",
            f"All other {manifest.identical_tensors:,} tensors are the source's, bit for bit.",
            "No weight was trained, and stock code runs the model.",
        ]
        if manifest.entries:
            keys = ", ".join(f"`{key}` ({value:,})" for key, value in manifest.entries.items())
            sentences.append(f"The length that servers read was raised: {keys}.")
        if manifest.rope:
            sentences.append(f"`config.json` extends the rotary positions ({manifest.rope}).")
    else:
        what = "every factor is 1" if manifest.changed else "**no tensor differs** from the source's"
        sentences.append(f"No scales were better than none, so {what}.")
    if source.layout == "state-spaces":
        sentences.append(
            "The source has mamba_ssm's layout; tensor names and config were rewritten for transformers, no values."
        )
    return " ".join(sentences)


def reach_sentence(reach: Reach) -> str:
    """What was found of facts at one distance, by length."""
    found = ", ".join(
        f"{n} in {format_length(length)}" for n, length in zip(reach.found, reach.lengths, strict=True)
    )
    return (
        f"It remembers {format_length(reach.distance)} tokens back at any length up to "
        f"{format_length(max(reach.lengths))}: of {reach.samples} facts ({reach.kind}) at that distance it finds "
        f"{found} tokens, so with 95 % confidence at least {reach.low:.0%} in the longest."
    )


def _origin(calibration: CalibrationRecord) -> str:
    """How the training length is known, in words."""
    return ORIGINS.get(calibration.train_len_origin, calibration.train_len_origin)


def _changed_patterns(changed: Sequence[ChangedTensor]) -> str:
    patterns = Counter((re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.rule) for tensor in changed)
    return ", ".join(f"{count} `{pattern}` ({rule})" for (pattern, rule), count in patterns.items())


def _perplexity(table: PerplexityTable | None, calibration: CalibrationRecord | None, shown: dict[str, str]) -> str:
    if table is None:
        return "## Perplexity\n\nNot measured."
    remarks = {}
    if calibration is not None:
        remarks = {calibration.train_len: " (trained)", calibration.calibrated_len: " (calibrated to)"}
    rows = []
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
    text = plain(perplexity_note(table))
    if table.standard_error:
        text += " ± is the standard error over windows."
    if table.sliding is not None:
        rows.append((f"any, sliding window of {table.sliding_window}", f"{table.sliding:.2f}", "", ""))
    return "\n\n".join(
        filter(
            None,
            [
                "## Perplexity",
                markdown_table(("Tokens", "Source", "This model", "Change"), rows),
                text,
                shown.get("perplexity"),
            ],
        )
    )


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


def _memory(manifest: Manifest, shown: dict[str, str]) -> str:
    memory = manifest.memory
    if memory is None:
        return ""
    parts = ["## Memory", *filter(None, (plain(memory.skills), plain(memory.kept)))]
    if not memory.cells:
        parts.append("What this model remembers over long text could not be judged.")
        return "\n\n".join(parts)
    rows = [
        (
            f"{cell.kind}, {format_length(cell.distance)} back in {format_length(cell.length)}",
            f"{cell.base:.0%}",
            f"{cell.sliding:.0%}",
            f"{'**' if cell.converted > max(cell.base, cell.sliding) else ''}{cell.converted:.0%}"
            f"{'**' if cell.converted > max(cell.base, cell.sliding) else ''} ± {100 * cell.error:.0f}",
        )
        for cell in memory.cells
        if cell not in short_cells(manifest)
    ]
    parts += [
        memory_sentence(memory),
        *filter(None, (shown.get("memory"),)),
        markdown_table(("Fact and distance from the end", "Source", "Sliding window", "This model"), rows),
        plain(memory_note(memory)),
    ]
    return "\n\n".join(parts)


def short_cells(manifest: Manifest) -> list[MemoryCell]:
    """Facts that were asked for within the length that the source was trained on."""
    trained = manifest.calibration.train_len if manifest.calibration else None
    return [cell for cell in manifest.memory.cells if cell.length <= trained] if manifest.memory and trained else []


def _short_tasks(manifest: Manifest, place: str) -> str:
    """What is lost or kept at short length, as tasks."""
    cells, memory, tasks = short_cells(manifest), manifest.memory, manifest.tasks
    rows = [
        (
            f"{cell.kind}, {format_length(cell.distance)} back in {format_length(cell.length)}",
            f"{cell.samples:,}",
            f"{cell.base:.0%}",
            f"{cell.converted:.0%} ± {100 * cell.error:.0f}",
        )
        for cell in cells
    ]
    parts = []
    if memory is not None and cells:
        options = {
            "task": "recall",
            "lengths": ",".join(sorted({str(cell.length) for cell in cells})),
            "distances": ",".join(dict.fromkeys(str(cell.distance) for cell in cells)),
            "kind": tuple(dict.fromkeys(cell.kind for cell in cells)),
            "samples": cells[0].samples,
            "text": memory.text.name.removesuffix(" (unwrapped)"),
        }
        line = command_line("mmod evaluate", [_source_place(manifest.source), place], options)
        parts.append(f"Facts are counted as above. To ask again, with other draws:\n\n{fenced(line, 'sh')}")
    if tasks is not None:
        for score in tasks.scores:
            error = "" if score.error is None else f" ± {196 * score.error:.1f}"
            share = score.metric.startswith(("acc", "exact"))
            shown = [f"{value:.1%}" if share else f"{value:.2f}" for value in (score.base, score.converted)]
            rows.append((f"{score.task}, {score.metric}", f"{score.samples:,}", shown[0], shown[1] + error * share))
        limit = "" if tasks.limit is None else f" --limit {tasks.limit}"
        line = (
            f"lm_eval --model hf --model_args pretrained={place},dtype=float32,max_length={tasks.max_length} "
            f"--tasks {','.join(score.task for score in tasks.scores)}{limit}"
        )
        parts.append(f"The tasks by name are lm-evaluation-harness's:\n\n{fenced(line, 'sh')}")
    if not rows:
        return ""
    columns = ("Task at short length", "Samples", "Source", "This model")
    return "\n\n".join(["## Short tasks", markdown_table(columns, rows), *parts])


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
    longest = max(cell.length for cell in memory.cells)
    kind = memory.cells[0].kind
    cells = sorted((c for c in memory.cells if (c.length, c.kind) == (longest, kind)), key=lambda c: c.distance)
    reach = None
    for cell in cells:
        if cell.converted < 0.9:
            break
        reach = cell
    text = f"In {format_length(longest)} tokens this model"
    if reach is not None:
        return (
            f"{text} finds a {kind} {format_length(reach.distance)} tokens back in {reach.converted:.0%} of "
            f"{reach.samples} prompts; the source in {reach.base:.0%}."
        )
    if any(cell.converted > cell.base + 2 * cell.error for cell in cells):
        return f"{text} finds more than the source, and misses one in ten or more."
    return f"{text} remembers no further than the source."


def change(before: float, after: float) -> str:
    """A relative change in percent with its sign; n/a if a value is not finite."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return "n/a"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f} %"


def _scales(manifest: Manifest, shown: dict[str, str]) -> str:
    if not manifest.changed:
        return ""
    rule = (GGUF_RULES if manifest.source.quantisation == "gguf" else RULES)[manifest.form]
    parts = [
        "## Scales",
        f"One factor s per {manifest.granularity}: {rule}. {EFFECTS[manifest.form]}",
    ]
    parts += [shown["factors"]] if "factors" in shown else []
    rows = [
        (f"`{tensor.name}`", _dtypes(tensor), _range(tensor.requested), _range(tensor.effective))
        for tensor in manifest.changed
    ]
    columns = ("Tensor", "Stored as", "s requested", f"s in {manifest.load_dtype}")
    return "\n\n".join(
        [*parts, fold("Factors by tensor: smallest, geometric mean, largest", markdown_table(columns, rows))]
    )


def _dtypes(tensor: ChangedTensor) -> str:
    return tensor.dtype if tensor.dtype == tensor.source_dtype else f"{tensor.source_dtype} → {tensor.dtype}"


def _range(factors: dict[str, float]) -> str:
    return " / ".join(f"{factors[key]:.3f}" for key in ("min", "mean", "max"))


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
        Snippet(f"With {runtime.name}", runtime.lines(place, length)) for runtime in _runtimes(manifest.source)
    ]
    stock = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}")'
    )
    return [Snippet("", stock, "python"), *served]


def _use(folder: Path, manifest: Manifest, place: str, is_on_hub: bool) -> str:
    said = [snippet.to_markdown() for snippet in snippets_of(folder, manifest, place, is_on_hub)]
    if manifest.scales_only:
        said.append(
            "MODEL_OR_FILE is a Hub id, a folder or a GGUF file; every byte but the scaled tensors stays as it is."
        )
    elif manifest.source.quantisation not in ("gguf", "mlx"):
        said.append(_evidence_of_serving(manifest.source))
    return "\n\n".join(["## Use", *filter(None, said)])


def _runtimes(source: SourceRecord) -> list[Runtime]:
    return runtimes_of(source.model_type, source.quantisation)


def _evidence_of_serving(source: SourceRecord) -> str:
    """Which of the programs that serve this architecture were run."""
    runtimes = _runtimes(source)
    kinds = {
        "was run on converted models of this architecture": [r for r in runtimes if source.model_type in r.run],
        "was not run here, its source was read": [r for r in runtimes if source.model_type not in r.run],
    }
    said = [f"{', '.join(r.name for r in found)}: {words}." for words, found in kinds.items() if found]
    if any(runtime.caches_prefixes for runtime in runtimes):
        said.append(CACHING)
    if source.model_type == "mamba2" and MLX_LM in runtimes:
        said.append(MLX_MAMBA2)
    return " ".join(said)


def _limits(manifest: Manifest) -> str:
    items = []
    table = manifest.perplexity
    if table is not None and table.base:
        shortest, longest = min(table.base, key=int), max(table.base, key=int)
        items.append(
            f"**Short text**: at {format_length(int(shortest))} tokens perplexity changes by "
            f"{change(table.base[shortest], table.converted[shortest])}."
        )
        items.append(
            f"**Evidence**: perplexity on {plain(table.text.name)} alone, up to {format_length(int(longest))} "
            "tokens. Nothing is said about longer text or other kinds of text."
        )
    if manifest.memory is not None and manifest.memory.cells:
        farthest = format_length(max(cell.distance for cell in manifest.memory.cells))
        items.append(
            "**Memory**: scaling changes what a model forgets, not what it knows. Facts were asked for at most "
            f"{farthest} tokens back; farther back the model may find nothing."
        )
    if manifest.changed:
        items.append(f"**Number format**: {_number_format(manifest)}")
    items += [plain(note) for note in manifest.notes]
    return "\n".join(["## Limits", "", *(f"- {item}" for item in items)]) if items else ""


def _number_format(manifest: Manifest) -> str:
    stored = ", ".join(sorted({tensor.dtype for tensor in manifest.changed}))
    moved = max(
        abs(tensor.effective[key] / tensor.requested[key] - 1)
        for tensor in manifest.changed
        for key in ("min", "mean", "max")
    )
    if manifest.source.quantisation == "gguf":
        return "the changed tensors are stored as F32, as llama.cpp keeps them."
    text = (
        f"the changed tensors are stored as {stored}; transformers loads them as {manifest.load_dtype} by default, "
        f"where a tensor's smallest, mean and largest factors are within {100 * moved:.2g} % of those requested."
    )
    if stored == "F32" and manifest.load_dtype != "float32":
        text += " `dtype=torch.float32` keeps them as they are."
    return text


def _repeat(manifest: Manifest, place: str) -> str:
    parts = [snippet.to_markdown() for snippet in repeating(manifest, place)]
    rows = [(key, plain(value)) for key, value in settings_of(manifest)]
    return "\n\n".join(
        ["## Repeat and verify", *parts, fold("Settings", markdown_table(("Setting", "Value"), rows))]
    )


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
        rows += [*filter(lambda row: row[1], shown.items()), *_other_settings(calibration)]
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


def _other_settings(calibration: CalibrationRecord) -> Iterator[tuple[str, str]]:
    """The method's settings that have no row of their own and are not left to a default."""
    shown = {"method", "target_len", "train_len", "seed", "steps"}
    for key, value in calibration.settings.items():
        if key not in shown and value not in (None, ""):
            yield key.replace("_", " "), str(value)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
