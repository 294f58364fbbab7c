"""The report in a headless Chromium: at two widths, light and dark, by keyboard alone, and under axe-core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_cards.report import Proved, report_html
from tests.browser import CHROMIUM, Browser
from tests.consumers.fetch import AXE
from tests.converted_folder import MEMORY, convert
from tests.small_checkpoints import write_transformers

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

VARIANTS = pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 375), ("dark", 375)]
)
TIP = "document.getElementById('tip')"
SHOWN = f"{TIP}.hidden ? null : {TIP}.textContent"
FOCUSED = "document.activeElement.getAttribute('aria-label')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models whose names and lines are long."""
    work = tmp_path_factory.mktemp("page")
    source = str(write_transformers(work / "tiny"))
    folders = [work / "out", work / ("a-model-with-a-long-name" * 3)]
    for seed, folder in enumerate(folders):
        convert(source, folder, seed=seed, memory=MEMORY)
    proofs = (Proved(True, ("It equals.",)), Proved(False, ("It differs.",)))
    path = work / "report.html"
    path.write_text(report_html(dict(zip(folders, proofs, strict=True)), {}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@VARIANTS
def test_page_fits_and_loads_nothing(browser: Browser, page: Path, scheme: str, width: int) -> None:
    browser.open(page, width=width, height=800, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert browser.run("document.documentElement.clientWidth") <= width
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    red, *_ = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red < 40) == (scheme == "dark")
    small = "[...document.querySelectorAll('.plot text')].filter(text => text.getBoundingClientRect().height < 11)"
    assert browser.run(f"{small}.length") == 0


def test_every_chart_is_read_by_keyboard_alone(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=800, scheme="light")
    charts, seen = browser.run("document.querySelectorAll('[data-chart]').length"), []
    assert browser.run(SHOWN) is None
    for _ in range(40):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('[data-x]')"):
            seen.append(browser.run(FOCUSED))
            assert browser.run(SHOWN) == seen[-1]
        elif len(seen) == charts:
            break
    assert charts == len(seen) == 4 and browser.run(SHOWN) is None
    assert seen[0] == "tiny, as trained, 192 back, 256: 50%"
    assert seen[2] == "tiny, as trained, 256 tokens: 43.66"


def test_arrows_go_along_a_curve_and_between_curves(browser: Browser, page: Path) -> None:
    browser.open(page, width=375, height=800, scheme="dark")
    browser.run("document.querySelector('svg [data-x]').focus()")
    browser.press("ArrowRight")
    assert browser.run(SHOWN) == "tiny, as trained, 8k tokens: 44.56"
    browser.press("ArrowDown")
    assert browser.run(SHOWN) == "out, 8k tokens: 41.30, -7.3 % (95 %: -8.0 % to -6.6 %)"
    browser.press("ArrowLeft")
    assert browser.run(SHOWN).startswith("out, 256 tokens: 43.80")
    browser.press("ArrowUp")
    browser.press("ArrowUp")
    assert browser.run(FOCUSED) == "tiny, as trained, 256 tokens: 43.66"
    box = f"(({{left, right}}) => left >= 0 && right <= innerWidth)({TIP}.getBoundingClientRect())"
    assert browser.run(box)
    browser.press("Escape")
    assert browser.run(SHOWN) is None


def test_pointer_shows_a_figure_and_lines_are_copied(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=800, scheme="light")
    x, y = browser.run(
        "(point => { point.scrollIntoView(); const at = point.getBoundingClientRect();"
        "return [at.left + 4, at.top + 4]; })(document.querySelector('td[data-x]'))"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.run(SHOWN) == "tiny, as trained, 192 back, 256: 50%"
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.run(SHOWN) is None
    browser.run("document.querySelector('.copy button').click()")
    browser.run("new Promise(done => setTimeout(done, 200))")
    button, line = (
        browser.run(f"document.querySelector('.copy {name}').textContent") for name in ("button", "pre")
    )
    assert button in ("Copied", "Selected")
    assert button == "Copied" or browser.run("getSelection().toString()") in ("", line)


@VARIANTS
@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: make consumers")
def test_nothing_stands_in_the_way_of_anyone(browser: Browser, page: Path, scheme: str, width: int) -> None:
    browser.open(page, width=width, height=800, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    browser.run(AXE.read_text(encoding="utf-8") + "; null")
    found = browser.run("axe.run(document).then(({violations}) => JSON.stringify(violations))")
    assert found == "[]"
    assert browser.run("axe.run(document).then(({passes}) => passes.length)") > 20
