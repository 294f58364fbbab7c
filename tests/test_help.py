"""What the help texts show: verbs in the order of need, the options most people use, types as choices."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from converter import __version__
from converter.commands.cli import app, convert_app


def shown(*words: str, main: bool = False) -> str:
    done = CliRunner(env={"COLUMNS": "140", "TERM": "dumb"}).invoke(app if main else convert_app, words)
    assert done.exit_code == 0, done.output
    return done.output


def options(text: str) -> set[str]:
    return set(re.findall(r"^[│|\s*]+(--[\w-]+)", text, re.MULTILINE))


def test_verbs_stand_in_the_order_of_need() -> None:
    verbs = re.findall(r"^[│|]\s(\w+)\s{2,}", shown("--help", main=True), re.MULTILINE)
    assert verbs == [
        "convert",
        "demo",
        "diagnose",
        "ask",
        "evaluate",
        "bake",
        "verify",
        "inspect",
        "push",
        "card",
        "report",
    ]


def test_help_shows_what_most_people_use_and_help_all_the_rest() -> None:
    few, all_of_them = options(shown("--help")), options(shown("--help-all"))
    assert {"--output", "--target-len", "--data", "--method", "--push", "--help-all"} < few
    assert len(few) <= 23 and not few & {"--lr", "--probes", "--yes-overwrite", "--memory"}
    assert len(all_of_them) > 40 and few < all_of_them


def test_types_are_choices_and_lengths() -> None:
    text = shown("--help-all")
    assert re.search(r"--target-len\s+LENGTH", text) and "<linear|power>" in text
    assert "<str>" not in text.partition("Options")[2]


def test_every_option_is_shown_by_its_one_name() -> None:
    push, bake = shown("push", "--help", main=True), shown("bake", "--help-all", main=True)
    assert "--push-revision" not in push and re.search(r"--revision\s+REVISION", push)
    assert "--proof,--proof" not in bake and re.search(r"--proof\s+--no-proof", bake)
    assert re.search(r"--output\s+-o\s+FILE\s+HTML file", shown("report", "--help", main=True))


@pytest.mark.parametrize("main", [True, False])
def test_version_comes_from_one_place(main: bool) -> None:
    assert shown("--version", main=main) == f"mmod-convert {__version__}\n"
