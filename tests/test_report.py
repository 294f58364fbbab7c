"""The report's content: its figures are the manifest's, names are harmless, proofs are told as they came out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from converter.commands.cli import app
from converter.errors import MmodError, OutputError
from converter.manifest import Manifest
from converter.scales import ScaleSet
from hub_cards.report import Proved, report_html
from tests.converted_folder import HELD_OUT_TEXT, MEMORY, PERPLEXITY, convert
from tests.small_checkpoints import write_transformers

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&"


class Page(HTMLParser):
    """The elements of a page, its text, and the tables of figures by the chart that they belong to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.heat_maps: list[list[list[str]]] = []
        self._table: list[list[str]] = []
        self._is_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        label = dict(attrs).get("aria-label") or ""
        if dict(attrs).get("role") == "region":
            self._table = self.tables.setdefault(label, [])
        elif tag == "table" and dict(attrs).get("class") == "heat":
            self._table = []
            self.heat_maps.append(self._table)
        elif tag == "tr":
            self._table.append([])
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_cell:
            self._table[-1][-1] += data

    def labels(self) -> list[str]:
        """What a person hears or reads at the points and cells of charts."""
        return [str(given["aria-label"]) for _, given in self.elements if "data-x" in given]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    convert(str(source), tmp_path / "out", memory=MEMORY, notes=["A note."])
    return tmp_path / "out"


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    dataclasses.replace(manifest, **changes).write(folder)


def page_of(*folders: Path, results: dict[Path, Any] | None = None) -> Page:
    return Page(report_html(dict.fromkeys(folders, Proved(None, ("It was not looked at.",))), results or {}))


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_figures_are_those_of_the_manifest(folder: Path) -> None:
    page = page_of(folder)
    columns, *rows = page.tables["Figures: Perplexity by length"]
    assert columns == ["tokens", "as trained", "converted"]
    assert [row[0] for row in rows] == ["256", "8k", "32k"]
    assert [float(row[1]) for row in rows] == list(PERPLEXITY.base.values())
    assert [float(row[2].split(",")[0]) for row in rows] == list(PERPLEXITY.converted.values())
    # 41.30 / 44.56 with a standard error of 0.004 of its logarithm.
    assert rows[1][2] == "41.30, -7.3 % (95 %: -8.0 % to -6.6 %)" and rows[2][2] == "41.97, -72.5 %"
    for kind in ("pass key", "random span"):
        columns, *rows = page.tables[f"Figures: Share found: {kind}"]
        assert columns[2:] == ["as trained", "converted", "sliding window of 128"]
        due = sorted((cell for cell in MEMORY.cells if cell.kind == kind), key=lambda c: (c.length, c.distance))
        assert [row[2:] for row in rows] == [
            [f"{c.base:.0%}", f"{c.converted:.0%} ± {100 * c.error:.0f}", f"{c.sliding:.0%}"] for c in due
        ]
    assert ["8k", "4k", "0%", "12% ± 10", "0%"] in page.tables["Figures: Share found: pass key"]
    scales = ScaleSet.load(str(folder))
    factors = [row[1] for row in page.tables["Figures: Scale factors by layer"][1:]]
    medians = [float(np.median(scales.factors(name))) for name in sorted(scales.log_s)]
    assert [float(row.split()[0]) for row in factors] == pytest.approx(medians, rel=0.01)


def test_every_figure_of_a_table_is_a_point_of_its_chart(folder: Path) -> None:
    page = page_of(folder)
    curves = [rows for name, rows in page.tables.items() if "Perplexity" in name or "factors" in name]
    maps = [rows for name, rows in page.tables.items() if "Share found" in name]
    texts = [cell for rows in curves for row in rows[1:] for cell in row[1:]]
    texts += [cell for rows in maps for row in rows[1:] for cell in row[2:]]
    assert sorted(label.split(": ", 1)[1] for label in page.labels()) == sorted(texts)
    assert "converted, 192 back, 8k: 94% ± 10" in page.labels()


def test_charts_show_what_their_tables_say(folder: Path) -> None:
    page = page_of(folder)
    before, after, sliding = page.heat_maps[:3]
    assert before == [["text ↓ back →", "32", "192", "4k"], ["256", "", "50", ""], ["8k", "50", "25", "0"]]
    assert after[2] == ["8k", "100", "94", "12"] and sliding[2] == ["8k", "100", "0", "0"]
    classes = [given["class"] for _, given in page.elements if re.fullmatch(r"h\d", given.get("class") or "")]
    assert classes[:8] == ["h3", "h3", "h1", "h0", "h3", "h5", "h5", "h0"]
    places = [
        (float(given["cx"] or 0), float(given["cy"] or 0)) for _, given in page.elements if given.get("r") == "11"
    ]
    values = [*PERPLEXITY.base.values(), *PERPLEXITY.converted.values()]
    lengths = [int(length) for length in (*PERPLEXITY.base, *PERPLEXITY.converted)]
    xs, ys = zip(*places[: len(values)], strict=True)
    assert np.corrcoef(np.log(lengths), xs)[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(values, ys)[0, 1] == pytest.approx(-1, abs=1e-5)


def test_page_is_whole_small_and_asks_nobody(folder: Path) -> None:
    text = report_html({folder: Proved(True, ("It equals.",))}, {})
    page = Page(text)
    assert len(text) < 100_000
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert not [given for _, given in page.elements if {"src", "href", "srcset", "action"} & given.keys()]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text)
    [policy] = [given["content"] for _, given in page.elements if "http-equiv" in given]
    assert policy and policy.startswith("default-src 'none'")
    assert str(folder.parent) not in text and "mmod verify out" in page.text
    assert "A note." in page.text and "✓ proved" in page.text and "It equals." in page.text


def test_names_and_texts_are_shown_and_never_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "_")
    manifest = convert(str(source), folder, memory=dataclasses.replace(MEMORY, skills=HOSTILE))
    text = dataclasses.replace(HELD_OUT_TEXT, name=HOSTILE)
    kinds = [dataclasses.replace(cell, kind=HOSTILE) for cell in MEMORY.cells[:1]]
    change_manifest(
        folder,
        source=dataclasses.replace(manifest.source, name=HOSTILE),
        perplexity=dataclasses.replace(PERPLEXITY, text=text, passes=HOSTILE),
        memory=dataclasses.replace(MEMORY, text=text, cells=kinds),
        notes=[HOSTILE],
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    verdict = {"verdict": [HOSTILE], "model": HOSTILE, "text": {"name": HOSTILE}, "target_len": 512}
    cell = {"kind": HOSTILE, "distance": 64, "samples": 2, "is_span": False, "found": 1, "low": 0.1, "high": 0.9}
    diagnosis = {**verdict, "by_position": {"256": 5.0}, "sliding": {"window": 9, "by_position": {}}}
    page = page_of(folder, results={Path(HOSTILE): {**diagnosis, "recall": [cell]}})
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and "img" not in tags
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10 and any(HOSTILE in label for label in page.labels())


def test_several_models_share_what_is_of_their_source(source: Path, folder: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "other", seed=1, memory=MEMORY)
    (tmp_path / "again").mkdir()
    convert(str(source), tmp_path / "again" / "out", seed=2, calibration=None)
    page = page_of(folder, tmp_path / "other", tmp_path / "again" / "out")
    names = [str(folder), "other", str(tmp_path / "again" / "out")]
    assert page.tables["Figures: Perplexity by length"][0] == ["tokens", "tiny, as trained", *names]
    assert page.tables["Figures: Scale factors by layer"][0] == ["layer", *names]
    panels = page.tables["Figures: Share found: pass key"][0][2:]
    assert panels == ["tiny, as trained", *names[:2], "sliding window of 128"]
    assert "do not compare" not in page.text
    change_manifest(tmp_path / "other", perplexity=dataclasses.replace(PERPLEXITY, span_tokens=4096))
    assert "do not compare" in page_of(folder, tmp_path / "other").text


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_curve_goes_around_what_is_no_number(folder: Path, value: float) -> None:
    base = {"256": 40.0, "1024": value, "4096": 880_000.0}
    change_manifest(
        folder, perplexity=dataclasses.replace(PERPLEXITY, base=base, converted=dict.fromkeys(base, 4.0))
    )
    page = page_of(folder)
    assert ["1k", f"{value:.2f}", "4.00, n/a"] in page.tables["Figures: Perplexity by length"]
    assert not any("as trained, 1k tokens" in label for label in page.labels())
    paths = [given["d"] or "" for _, given in page.elements if given.get("class") == "curve"]
    assert all(re.fullmatch(r"M[\d. LZ-]+", path) for path in paths)


def test_one_length_and_no_measures_are_drawn_as_well(folder: Path) -> None:
    change_manifest(folder, perplexity=dataclasses.replace(PERPLEXITY, base={"256": 4.0}, converted={"256": 4.0}))
    assert page_of(folder).tables["Figures: Perplexity by length"][1:] == [
        ["256", "4.00", "4.00, +0.0 % (95 %: -0.4 % to +0.4 %)"]
    ]
    change_manifest(folder, perplexity=None, memory=None, calibration=None)
    assert list(page_of(folder).tables) == ["Figures: Scale factors by layer", "Settings: out"]


def test_command_writes_the_proof_or_why_there_is_none(source: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = run(folder, "-o", path, "--json", "-q")
    assert done.exit_code == 0 and json.loads(done.stdout)["proved"] == {str(folder): None}
    assert "Say where it is with --base." in Page(path.read_text()).text and "not checked" in path.read_text()
    done = run(folder, "--base", source, "-o", path, "--json", "-q")
    assert done.exit_code == 0 and json.loads(done.stdout)["proved"] == {str(folder): True}
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert f"{manifest.identical_tensors} are the base's bit for bit" in Page(path.read_text()).text
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    done = run(folder, "--base", source, "-o", path, "-q")
    assert done.exit_code == 1 and "✗ does not hold" in path.read_text()
    assert run(folder, "--no-proof", "-o", path, "-q").exit_code == 0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, OutputError),
        ("[]", OutputError),
        ('{"task": "perplexity"}', OutputError),
        ('{"verdict": [], "sliding": 3}', OutputError),
        (
            '{"verdict": ["x"], "model": "m", "text": {"name": "t"}, "by_position": {"a": 1}, "recall": []}',
            OutputError,
        ),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, error: type[MmodError]) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    done = run(tmp_path / "result.json", "-o", tmp_path / "report.html")
    assert isinstance(done.exception, error) and "result.json" in str(done.exception)
    assert not (tmp_path / "report.html").exists()


def test_folder_that_is_no_conversion_is_refused(source: Path, tmp_path: Path) -> None:
    done = run(source, "-o", tmp_path / "report.html")
    assert isinstance(done.exception, OutputError) and not (tmp_path / "report.html").exists()
