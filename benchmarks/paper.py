"""The paper's tables and figures laid out anew, with what this machine can run: one Markdown report with pictures.

    python -m benchmarks.paper --text mansfield-park.txt
    python -m benchmarks.paper --model state-spaces/mamba2-1.3b --text emozilla/pg19:test --target-len 32k

Every measurement is one call of ``benchmarks.measures`` or ``mmod`` whose JSON is kept in OUTPUT/cells. A run that
was stopped goes on where it was, and ``--only`` runs a part. The report is written from what is there.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measures import TASKS
from benchmarks.pictures import draw_pictures
from calibrator.methods import METHODS
from converter.command_line import name_of
from converter.commands.evaluate import Table
from converter.commands.opening import HELD_OUT_NOVEL
from converter.layouts import read_checkpoint
from converter.lengths import format_length, parse_lengths
from converter.manifest import MANIFEST_NAME
from converter.source import DEMOS, resolve

SECTIONS = ("table-1", "figure-1", "figure-2", "figure-3", "table-3", "decimamba", "passkey")
FACTORS = (1.5, 2.0, 3.0)
LEAST_DIFFERENCE = 0.005
"""What two perplexities must differ by, as a fraction, for one to count as lower."""
LONGMAMBA, MAMBA_EXTEND = "LongMamba (reimplementation)", "MambaExtend (reimplementation)"
REIMPLEMENTED = (
    "MambaExtend, LongMamba and DeciMamba are reimplementations from their papers' descriptions, not "
    "their authors' code."
)


@dataclass(frozen=True)
class Variant:
    """A converted model beside the base: its name in the tables, its method, and the words that make it."""

    name: str
    method: str
    words: tuple[str, ...] = ()


CALIBRATED = Variant("calibrated A (gradient, this tool)", "gradient")
SPSA_A = Variant("calibrated A (SPSA, paper)", "spsa", ("--preset", "paper", "--granularity", "layer"))
SPSA_LOG_A = Variant(
    "calibrated log A (SPSA, paper's code)",
    "spsa",
    ("--preset", "paper", "--granularity", "layer", "--form", "power"),
)
CONSTANT = Variant("constant A", "constant")
WINSORIZED = Variant("A clipped to its quantiles", "winsorize")
ITERATIVE = ("gradient", "spsa")
VARIANTS = (CALIBRATED, SPSA_A, SPSA_LOG_A, CONSTANT, WINSORIZED)


@dataclass(frozen=True)
class Setup:
    """What one run of this program is asked for."""

    model: str
    text: str
    output: Path
    lengths: str
    windows: int
    target_len: str
    train_len: str | None
    passkey_lengths: str
    passkey_samples: int
    steps: int | None
    device: str
    run: bool

    @property
    def short(self) -> str:
        """The shortest length, for claims about what scaling costs."""
        return str(parse_lengths(self.lengths)[0])

    @property
    def long(self) -> str:
        """The longest length."""
        return str(parse_lengths(self.lengths)[-1])


class Bench:
    """Runs ``mmod`` for one model and keeps what it printed."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.missing: list[str] = []

    def measure(self, name: str, *words: str) -> dict[str, Any] | None:
        """The JSON of one measurement, from the disk if it was run before; None where it is not to be run."""
        setup = self.setup
        words = ("measures", *words, "--text", setup.text, "--device", setup.device, "--json", "--quiet")
        path = self._path("cells", name, words).with_suffix(".json")
        if not path.is_file():
            printed = self._run(words, name)
            if printed is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(printed, encoding="utf-8")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def perplexity(self, name: str, model: str, *words: str) -> dict[str, Any] | None:
        """Perplexity over whole windows of all lengths."""
        setup = self.setup
        return self.measure(name, model, "--lengths", setup.lengths, "--windows", str(setup.windows), *words)

    def convert(self, variant: Variant) -> str | None:
        """The folder of a converted model, made if it is not there; None where it cannot or shall not be made."""
        if variant.method not in METHODS:
            self.missing.append(f"{variant.name}: this version has no method {variant.method}.")
            return None
        setup = self.setup
        words = ("convert", setup.model, "--method", variant.method, *variant.words)
        words += ("--target-len", setup.target_len, "--windows", "1", "--device", setup.device, "--quiet")
        words += ("--train-len", setup.train_len) if setup.train_len else ()
        words += ("--steps", str(setup.steps)) if setup.steps and variant.method in ITERATIVE else ()
        folder = self._path("models", variant.name, words)
        if not (folder / MANIFEST_NAME).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            if self._run((*words, "--output", str(folder)), variant.name) is None:
                return None
        return str(folder)

    def _path(self, kind: str, name: str, words: Sequence[str]) -> Path:
        # Without the machine and without folders, so that machines can share the work on one report.
        device = words.index("--device")
        named = [Path(word).name for word in (*words[:device], *words[device + 2 :])]
        digest = hashlib.sha256("\0".join(named).encode()).hexdigest()[:10]
        return self.setup.output / kind / f"{_slug(self.setup.model)}-{_slug(name)}-{digest}"

    def _run(self, words: Sequence[str], name: str) -> str | None:
        if not self.setup.run:
            self.missing.append(f"{name}: not run.")
            return None
        typer.echo(f"{self.setup.model}: {name}: mmod {' '.join(words)}", err=True)
        command = [str(Path(sys.executable).with_name("mmod")), *words]
        if words[0] == "measures":
            command = [sys.executable, "-m", "benchmarks.measures", *words[1:]]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode != 0:
            self.missing.append(f"{name}: the command failed (exit code {result.returncode}).")
            return None
        return result.stdout


def _slug(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name).strip("-").lower()


@dataclass(frozen=True)
class Part:
    """One section of the report: its record is one of ``benchmarks.measures``, put together from several calls."""

    title: str
    text: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, whether it holds here, and the figures."""

    sentence: str
    holds: bool
    evidence: str


def together(records: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """One comparison out of several results of the same task with a model each; the keys name the models anew."""
    found = {name: record for name, record in records.items() if record is not None}
    if not found:
        return None
    models = [record["models"][0] | {"model": name, "machine": _machine(record)} for name, record in found.items()]
    return next(iter(found.values())) | {"models": models}


def _before_and_after(bench: Bench, name: str, *words: str) -> dict[str, Any] | None:
    """One measure of the base and of the calibrated model."""
    records = {"base": bench.measure(name, bench.setup.model, *words)}
    if folder := bench.convert(CALIBRATED):
        records[CALIBRATED.name] = bench.measure(f"{name} calibrated", folder, *words)
    return together(records)


def _perplexity_of(bench: Bench, variants: Iterable[Variant]) -> dict[str, dict[str, Any] | None]:
    """The perplexity of every variant that can be made."""
    return {
        variant.name: bench.perplexity(variant.name, folder)
        for variant in variants
        if (folder := bench.convert(variant))
    }


def state_norm(bench: Bench) -> list[Part]:
    """Table 1."""
    setup = bench.setup
    words = ("--task", "state-norm", "--lengths", setup.lengths, "--windows", str(setup.windows))
    text = "The paper: the largest norm of mamba2-1.3b goes from 131 at 1k to about 1,150 from 8k on."
    return _part("Table 1: state norm by length", text, _before_and_after(bench, "state norm", *words))


def spectrum(bench: Bench) -> list[Part]:
    """Figure 1."""
    words = ("--task", "spectrum", "--lengths", "1k", "--windows", "2")
    text = "The paper shows exp(-|A|) of mamba2-1.3b; the first picture has the step Δ that the text brings about."
    return _part("Figure 1: eigenvalues by layer", text, _before_and_after(bench, "spectrum", *words))


def constant_scaling(bench: Bench) -> list[Part]:
    """Figure 2."""
    model = bench.setup.model
    words = [word for target in ("A", "delta") for factor in FACTORS for word in _constant(target, factor)]
    record = bench.perplexity("constant scaling", model, *words)
    return _part("Figure 2: one constant factor on A, or on Δ", "", record)


def _constant(target: str, factor: float) -> tuple[str, str]:
    return "--comparator", f"constant-{target}={factor:g}"


def calibrated_scaling(bench: Bench) -> list[Part]:
    """Figure 3."""
    records = {"base": _unbaked(bench, 0), MAMBA_EXTEND: _unbaked(bench, 1)}
    records |= _perplexity_of(bench, (SPSA_A, SPSA_LOG_A, CALIBRATED))
    text = (
        f"Calibrated once for {bench.setup.target_len} tokens and read at every length; the paper calibrates each."
    )
    return _part("Figure 3: calibrated A against calibrated Δ", text, together(records))


def _unbaked(bench: Bench, place: int) -> dict[str, Any] | None:
    """The base (place 0), MambaExtend (1) or LongMamba (2), of one call that measures all three."""
    setup = bench.setup
    words = ("--comparator", "mambaextend", "--comparator", "longmamba", "--target-len", setup.target_len)
    train_len = ("--train-len", setup.train_len) if setup.train_len else ()
    record = bench.perplexity("base and reimplementations", setup.model, *words, *train_len)
    return None if record is None else record | {"models": [record["models"][place]]}


def comparison(bench: Bench) -> list[Part]:
    """Table 3."""
    records = {name: _unbaked(bench, place) for place, name in enumerate(("base", MAMBA_EXTEND, LONGMAMBA))}
    records |= _perplexity_of(bench, VARIANTS)
    text = f"Whole windows over one span of text. {REIMPLEMENTED}"
    return _part("Table 3: all methods", text, together(records))


def decimation(bench: Bench) -> list[Part]:
    """Table 3's DeciMamba, which can be asked for the last predictions alone."""
    setup = bench.setup
    if read_checkpoint(resolve(setup.model, weights=False)).model_type not in ("mamba", "falcon_mamba"):
        bench.missing.append("DeciMamba: it is defined for Mamba-1.")
        return []
    train_len = ("--train-len", setup.train_len) if setup.train_len else ()
    words = ("--task", "tail", "--lengths", setup.lengths, "--windows", str(8 * setup.windows), *train_len)
    record = bench.measure("decimamba", setup.model, *words, "--comparator", "decimamba")
    text = (
        "DeciMamba drops tokens between layers, so the same last predictions are measured after every length. "
        f"{REIMPLEMENTED}"
    )
    return _part("Table 3: DeciMamba", text, record)


def passkey(bench: Bench) -> list[Part]:
    """Figure 4."""
    setup = bench.setup
    samples = ("--samples", str(setup.passkey_samples))
    words = ("--task", "passkey", "--lengths", setup.passkey_lengths, *samples)
    records = {"base": bench.measure("passkey", setup.model, *words)}
    text = (
        "Green where every sample was solved. The filler is sentences of the text named, in place of the paper's "
        "WikiText. Models of a few million parameters cannot copy five digits and mostly read zero; the measure "
        "itself is tested on a scripted model that knows the answer."
    )
    return _part("Figure 4: pass keys", text, together(records))


PARTS: Mapping[str, Callable[[Bench], list[Part]]] = {
    "table-1": state_norm,
    "figure-1": spectrum,
    "figure-2": constant_scaling,
    "figure-3": calibrated_scaling,
    "table-3": comparison,
    "decimamba": decimation,
    "passkey": passkey,
}


def _part(title: str, text: str, record: dict[str, Any] | None) -> list[Part]:
    return [] if record is None else [Part(title, text, record)]


def find_claims(setup: Setup, parts: Mapping[str, Part]) -> list[Claim]:
    """What of the paper can be judged with the parts at hand."""
    claims: list[Claim] = []
    if part := parts.get("table-1"):
        norms = part.record["models"][0]["norms"]
        first, last = (max(layer["norm"] for layer in norms[length]) for length in (setup.short, setup.long))
        evidence = f"largest layer {first:.3g} at {_shown(setup.short)}, {last:.3g} at {_shown(setup.long)}"
        claims.append(
            Claim("The state's norm grows with the length of the text (table 1).", last > first, evidence)
        )
    if part := parts.get("figure-2"):
        values = _perplexities(part)
        base, *scaled = values.values()
        for factor, A, delta in zip(FACTORS, scaled, scaled[len(FACTORS) :], strict=False):
            sentence = f"A constant factor {factor:g} serves long text better on A than on Δ (figure 2)."
            claims.append(_lower(sentence, "A", A, "Δ", delta, setup.long))
            sentence = f"A constant factor {factor:g} on A costs perplexity at short length (section 6.4)."
            claims.append(_lower(sentence, "base", base, "A", A, setup.short))
    values = {}
    for name in ("figure-3", "table-3"):
        values |= _perplexities(parts[name]) if name in parts else {}
    if (scaled_A := values.get(SPSA_A.name)) and (scaled_delta := values.get(MAMBA_EXTEND)):
        sentence = "Calibrated A beats calibrated Δ at length (figure 3)."
        claims.append(_lower(sentence, "A", scaled_A, "Δ", scaled_delta, setup.long))
    if CALIBRATED.name in values and len(values) > 2:
        for length in values[CALIBRATED.name]:
            first = min(values, key=lambda name: values[name][length])
            ours = (1 - LEAST_DIFFERENCE) * values[CALIBRATED.name][length]
            place = 1 + sum(row[length] < ours for row in values.values())
            sentence = f"Calibrated A is best or second best at {_shown(length)} tokens (table 3)."
            evidence = f"place {place} of {len(values)}, lowest {first}"
            claims.append(Claim(sentence, place <= 2, evidence))
    if part := parts.get("decimamba"):
        base, decimated = (entry["perplexity"] for entry in part.record["models"])
        sentence = "DeciMamba holds the perplexity down at length (table 3)."
        claims.append(_lower(sentence, "DeciMamba (reimplementation)", decimated, "base", base, setup.long))
    return claims


def _perplexities(part: Part) -> dict[str, dict[str, float]]:
    return {entry["model"]: entry["perplexity"] for entry in part.record["models"]}


def _lower(
    sentence: str, low_name: str, low: Mapping[str, float], high_name: str, high: Mapping[str, float], length: str
) -> Claim:
    evidence = f"at {_shown(length)} {low_name} {low[length]:.4g}, {high_name} {high[length]:.4g}"
    return Claim(sentence, low[length] < (1 - LEAST_DIFFERENCE) * high[length], evidence)


def _shown(length: str) -> str:
    return format_length(int(length))


def lay_out(setup: Setup, parts: Mapping[str, Part], missing: Sequence[str]) -> str:
    """The report on one model, as Markdown; its pictures are written beside it."""
    folder = setup.output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [f"# {DEMOS.get(setup.model, name_of(setup.model))}"]
    for name, part in parts.items():
        blocks += [
            f"## {part.title}",
            part.text,
            *map(_as_markdown, TASKS[part.record["task"]].tables(part.record)),
        ]
        for picture in draw_pictures(part.record):
            path = folder / f"{_slug(setup.model)}-{name}-{picture.path}"
            path.write_bytes(picture.png)
            blocks.append(f"![{picture.alt}](pictures/{path.name})")
        blocks.append(_origin(part.record))
    blocks.append("## What reproduces and what does not")
    blocks.append(
        f"Perplexities less than {LEAST_DIFFERENCE:.1%} apart count as equal: windows and seeds move them so."
    )
    for claim in find_claims(setup, parts):
        verdict = "Reproduces" if claim.holds else "Does not reproduce"
        blocks.append(f"- **{verdict}**: {claim.sentence} ({claim.evidence})")
    if missing:
        blocks += ["Not measured:", "\n".join(f"- {line}" for line in dict.fromkeys(missing))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _as_markdown(table: Table) -> str:
    title, columns, rows = table
    lines = [_row(columns), f"|{'---|' * len(columns)}", *map(_row, rows)]
    return f"{title}:\n\n" + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _machine(record: Mapping[str, Any]) -> str:
    versions = record["versions"]
    return (
        f"{record['device']}, {record['dtype']}, torch {versions['torch']}, transformers {versions['transformers']}"
    )


def _origin(record: Mapping[str, Any]) -> str:
    text = record["text"]
    machine = _machine(record)
    others = [entry for entry in record["models"] if entry.get("machine", machine) != machine]
    elsewhere = "".join(f"; {entry['model']}: {entry['machine']}" for entry in others)
    return (
        f"{text['name']}, {text['tokens']} tokens (SHA-256 {text['sha256'][:12]}…), seed {record['seed']}, "
        f"{machine}{elsewhere}."
    )


def main(
    model: Annotated[list[str] | None, typer.Option(help="Hub ids or folders; the two demos by default.")] = None,
    text: Annotated[str, typer.Option(help="Held-out text: file, folder or Hub data set.")] = HELD_OUT_NOVEL,
    output: Annotated[Path, typer.Option(help="Folder for cells, models, pictures and report.md.")] = Path(
        "build/paper"
    ),
    lengths: Annotated[str, typer.Option(help="Window lengths.")] = "256,1k,4k,16k,64k",
    windows: Annotated[int, typer.Option(help="Windows of the longest length.")] = 2,
    target_len: Annotated[str, typer.Option(help="Length to calibrate for.")] = "8k",
    train_len: Annotated[str | None, typer.Option(help="Length the models were trained at.")] = None,
    passkey_lengths: Annotated[str, typer.Option(help="Lengths of the passkey grid.")] = "256,1k,4k",
    passkey_samples: Annotated[int, typer.Option(help="Pass keys for each length and depth.")] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, for a shorter run than the methods' own.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: {', '.join(SECTIONS)}.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Measure what is missing, or lay out what is there.")
    ] = True,
) -> None:
    """Measure, and write report.md."""
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"There is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    reports = []
    for name in model or ["demo", "demo:mamba"]:
        setup = Setup(
            name,
            text,
            output,
            lengths,
            windows,
            target_len,
            train_len,
            passkey_lengths,
            passkey_samples,
            steps,
            device,
            run,
        )
        bench = Bench(setup)
        parts = {}
        for section in SECTIONS:
            if only and section not in only:
                bench.missing.append(f"{section}: left out.")
                continue
            for part in PARTS[section](bench):
                parts[section] = part
        reports.append(lay_out(setup, parts, bench.missing))
    output.mkdir(parents=True, exist_ok=True)
    words = f"--text {name_of(text)} --target-len {target_len}{f' --train-len {train_len}' if train_len else ''}"
    title = f"# The paper's tables and figures\n\n    python -m benchmarks.paper {words}\n"
    (output / "report.md").write_text("\n".join([title, *reports]), encoding="utf-8")
    typer.echo(f"Wrote {output / 'report.md'}", err=True)


if __name__ == "__main__":
    typer.run(main)
