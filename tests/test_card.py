"""Model cards of converted folders: what they say, keep, refuse, and survive."""

from __future__ import annotations

import dataclasses
import getpass
import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.errors import OutputError, UsageError
from converter.manifest import Manifest, TextRecord
from converter.output import converted_name
from converter.reporting import Reporter
from converter.source import resolve
from hub_cards.card import END, card_text, make_card
from hub_cards.metadata import card_metadata, merged, split_card
from tests.converted_folder import MEMORY, PERPLEXITY, convert
from tests.hub_server import metadata_problems
from tests.small_checkpoints import write_transformers

SOURCE_CARD = "---\nlicense: mit\nlanguage: [en]\ntags: [mamba, ssm]\n---\n# Tiny\n\nA tiny model.\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with pictures and without a card of this tool."""
    work = tmp_path_factory.mktemp("card")
    manifest = convert(str(write_transformers(work / "tiny")), work / "out")
    make_card(work / "out", manifest, source_card=None).write(work / "out")
    return work / "out"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    """The folder's manifest, as if its source were on the Hub."""
    found = Manifest.read(folder)
    assert found is not None
    source = dataclasses.replace(found.source, name="bob/tiny", kind="hub", revision=COMMIT)
    return dataclasses.replace(found, source=source)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """An own folder to write cards into, with the weights and pictures of the shared one."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "README.md":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(folder / "mmod", tmp_path / "mmod")
    return tmp_path


class Listener(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def write(folder: Path, manifest: Manifest, *, source_card: str | None, repo_id: str | None = None) -> None:
    make_card(folder, manifest, source_card=source_card, repo_id=repo_id).write(folder)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def headings(markdown: str) -> list[str]:
    """The headings that a Markdown reader finds outside of lists, quotes, code and HTML."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [
        tokens[place + 1].content
        for place, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0
    ]


# What it says


def test_card_tells_what_is_remembered(own: Path, manifest: Manifest) -> None:
    make_card(own, dataclasses.replace(manifest, memory=MEMORY), source_card=None).write(own)
    card = card_of(own)
    assert headings(split_card(card).body)[1:4] == ["Memory", "Short tasks", "Perplexity"]
    for words in (
        MEMORY.skills,
        MEMORY.kept,
        "| pass key, 192 back in 8k | 25% | 0% | **94%** ± 10 |",
        "| pass key, 32 back in 8k | 50% | 100% | 100% ± 5 |",
        "| random span, 192 back in 8k | 88% | 0% | 75% ± 10 |",
        "In 8k tokens this model finds a pass key 192 tokens back in 94% of 16 prompts; the source in 25%.",
        "filled up with Northanger Abbey",
        "on the last 128 tokens alone",
        "`mmod evaluate --task recall --chunks 128` measures it",
        "](mmod/memory.png)",
    ):
        assert words in re.sub(" +", " ", card), words
    assert (own / "mmod" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_card_shows_short_tasks_with_the_lines_that_repeat_them(
    folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    dataclasses.replace(manifest, memory=MEMORY).write(own)

    def scored(revision: str, acc: float) -> dict[str, Any]:
        metrics = {"acc": acc, "acc_stderr": 0.01, "acc_norm": acc + 0.1, "acc_norm_stderr": 0.02}
        return {"revision": revision, "scores": [{"task": "piqa", "samples": 400, "metrics": metrics}]}

    revisions = [COMMIT, resolve(str(own), compose=True).revision]
    record = {"settings": {"lengths": [512], "limit": 400}, "models": list(map(scored, revisions, (0.5, 0.4)))}
    scores = tmp_path / "evaluation.json"
    scores.write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["card", str(own), "--tasks", str(scores)])
    assert done.exit_code == 0, done.output
    # What it says lies in the manifest, so a later card has it as well.
    assert CliRunner().invoke(app, ["card", str(own), "--repo-id", "alice/tiny"]).exit_code == 0
    card = re.sub(" +", " ", card_of(own))
    for words in (
        "| pass key, 192 back in 256 | 16 | 50% | 50% ± 20 |",
        "| piqa, acc_norm | 400 | 60.0% | 50.0% ± 3.9 |",
        "mmod evaluate bob/tiny alice/tiny --task recall --lengths 256 --distances 192 --kind 'pass key' --samples",
        "lm_eval --model hf --model_args pretrained=alice/tiny,dtype=float32,max_length=512 --tasks piqa --limit 4",
    ):
        assert words in card, words
    # In one table only.
    assert card.count("pass key, 192 back in 256") == 1
    record["models"][0]["revision"] = "another"
    scores.write_text(json.dumps(record))
    refused = CliRunner().invoke(app, ["card", str(own), "--tasks", str(scores)])
    assert isinstance(refused.exception, UsageError) and "it measured other models" in str(refused.exception)


@pytest.mark.parametrize(
    ("converted", "error", "said"),
    [
        ((0.95, 0.95), 0.05, "finds a pass key 2k tokens back in 95% of 16 prompts; the source in 25%."),
        ((0.95, 0.89), 0.05, "finds a pass key 32 tokens back in 95% of 16 prompts; the source in 25%."),
        # What is found far back does not count where it is not found near by.
        ((0.8, 0.95), 0.05, "finds more than the source, and misses one in ten or more."),
        ((0.6, 0.5), 0.15, "finds more than the source, and misses one in ten or more."),
        ((0.6, 0.5), 0.2, "remembers no further than the source."),
        ((0.2, 0.0), 0.01, "remembers no further than the source."),
    ],
)
def test_card_claims_no_more_memory_than_was_measured(
    own: Path, manifest: Manifest, converted: tuple[float, float], error: float, said: str
) -> None:
    cell = MEMORY.cells[1]
    cells = [
        dataclasses.replace(cell, distance=distance, converted=share, error=error)
        for distance, share in zip((32, 2048), converted, strict=True)
    ]
    memory = dataclasses.replace(MEMORY, cells=[dataclasses.replace(cell, length=256, converted=1.0), *cells])
    write(own, dataclasses.replace(manifest, memory=memory), source_card=None)
    assert f"In 8k tokens this model {said}" in card_of(own)


def test_card_of_a_model_without_skills_says_so(own: Path, manifest: Manifest) -> None:
    memory = dataclasses.replace(MEMORY, skills="The unscaled model recalls nothing.", kept="", cells=[])
    write(own, dataclasses.replace(manifest, memory=memory), source_card=None)
    card = card_of(own)
    assert "The unscaled model recalls nothing.\n\nWhat this model remembers over long text could not be" in card
    assert "memory.png" not in card


def test_manifest_of_an_earlier_version_has_no_memory(own: Path, manifest: Manifest) -> None:
    # The file is a link to the one that all tests share.
    (own / "mmod.json").unlink()
    manifest.write(own)
    content = json.loads((own / "mmod.json").read_text())
    (own / "mmod.json").write_text(json.dumps({key: value for key, value in content.items() if key != "memory"}))
    earlier = Manifest.read(own)
    assert earlier is not None and earlier.memory is None
    write(own, earlier, source_card=None)
    assert "Memory" not in headings(split_card(card_of(own)).body)


def test_card_tells_what_was_done(own: Path, manifest: Manifest) -> None:
    make_card(own, manifest, source_card=SOURCE_CARD, repo_id="alice/tiny-8k-hf").write(own)
    card = card_of(own)
    sections = ["tiny-8k-hf", "Perplexity", "Scales", "Use", "Limits", "Repeat and verify", "Citation"]
    assert headings(split_card(card).body) == sections
    values = sum(len(tensor.shape) and tensor.shape[0] for tensor in manifest.changed)
    for words in (
        f"[bob/tiny](https://huggingface.co/bob/tiny) (commit [`{COMMIT[:12]}`]",
        f"Exactly 3 tensors, {values} values, changed: 3 `backbone.layers.*.mixer.A_log` (A_log + log s)",
        f"All other {manifest.identical_tensors} tensors are the source's, bit for bit",
        "| 256 (trained) | 43.66 | 43.80 | +0.3 % ± 0.2 |",
        "| 8k (calibrated to) | 44.56 | **41.30** | -7.3 % ± 0.4 |",
        "| 32k | 152.49 | **41.97** | -72.5 % |",
        'AutoModelForCausalLM.from_pretrained("alice/tiny-8k-hf")',
        "at 256 tokens perplexity changes by +0.3 %",
        "transformers loads them as bfloat16 by default",
        manifest.command,
        f"mmod bake bob/tiny OUTPUT --revision {COMMIT}",
        "mmod verify alice/tiny-8k-hf",
        f"[![mmod verify: {manifest.identical_tensors} tensors identical, 3 scaled](https://",
        "Mamba Modulation: On the Length Generalization of Mamba",
    ):
        assert words in card
    for picture in ("perplexity", "factors"):
        assert re.search(rf"!\[[^\]]{{40,}}\]\(mmod/{picture}\.png\)", card)
        assert (own / "mmod" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_metadata_is_inherited_added_and_accepted(own: Path, manifest: Manifest) -> None:
    texts = [TextRecord("emozilla/pg19:train", "calibration", 10, "0"), *manifest.texts]
    manifest = dataclasses.replace(manifest, texts=texts)
    write(own, manifest, source_card=SOURCE_CARD)
    card = card_of(own)
    metadata = split_card(card).metadata
    assert metadata_problems(card) == []
    expected = {
        "license": "mit",
        "language": ["en"],
        "base_model": "bob/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mamba", "ssm", "mamba2", "long-context", "mmod"],
        "datasets": ["emozilla/pg19"],
        "metrics": ["perplexity"],
    }
    assert {key: metadata[key] for key in metadata if key != "model-index"} == expected
    values = {
        (entry["name"], metric["name"]): metric["value"]
        for entry in metadata["model-index"]
        for result in entry["results"]
        for metric in result["metrics"]
    }
    assert values["tiny-8k-hf", "Perplexity at 8k tokens"] == 41.3
    assert values["bob/tiny", "Perplexity at 8k tokens (source, unscaled)"] == 44.56
    assert len(values) == 6
    results = ModelCard(card).data.eval_results
    assert results is not None and len({result.metric_name for result in results}) == 6


def test_nothing_is_invented(own: Path, folder: Path) -> None:
    listener = Listener()
    local = Manifest.read(folder)
    assert local is not None
    make_card(own, local, source_card=None).write(own, listener)
    metadata = split_card(card_of(own)).metadata
    assert not {"license", "language", "base_model", "base_model_relation", "datasets"} & metadata.keys()
    assert len(listener.warnings) == 1 and "no license" in listener.warnings[0]
    listener.warnings.clear()
    make_card(own, local, source_card=SOURCE_CARD).write(own, listener)
    assert listener.warnings == []


def test_no_trace_of_the_machine(own: Path, folder: Path) -> None:
    local = Manifest.read(folder)
    assert local is not None
    write(own, local, source_card=SOURCE_CARD)
    text = card_of(own) + local.to_json()
    assert str(folder.parent) not in text and str(own) not in text and str(Path.home()) not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


def test_card_without_calibration_or_perplexity(own: Path, manifest: Manifest) -> None:
    bare = dataclasses.replace(manifest, calibration=None, perplexity=None, texts=[])
    write(own, bare, source_card=None)
    card = card_of(own)
    assert headings(split_card(card).body)[:2] == ["tiny-scaled-hf", "Perplexity"]
    assert "Not measured." in card and "perplexity.png" not in card and "factors.png" in card
    assert "model-index" not in split_card(card).metadata


def test_card_of_scales_that_stayed_one(own: Path, manifest: Manifest) -> None:
    write(own, dataclasses.replace(manifest, changed=[]), source_card=None)
    assert "**no tensor differs**" in card_of(own)
    assert "perplexity.png" in card_of(own) and "factors.png" not in card_of(own)


def test_card_says_where_its_table_is_worse_and_where_no_length_was_seen(own: Path, manifest: Manifest) -> None:
    table = dataclasses.replace(
        PERPLEXITY, converted={length: value + 1 for length, value in PERPLEXITY.base.items()}
    )
    write(own, dataclasses.replace(manifest, perplexity=table), source_card=None)
    assert "**By its own table it is worse than the source at every length.**" in card_of(own)
    write(own, manifest, source_card=None)
    assert "By its own table" not in card_of(own) and "for text of up to 8k tokens" in card_of(own)
    assert manifest.calibration is not None
    blind = dataclasses.replace(manifest.calibration, method="winsorize", target_len=None)
    write(own, dataclasses.replace(manifest, calibration=blind), source_card=None)
    card = card_of(own)
    assert "by winsorize, which reads no text and knows of no length" in card and "for text of up to" not in card
    assert "tiny-scaled-hf" in card


@pytest.mark.parametrize(
    ("base", "converted", "is_worse"),
    [
        ((40.0, 50.0), (41.0, 51.0), True),
        ((40.0, 50.0), (41.0, 50.0), False),
        ((40.0, math.inf), (41.0, 60.0), False),
        ((40.0, math.nan), (41.0, 60.0), False),
        ((40.0, 50.0), (41.0, math.nan), True),
        ((40.0, math.inf), (41.0, math.inf), True),
    ],
)
def test_worse_is_worse_at_every_length(
    manifest: Manifest, base: tuple[float, float], converted: tuple[float, float], is_worse: bool
) -> None:
    table = dataclasses.replace(
        PERPLEXITY, base=dict(zip("12", base, strict=True)), converted=dict(zip("12", converted, strict=True))
    )
    assert dataclasses.replace(manifest, perplexity=table).is_worse == is_worse


def test_manifest_with_infinite_perplexity_is_json_and_read_again(tmp_path: Path, manifest: Manifest) -> None:
    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert manifest.perplexity is not None
    base = {**manifest.perplexity.base, "8192": math.inf}
    infinite = dataclasses.replace(manifest, perplexity=dataclasses.replace(manifest.perplexity, base=base))
    path = infinite.write(tmp_path)
    json.loads(path.read_text(), parse_constant=no_number)
    again = Manifest.read(tmp_path)
    assert again is not None and again.perplexity == infinite.perplexity


def test_sliding_window_stands_in_the_table_and_memory_in_the_limits(own: Path, manifest: Manifest) -> None:
    table = dataclasses.replace(PERPLEXITY, sliding=33.5, sliding_window=512)
    card = make_card(own, dataclasses.replace(manifest, perplexity=table, memory=MEMORY), source_card=None).text
    assert "| any, sliding window of 512 | 33.50 |" in card
    assert "at most 4k tokens back" in card.partition("## Limits")[2]
    without = make_card(own, dataclasses.replace(manifest, memory=None), source_card=None).text
    assert "sliding" not in without and "**Memory**" not in without


def test_infinite_perplexity_is_shown_and_left_out_of_the_metadata(own: Path, manifest: Manifest) -> None:
    table = dataclasses.replace(PERPLEXITY, base={**PERPLEXITY.base, "32768": float("inf")})
    write(own, dataclasses.replace(manifest, perplexity=table), source_card=None)
    assert "| 32k | inf | **41.97** | n/a |" in card_of(own)
    [source, _] = split_card(card_of(own)).metadata["model-index"]
    assert len(source["results"][0]["metrics"]) == 2


def test_power_and_notes(own: Path, manifest: Manifest) -> None:
    write(own, dataclasses.replace(manifest, notes=["A | note with *stars*."]), source_card=None)
    assert r"- A \| note with \*stars\*." in card_of(own)
    write(own, dataclasses.replace(manifest, form="power"), source_card=None)
    assert "written as `A_log · s`" in card_of(own)


@pytest.mark.parametrize(
    ("source", "target_len", "name"),
    [
        ("state-spaces/mamba2-2.7b", 32768, "mamba2-2.7b-32k-hf"),
        ("state-spaces/mamba-130m-hf", 32768, "mamba-130m-32k-hf"),
        ("demo:mamba", 8192, "demo-mamba-8k-hf"),
        ("my model (old)", 1000, "my-model-old-1000-hf"),
        ("bob/tiny", None, "tiny-scaled-hf"),
    ],
)
def test_names(source: str, target_len: int | None, name: str) -> None:
    assert converted_name(source, target_len) == name


# What it keeps


def test_same_run_same_bytes(own: Path, manifest: Manifest) -> None:
    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in [own / "README.md", *(own / "mmod").iterdir()]}

    make_card(own, manifest, source_card=SOURCE_CARD, repo_id="alice/tiny").write(own)
    first = written()
    make_card(own, manifest, source_card=SOURCE_CARD, repo_id="alice/tiny").write(own)
    assert written() == first
    make_card(own, manifest, source_card=None).write(own)
    assert written() == first


def test_hand_made_text_and_metadata_stay(own: Path, manifest: Manifest) -> None:
    write(own, manifest, source_card=SOURCE_CARD)
    card = card_of(own)
    by_hand = {
        "name": "mine",
        "results": [{"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": []}],
    }
    front = split_card(card)
    metadata = {**front.metadata, "license": "apache-2.0", "widget": [{"text": "Hi"}]}
    metadata["tags"] = ["mine", *metadata["tags"]]
    metadata["model-index"] = [*metadata["model-index"], by_hand]
    body = front.body.replace(END, f"{END}\n\n## Between").replace("<!-- mmod:begin", "Above\n\n<!-- mmod:begin")
    body = re.sub(r"## Perplexity", "## Scribbled over", body)
    (own / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n{body}\n## Below\n")
    write(own, manifest, source_card=None)
    card = card_of(own)
    found = headings(split_card(card).body)
    assert found[0] == "tiny-8k-hf" and found[-1] == "Below"
    assert found.index("Between") == found.index("Citation") + 1
    assert split_card(card).body.strip().startswith("Above\n")
    assert "Scribbled over" not in found
    kept = split_card(card).metadata
    assert kept["license"] == "apache-2.0" and kept["widget"] == [{"text": "Hi"}] and kept["tags"][0] == "mine"
    assert kept["tags"].count("mamba") == 1
    assert [entry["name"] for entry in kept["model-index"]] == ["bob/tiny", "tiny-8k-hf", "mine"]


def test_comments_in_untouched_front_matter_stay(own: Path, manifest: Manifest) -> None:
    write(own, manifest, source_card=SOURCE_CARD)
    card = card_of(own).replace("license: mit", "license: mit  # as the source")
    (own / "README.md").write_text(card)
    write(own, manifest, source_card=None)
    assert card_of(own) == card


@pytest.mark.parametrize(
    "content",
    [
        SOURCE_CARD.encode(),
        SOURCE_CARD.replace("\n", "\r\n").encode(),
        *(f"{SOURCE_CARD}# été".encode(encoding) for encoding in ("cp1252", "utf-16", "utf-16-be", "utf-8-sig")),
    ],
)
def test_copied_source_card_is_no_hand_made_text(own: Path, manifest: Manifest, content: bytes) -> None:
    (own / "README.md").write_bytes(content)
    write(own, manifest, source_card=card_text(content))
    assert headings(split_card(card_of(own)).body)[-1] == "Citation"
    assert split_card(card_of(own)).metadata["license"] == split_card(SOURCE_CARD).metadata["license"]
    assert b"\r" not in (own / "README.md").read_bytes()


def test_card_written_before_the_first_run_is_kept(own: Path, manifest: Manifest) -> None:
    (own / "README.md").write_text("---\nlicense: mit\n---\n# My notes\n")
    write(own, manifest, source_card=None)
    found = headings(split_card(card_of(own)).body)
    assert found[0] == "tiny-8k-hf" and found[-1] == "My notes"
    assert split_card(card_of(own)).metadata["license"] == "mit"


def test_broken_marks_are_refused(own: Path, manifest: Manifest) -> None:
    write(own, manifest, source_card=None)
    broken = card_of(own).replace(END, "")
    (own / "README.md").write_text(broken)
    with pytest.raises(OutputError, match="without its counterpart"):
        write(own, manifest, source_card=None)
    assert card_of(own) == broken


def test_conversion_of_a_conversion(own: Path, manifest: Manifest) -> None:
    write(own, manifest, source_card=SOURCE_CARD, repo_id="alice/once")
    once = card_of(own)
    source = dataclasses.replace(manifest.source, name="alice/once", composed_from={"schema_version": 1})
    again = make_card(own, dataclasses.replace(manifest, source=source), source_card=once, repo_id="alice/twice")
    found = headings(split_card(again.text).body)
    assert found[0] == "twice" and "once" not in found
    assert again.text.count("mmod/perplexity.png") == 1
    assert "itself made by this tool" in again.text
    (own / "README.md").write_text(again.text)
    kept = make_card(own, dataclasses.replace(manifest, source=source), source_card=None)
    assert kept.text == again.text


# What it survives


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("-: \n\r[]{}&*a'\"#|>%@\ufeff\x00"), max_size=40), st.booleans())
def test_any_front_matter_can_be_taken_off(text: str, closed: bool) -> None:
    card = f"---\n{text}\n---\n# Body\n" if closed else f"---\n{text}"
    front = split_card(card)
    assert isinstance(front.metadata, dict)
    assert not closed or front.body.endswith("# Body\n")


@pytest.mark.parametrize(
    ("card", "metadata", "problem"),
    [
        ("# No front matter\n", {}, ""),
        ("---\n---\n# Empty\n", {}, ""),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# Windows\r\n", {"license": "mit"}, ""),
        ("---\nlicense: [\n---\n# Broken\n", {}, "no valid YAML"),
        ("---\n- a\n- b\n---\n# List\n", {}, "no mapping"),
        ("---\nlicense: mit\n# never closed\n", {}, ""),
        ("---\ndate: 2026-13-45\n---\n", {}, "no valid YAML"),
    ],
)
def test_front_matter_quirks(card: str, metadata: dict[str, Any], problem: str) -> None:
    front = split_card(card)
    assert front.metadata == metadata
    assert problem in front.problem and bool(problem) == bool(front.problem)


def test_unusable_values_of_the_source_are_dropped(manifest: Manifest) -> None:
    source = yaml.safe_load("license: [mit]\nlanguage: no\ntags: mamba\ndatasets: [a/b, 3, a/b]\npipeline_tag: 4\n")
    metadata = card_metadata(manifest, source, "x")
    assert "license" not in metadata
    assert metadata["language"] == ["no"] and yaml.safe_load(yaml.safe_dump(metadata))["language"] == ["no"]
    assert metadata["tags"][0] == "mamba" and metadata["tags"].count("mamba") == 1
    assert metadata["datasets"] == ["a/b"] and metadata["pipeline_tag"] == "text-generation"
    assert metadata_problems(f"---\n{yaml.safe_dump(metadata)}---\n") == []


def test_source_with_broken_front_matter_is_told(own: Path, manifest: Manifest) -> None:
    listener = Listener()
    make_card(own, manifest, source_card="---\n[\n---\n# Tiny\n").write(own, listener)
    assert "no valid YAML" in listener.warnings[0]


def test_odd_present_metadata_survives_merging() -> None:
    generated = {"tags": ["a"], "model-index": [{"name": "x", "results": []}], "license": "mit"}
    present: dict[str, Any] = {"tags": [{"odd": 1}, "a"], "model-index": ["?", {"results": 3}], "other": None}
    assert merged(generated, present) == {
        "tags": [{"odd": 1}, "a"],
        "model-index": [{"name": "x", "results": []}],
        "license": "mit",
        "other": None,
    }


# The command


def test_card_command_writes_anew(own: Path, manifest: Manifest) -> None:
    manifest_file = own / "mmod.json"
    manifest_file.unlink()
    manifest.write(own)
    (own / "README.md").write_text("# Mine\n")
    done = CliRunner().invoke(app, ["card", str(own), "--repo-id", "alice/here", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"cards": [str(own / "README.md")]}
    assert 'from_pretrained("alice/here")' in card_of(own) and "# Mine" in card_of(own)
    CliRunner().invoke(app, ["card", str(own)])
    assert 'from_pretrained("alice/here")' in card_of(own)


# Where it is served


def test_use_has_the_line_of_every_server_that_knows_the_architecture(own: Path, manifest: Manifest) -> None:
    served = dataclasses.replace(manifest, entries={"max_position_embeddings": 32768})
    write(own, served, source_card=None, repo_id="alice/tiny")
    use = section_of(card_of(own), "Use")
    for line in (
        "vllm serve alice/tiny --max-model-len 32768 --mamba-ssm-cache-dtype float32",
        "python -m sglang.launch_server --model-path alice/tiny --context-length 32768 --mamba-ssm-dtype float32",
        "llama-server -m model.gguf -c 32768",
        "mlx_lm.server --model model-mlx",
    ):
        assert line in use
    assert "keep the SSM state in float32. Rounded to bfloat16 or float16 after every 256 tokens" in use
    assert "multi-token prediction: together with prefix caching" in use
    assert not re.search(r"--speculative|--enable-prefix-caching", use)
    assert "The length that servers read was raised: `max_position_embeddings` (32,768)." in card_of(own)
    assert "llama.cpp, mlx-lm: was run on converted models of this architecture." in use
    assert "vLLM, SGLang: was not run here, its source was read." in use
    assert "`intermediate_size`, `time_step_limit` and `time_step_rank`" in use
    mamba = dataclasses.replace(manifest.source, model_type="mamba")
    write(own, dataclasses.replace(manifest, source=mamba), source_card=None)
    use = section_of(card_of(own), "Use")
    assert "mlx_lm.convert" in use and "time_step_rank" not in use
    assert "vLLM, SGLang, mlx-lm: was not run here, its source was read." in use
    unknown = dataclasses.replace(manifest.source, model_type="zamba")
    write(own, dataclasses.replace(manifest, source=unknown), source_card=None)
    assert not re.search("vllm|sglang|llama|mlx|SSM state", section_of(card_of(own), "Use"))


@pytest.mark.parametrize(
    ("quantisation", "library", "there", "not_there"),
    [
        ("gguf", "gguf", ["llama-server -m model.gguf", "stored as F32"], ["from_pretrained", "vllm", "mlx"]),
        ("mlx", "mlx", ["mlx_lm.server --model alice/tiny"], ["from_pretrained", "vllm", "llama-server"]),
        ("compressed-tensors", "transformers", ["from_pretrained", "vllm serve"], ["llama-server", "mlx"]),
    ],
)
def test_card_of_a_quantised_copy(
    own: Path, manifest: Manifest, quantisation: str, library: str, there: list[str], not_there: list[str]
) -> None:
    copy = dataclasses.replace(manifest.source, name="carol/tiny-4bit", quantisation=quantisation)
    write(
        own,
        dataclasses.replace(manifest, source=copy, scales_of=manifest.source),
        source_card=None,
        repo_id="alice/tiny",
    )
    card = card_of(own)
    assert metadata_problems(card) == []
    metadata = split_card(card).metadata
    assert metadata["base_model"] == ["carol/tiny-4bit", "bob/tiny"]
    assert (metadata["base_model_relation"], metadata["library_name"]) == ("quantized", library)
    assert "The factors were found on [bob/tiny]" in card
    use = section_of(card, "Use") + section_of(card, "Limits")
    assert all(words in use for words in there) and not any(words in use for words in not_there), use


def section_of(card: str, heading: str) -> str:
    """The text below one heading of the second level."""
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
