"""The model card: what was done to a model, what it gained and lost, how to use, repeat and check it.

The card has a part that is written anew each time, between marks, and keeps everything outside of them. The
source's own card follows in marks of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

from converter.console import Reporter
from converter.errors import OutputError
from converter.lengths import format_length
from converter.manifest import CalibrationRecord, ChangedTensor, Manifest, PerplexityTable
from hub_cards.metadata import (
    card_metadata,
    converted_name,
    front_matter_block,
    merged,
    split_card,
)
from hub_cards.plots import PLOTS_FOLDER, Picture, draw_pictures

CARD_NAME = "README.md"
HUB = "https://huggingface.co"
BEGIN = (
    "<!-- mmod:begin (written by `mmod card`; edit outside of these marks, what is between them is replaced) -->"
)
END = "<!-- mmod:end -->"
SOURCE_BEGIN, SOURCE_END = "<!-- mmod:source-begin -->", "<!-- mmod:source-end -->"
REPO_MARK = "<!-- mmod:repo {} -->"
GENERATED_PART = re.compile(r"<!-- mmod:begin\b.*?-->.*?<!-- mmod:end -->", re.DOTALL)
SOURCE_PART = re.compile(r"<!-- mmod:source-begin -->.*<!-- mmod:source-end -->", re.DOTALL)

RULES = {
    ("A", "linear"): "A → s·A, written as `A_log + log s`",
    ("A", "power"): "|A| → |A|^s, written as `A_log · s`",
    ("delta", "linear"): "Δ → s·Δ, written as `A_log + log s`, `D / s` and, where no norm follows, `out_proj · s`",
}

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


@dataclass(frozen=True)
class Card:
    """A card and its pictures, not yet written.

    Attributes:
        warnings: sentences for the person who makes the card.
    """

    text: str
    pictures: tuple[Picture, ...]
    warnings: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Put the card and its pictures into ``folder``, each whole or not at all, and return the card's path."""
        for picture in self.pictures:
            _write_whole(folder / picture.path, picture.png)
        return _write_whole(folder / CARD_NAME, self.text.encode())


@dataclass(frozen=True)
class _Parts:
    """A card that exists: its front matter as written, the repository it names, and the text that is kept."""

    block: str = ""
    metadata: dict[str, object] = field(default_factory=dict)
    repo_id: str | None = None
    before: str = ""
    between: str = ""
    source: str = ""
    after: str = ""


def write_card(
    folder: Path,
    manifest: Manifest,
    *,
    source_card: str | None,
    repo_id: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write README.md and its pictures into a converted folder.

    Args:
        source_card: the source's README.md at the commit that was converted; None keeps what the folder's card
            has of it already.
        repo_id: where the model will be, for the lines that load it; None for what the folder's card says.

    Raises:
        OutputError: the present card has broken marks, or the disk refuses.
        CorruptCheckpointError: the folder's factors or weights cannot be read.
    """
    card = make_card(folder, manifest, source_card=source_card, repo_id=repo_id)
    if reporter is not None:
        for warning in card.warnings:
            reporter.warn(warning)
    return card.write(folder)


def make_card(
    folder: Path,
    manifest: Manifest,
    *,
    source_card: str | None,
    repo_id: str | None = None,
    present: str | None = None,
    redraw: bool = True,
) -> Card:
    """The card of a converted folder, with what its present card keeps.

    Arguments and errors are those of :func:`write_card`, and:

    Args:
        present: the card whose own text is kept; None for the folder's.
        redraw: draw the pictures that lie in the folder already anew.
    """
    path = folder / CARD_NAME
    if present is None:
        present = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A conversion that copies all files of its source copies the card as well; that one is no work of the user's.
    parts = _take_apart(present) if present != source_card else _Parts()
    repo_id = repo_id or parts.repo_id
    source = split_card(source_card or "")
    calibration = manifest.calibration
    name = repo_id.split("/")[-1] if repo_id else None
    name = name or converted_name(manifest.source.name, calibration.target_len if calibration else None)
    generated = card_metadata(manifest, source.metadata, name)
    metadata = merged(generated, dict(parts.metadata))
    block = parts.block if metadata == parts.metadata else front_matter_block(metadata)
    pictures = draw_pictures(folder, manifest, redraw=redraw)
    body = _generated_part(folder, manifest, pictures, name, repo_id)
    source_part = _source_part(manifest, source.body) if source.body.strip() else parts.source
    text = "\n\n".join(filter(None, [block.strip(), parts.before, body, parts.between, source_part, parts.after]))
    return Card(text + "\n", pictures, tuple(_warnings(source_card, source.problem, "license" in metadata)))


def _warnings(source_card: str | None, problem: str, has_license: bool) -> Iterable[str]:
    if problem:
        yield f"The source's card is used without its metadata: {problem}."
    if not has_license:
        why = "the source has no card" if source_card is None else "the source's card names none"
        yield f"The card names no license, since {why}. Add one to {CARD_NAME} before you publish."


def _write_whole(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}.", "Check the folder's rights.") from error
    return path


# What a card that exists keeps


def _take_apart(card: str) -> _Parts:
    front = split_card(card)
    source = SOURCE_PART.search(front.body)
    above = front.body[: source.start()] if source else front.body
    after = front.body[source.end() :] if source else ""
    before, generated, between = above, "", ""
    if match := GENERATED_PART.search(above):
        before, generated, between = above[: match.start()], match.group(0), above[match.end() :]
    if "<!-- mmod:" in before + between:
        raise OutputError(
            f"{CARD_NAME} has a mark of this tool without its counterpart.",
            f"Restore the lines '{BEGIN}' and '{END}' around the generated part, or delete {CARD_NAME}.",
        )
    if not generated:
        # A card that a person wrote before this tool wrote one: what it says follows what the tool says.
        before, between = "", above
    named = re.search(REPO_MARK.format(r"(\S+)"), generated)
    return _Parts(
        block=front.block,
        metadata=front.metadata,
        repo_id=named[1] if named else None,
        before=before.strip(),
        between=between.strip(),
        source=source.group(0) if source else "",
        after=after.strip(),
    )


def has_own_text(card: str) -> bool:
    """Whether a card that this tool wrote holds text that a person added."""
    parts = _take_apart(card)
    return bool(parts.before or parts.between or parts.after)


# The source's own card


def _source_part(manifest: Manifest, body: str) -> str:
    where = f"at commit `{manifest.source.revision}`" if manifest.source.kind == "hub" else "as it was converted"
    return "\n\n".join(
        [
            SOURCE_BEGIN,
            "# The source's own card",
            f"*What follows is the card of {_source_link(manifest)} {where}, without its metadata. "
            "It describes the model before scaling.*",
            contained(body),
            SOURCE_END,
        ]
    )


def contained(markdown: str) -> str:
    """Markdown from elsewhere, ended so that it cannot swallow what follows it.

    Marks and pictures of this tool are taken out (the source may be a conversion itself). A fence, an HTML block
    or a fold that is still open at the end is closed; what is open inside a list or quote ends with it.
    """
    text = re.sub(r"<!-- mmod:.*?-->\n?", "", markdown.replace("\r\n", "\n"))
    text = re.sub(rf"!\[[^\]]*\]\({PLOTS_FOLDER}/[^)]*\)\n?", "", text).strip()
    lines = text.splitlines()
    tokens = MarkdownIt("commonmark").parse(text)
    for token in tokens:
        if token.level == 0 and token.type in ("fence", "html_block") and token.map and token.map[1] >= len(lines):
            text += _missing_end(token.markup, token.content, lines[-1] if token.map[1] - token.map[0] > 1 else "")
    html = "".join(token.content for token in tokens if token.type in ("html_block", "inline"))
    folds = len(re.findall(r"<details\b", html)) - html.count("</details>")
    return text + "\n\n</details>" * folds


def _missing_end(markup: str, content: str, last_line: str) -> str:
    """What closes a fence (which has a ``markup``) or an HTML block, where nothing does yet."""
    if markup:
        return "" if re.fullmatch(rf" {{0,3}}{re.escape(markup)}+[ \t]*", last_line) else f"\n{markup}"
    for opening, closing in (("<!--", "-->"), ("<?", "?>"), ("<![CDATA[", "]]>")):
        if content.lstrip().startswith(opening):
            return "" if closing in content else f"\n{closing}"
    verbatim = re.match(r"\s*<(script|pre|style|textarea)\b", content, re.IGNORECASE)
    if verbatim and f"</{verbatim[1].lower()}>" not in content.lower():
        return f"\n</{verbatim[1]}>"
    return ""


def _source_link(manifest: Manifest) -> str:
    name = plain(manifest.source.name)
    return f"[{name}]({HUB}/{manifest.source.name})" if manifest.source.kind == "hub" else f"**{name}**"


# The generated part


def _generated_part(
    folder: Path, manifest: Manifest, pictures: Sequence[Picture], name: str, repo_id: str | None
) -> str:
    shown = {Path(picture.path).stem: f"![{plain(picture.alt)}]({picture.path})" for picture in pictures}
    place = repo_id or "path/to/this/folder"
    sections = [
        f"{BEGIN}\n{REPO_MARK.format(repo_id)}" if repo_id else BEGIN,
        f"# {plain(name)}",
        _what_changed(manifest),
        _perplexity(manifest.perplexity, manifest.calibration, shown),
        _scales(manifest, shown),
        _use(folder, manifest, place, is_on_hub=repo_id is not None),
        _limits(manifest),
        _repeat(manifest, place),
        _citation(manifest),
        END,
    ]
    return "\n\n".join(filter(None, sections))


def _what_changed(manifest: Manifest) -> str:
    source, calibration = manifest.source, manifest.calibration
    commit, goal = "", ""
    if source.kind == "hub":
        commit = f" (commit [`{source.revision[:12]}`]({HUB}/{source.name}/tree/{source.revision}))"
    if calibration is not None:
        goal = (
            f" for text of up to {format_length(calibration.target_len)} tokens; it was trained on "
            f"{format_length(calibration.train_len)} ({_origin(calibration)})"
        )
    what = "spectrum of its state transition matrix A" if manifest.target == "A" else "time step Δ"
    sentences = [f"This is {_source_link(manifest)}{commit} with the {what} rescaled{goal}."]
    if source.composed_from is not None:
        sentences.append("The source was itself made by this tool; its scales and these multiply.")
    if manifest.changed:
        values = sum(math.prod(tensor.shape) for tensor in manifest.changed)
        sentences += [
            f"Exactly {_count(len(manifest.changed), 'tensor')}, {_count(values, 'value')}, changed: "
            f"{_changed_patterns(manifest.changed)}.",
            f"All other {manifest.identical_tensors:,} tensors are the source's, bit for bit.",
            "No weight was trained, and stock code runs the model.",
        ]
    else:
        sentences.append("No scales were better than none, so **no tensor differs** from the source's.")
    if source.layout == "state-spaces":
        sentences.append(
            "The source has mamba_ssm's layout; names and config were mapped to that of transformers, no values."
        )
    return " ".join(sentences)


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
        remarks = {calibration.train_len: " (trained)", calibration.target_len: " (calibrated to)"}
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
    text = (
        f"Measured on {plain(table.text.name)}, which the scales have not seen, in {table.dtype}: exp of the mean "
        f"next-token loss. Every length tiles the same span of {table.span_tokens:,} tokens with windows that "
        "start from zero state, so the rows compare."
    )
    if table.standard_error:
        text += " ± is the standard error over windows."
    return "\n\n".join(
        filter(
            None,
            [
                "## Perplexity",
                _table(("Tokens", "Source", "This model", "Change"), rows),
                text,
                shown.get("perplexity"),
            ],
        )
    )


def change(before: float, after: float) -> str:
    """A relative change in percent with its sign; what is not finite has none."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return "n/a"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f} %"


def _scales(manifest: Manifest, shown: dict[str, str]) -> str:
    if not manifest.changed:
        return ""
    rule = RULES[manifest.target, manifest.form]
    parts = [
        "## Scales",
        f"One factor s per {manifest.granularity}: {rule}. {EFFECTS[manifest.form]}",
    ]
    parts += [shown[name] for name in ("factors", "spectrum") if name in shown]
    rows = [
        (f"`{tensor.name}`", _dtypes(tensor), _range(tensor.requested), _range(tensor.effective))
        for tensor in manifest.changed
    ]
    columns = ("Tensor", "Stored as", "s requested", f"s in {manifest.load_dtype}")
    return "\n\n".join(
        [*parts, _details("Factors by tensor: smallest, geometric mean, largest", _table(columns, rows))]
    )


def _dtypes(tensor: ChangedTensor) -> str:
    return tensor.dtype if tensor.dtype == tensor.source_dtype else f"{tensor.source_dtype} → {tensor.dtype}"


def _range(factors: dict[str, float]) -> str:
    return " / ".join(f"{factors[key]:.3f}" for key in ("min", "mean", "max"))


def _use(folder: Path, manifest: Manifest, place: str, is_on_hub: bool) -> str:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}")'
    )
    text = f"## Use\n\n{fenced(code, 'python')}"
    subfolder = _state_spaces_folder(folder)
    if subfolder is None:
        return text
    path = f'"{place}/{subfolder}"'
    lines = ["from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel", ""]
    if is_on_hub:
        lines = ["from huggingface_hub import snapshot_download", *lines]
        lines.append(f'path = snapshot_download("{place}", allow_patterns="{subfolder}/*")')
        path = f'path + "/{subfolder}"'
    lines.append(f"model = MambaLMHeadModel.from_pretrained({path})")
    return f"{text}\n\nWith mamba_ssm, from the copy in its layout:\n\n{fenced(chr(10).join(lines), 'python')}"


def _state_spaces_folder(folder: Path) -> str | None:
    """The subfolder with the copy that mamba_ssm loads, known by its weights' name."""
    found = sorted(path.parent.name for path in folder.glob("*/pytorch_model.bin"))
    return found[0] if found else None


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
            "tokens. Nothing is said about longer text, other kinds of text, or finding facts in long text."
        )
    if manifest.changed:
        items.append(f"**Number format**: {_number_format(manifest)}")
    if manifest.fold_error is not None:
        items.append(
            "**Folding**: writing the scaled time step into stock weights moves logits by up to "
            f"{manifest.fold_error:.1g} of their size."
        )
    items += [plain(note) for note in manifest.notes]
    return "\n".join(["## Limits", "", *(f"- {item}" for item in items)]) if items else ""


def _number_format(manifest: Manifest) -> str:
    stored = ", ".join(sorted({tensor.dtype for tensor in manifest.changed}))
    moved = max(
        abs(tensor.effective[key] / tensor.requested[key] - 1)
        for tensor in manifest.changed
        for key in ("min", "mean", "max")
    )
    text = (
        f"the changed tensors are stored as {stored}; transformers loads them as {manifest.load_dtype} by default, "
        f"where a tensor's smallest, mean and largest factors are within {100 * moved:.2g} % of those requested."
    )
    if stored == "F32" and manifest.load_dtype != "float32":
        text += " `dtype=torch.float32` keeps them as they are."
    return text


def _repeat(manifest: Manifest, place: str) -> str:
    source, calibration = manifest.source, manifest.calibration
    name = source.name if source.kind != "folder" else "FOLDER_OF_THE_SOURCE"
    revision = f" --revision {source.revision}" if source.kind == "hub" else ""
    parts = ["## Repeat and verify", "This command made the model:", fenced(manifest.command, "sh")]
    parts.append("The scales alone, written into the source again, give the same weights bit for bit:")
    parts.append(fenced(f"mmod bake {name} OUTPUT{revision} \\\n    --scales {place}", "sh"))
    parts.append("And this compares every tensor with the source's and with the formula:")
    parts.append(fenced(f"mmod verify {place}", "sh"))
    rows: list[tuple[str, ...]] = [
        (text.role + " text", f"{plain(text.name)}, {text.tokens:,} tokens") for text in manifest.texts
    ]
    if calibration is not None:
        rows += [
            ("method", calibration.method),
            ("target length", f"{calibration.target_len:,} tokens"),
            ("training length", f"{calibration.train_len:,} tokens ({_origin(calibration)})"),
            ("seed", str(calibration.seed)),
            ("step kept", f"{calibration.kept_step} of {calibration.steps}"),
            *([("guard", plain(calibration.guard))] if calibration.guard else []),
            ("time", f"{calibration.seconds:.0f} s on {plain(calibration.device)}"),
            *_other_settings(calibration),
        ]
    rows += [(f"{package} version", version) for package, version in manifest.versions.items()]
    parts.append(_details("Settings", _table(("Setting", "Value"), rows)))
    return "\n\n".join(parts)


def _other_settings(calibration: CalibrationRecord) -> Iterator[tuple[str, str]]:
    """The method's settings that have no row of their own and are not left to a default."""
    shown = {"method", "target_len", "train_len", "seed", "steps"}
    for key, value in calibration.settings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {choice}" for name, choice in value.items())
        if key not in shown and value not in (None, ""):
            yield key.replace("_", " "), plain(str(value))


def _citation(manifest: Manifest) -> str:
    source = manifest.source
    entries = [PAPER]
    if source.kind == "hub":
        owner, _, title = source.name.rpartition("/")
        author = f"  author = {{{{{owner}}}}},\n" if owner else ""
        entries.append(
            f"@misc{{{re.sub(r'[^A-Za-z0-9]', '', source.name)},\n  title = {{{{{title}}}}},\n{author}"
            f"  howpublished = {{\\url{{{HUB}/{source.name}}}}},\n  note = {{commit {source.revision}}}\n}}"
        )
    return (
        "## Citation\n\nThe method, from [arXiv:2509.19633](https://arxiv.org/abs/2509.19633), and the source "
        f"model (its own card may ask for more):\n\n{fenced(chr(10).join(entries), 'bibtex')}"
    )


# Markdown


def plain(text: str) -> str:
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# Several conversions side by side


@dataclass(frozen=True)
class Comparison:
    """Perplexity by length of several converted models, before and after.

    Attributes:
        columns: ``Tokens``, then a model each.
        rows: a length each, then what was measured how.
        comparable: whether all models were measured on the same text, span and number format.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    comparable: bool

    def to_markdown(self) -> str:
        """The comparison as a Markdown table."""
        return _table(self.columns, self.rows)


def compare(folders: Sequence[Path]) -> Comparison:
    """Set converted folders side by side, lengths down and models across.

    Raises:
        OutputError: a folder is no conversion, or has no perplexities.
    """
    models = []
    for folder in folders:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise OutputError(f"{folder} is no converted model.", "Give folders that this tool wrote.")
        if manifest.perplexity is None:
            raise OutputError(f"{folder} has no perplexities to compare.", f"Measure it: mmod evaluate {folder}")
        models.append((folder, manifest, manifest.perplexity))
    lengths = sorted({int(length) for *_, table in models for length in table.base})
    rows = [
        (format_length(length), *(_before_after(table, str(length)) for *_, table in models)) for length in lengths
    ]
    conditions = [(table.text.name, f"{table.span_tokens:,}", table.dtype) for *_, table in models]
    methods = [manifest.calibration.method if manifest.calibration else "given scales" for _, manifest, _ in models]
    labels = ("text", "span (tokens)", "number format")
    rows += [(label, *(plain(c[place]) for c in conditions)) for place, label in enumerate(labels)]
    rows.append(("method", *methods))
    columns = ("Tokens", *(plain(os.path.basename(os.path.abspath(folder))) for folder, *_ in models))
    return Comparison(columns, tuple(rows), len({c for c in conditions}) == 1)


def _before_after(table: PerplexityTable, length: str) -> str:
    if length not in table.base:
        return "n/a"
    before, after = table.base[length], table.converted[length]
    return f"{before:.2f} → {after:.2f} ({change(before, after)})"
