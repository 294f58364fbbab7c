"""The pages of docs/: their Python runs, their commands and options exist, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from calibrator import skills, validation
from calibrator.methods import floor, gradient
from converter.commands.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in blocks(page, "python"):
        exec(compile(example, page.name, "exec"), names)
    if page.stem == "api":
        record = names["record"]
        assert isinstance(record, dict)
        assert [entry["model"] for entry in record["models"]] == ["demo", "demo-scaled"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page_exist(page: Path) -> None:
    text = page.read_text()
    lines = "".join(blocks(page, "sh")).splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = False
    for line in lines:
        words = shlex.split(line.partition("#")[0])
        if "mmod" not in words or words[words.index("mmod") :][1:2] in ([], ["COMMAND"]):
            continue
        verb, *rest = words[words.index("mmod") + 1 :]
        if verb == "--install-completion":
            continue
        options = {
            name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in rest if word.startswith("--")} <= options | {"--help"}, line
        found = True
    assert found or page.stem in ("method",)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_sites_navigation() -> None:
    assert set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) == {
        page.name for page in PAGES
    }


def test_numbers_of_the_method_are_the_codes() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    for said in (
        f"τ = {floor.START_TAU:.0f} T where",
        f"up to {gradient.STREAM_TARGETS} times the target length",
        f"pieces of {gradient.PIECE_TRAIN_LENS} training lengths",
        f"{gradient.SHORT_ANSWERS:.0f}\\, \\mathrm{{mean}}_{{answers}}(KL)",
        f"λ is {gradient.SHORT_WEIGHT:.0f}",
        f"one in {gradient.PLANT_EVERY} tokens",
        f"to {gradient.FARTHEST_TRAIN_LENS} T tokens behind",
        f"{skills.ERROR_RATE:.0%} shared".replace("%", " %"),
        f"found in {validation.RETREATS} halvings",
    ):
        assert said in text, said


@pytest.mark.parametrize("folder", ["converter", "calibrator", "hub_cards", "benchmarks", "tests"])
def test_map_of_the_files_says_what_each_says_of_itself(folder: str) -> None:
    """CONTRIBUTING.md has a line for each module: the first paragraph of its docstring."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition(f"### `{folder}/`")[2].partition("\n### ")[0]
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", section, re.MULTILINE))
    told = {
        path.relative_to(ROOT / folder).as_posix(): " ".join(docstring.split("\n\n")[0].split())
        for path in (ROOT / folder).rglob("*.py")
        if (folder != "tests" or not path.name.startswith("test_"))
        and (docstring := ast.get_docstring(ast.parse(path.read_text())))
    }
    assert {name: line.replace("\\|", "|") for name, line in listed.items()} == told
