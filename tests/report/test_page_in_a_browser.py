"""The committed pages in a real Chromium: nothing fails, what can be clicked works, all fits the screen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"
PAGES = sorted(path.parent.name for path in RESULTS.glob("*/report.html"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        # as root, as CI is, Chromium runs without its sandbox only
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page from disk, offline; its errors and requests are kept."""
    opened = []

    def visit(name, width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(tab)
        tab.context.set_offline(True)
        tab.faults, tab.fetched = [], []
        tab.on("console", lambda line: tab.faults.append(line.text) if line.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("request", lambda request: tab.fetched.append(request.url))
        tab.goto((RESULTS / name / "report.html").as_uri())
        tab.wait_for_selector("figure svg")
        return tab

    yield visit
    for tab in opened:
        tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_a_fault(visit, name, width, scheme):
    """
    From disk, without a network, on three widths in both colours: no error, every picture drawn, no sideways scroll.
    """
    tab = visit(name, width, scheme)

    assert tab.faults == []
    assert len(tab.fetched) == 1
    assert tab.locator("figure").count() == tab.locator("figure .picture > svg:first-child").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def rows(tab, title):
    return tab.locator(f"section:has(h2:text-is('{title}')) tbody tr:visible")


def test_the_main_table_is_filtered_and_sorted(visit):
    """
    A word and a choice leave the rows that have both; a head's button sorts by number, then the other way, and says so.
    """
    tab = visit("qwen")
    section = tab.locator("section:has(h2:text-is('Every comparison'))")
    everything = rows(tab, "Every comparison").count()
    section.locator("input").fill("worse int4_per_token_head")
    section.locator("label:has-text('task') select").select_option("gsm8k")
    left = rows(tab, "Every comparison").all_inner_texts()

    assert 0 < len(left) < everything
    assert all("WORSE" in row and "int4_per_token_head" in row and "gsm8k" in row for row in left)
    assert section.locator(".count").inner_text() == f"{len(left)} of {everything} rows"

    section.locator("input").fill("")
    section.locator("label:has-text('task') select").select_option("all")
    head = section.locator("th:has-text('difference')")
    for direction, backwards in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = [
            float(one)
            for one in section.locator("td:nth-child(2)").evaluate_all("all => all.map(d => d.dataset.value)")
        ]
        assert values == sorted(values, reverse=backwards)


def test_a_picture_is_chosen_and_read_by_keyboard(visit):
    """
    Another metric draws another picture and says what is in it; Tab reaches its points, arrows go through them.
    """
    tab = visit("qwen")
    figure = tab.locator("section:has(h2:text-is('Size against loss')) figure")
    before = figure.locator("figcaption").inner_text()
    figure.locator("select").select_option("gsm8k exact_match,strict-match")

    assert figure.locator("figcaption").inner_text() != before
    assert "gsm8k" in figure.locator("figcaption").inner_text()
    assert figure.locator("svg").first.get_attribute("aria-label") == figure.locator("figcaption").inner_text()

    figure.locator("select").focus()
    tab.keyboard.press("Tab")
    first = figure.locator("output").inner_text()
    tab.keyboard.press("ArrowRight")
    second = figure.locator("output").inner_text()
    assert "bits" in first
    assert "bits" in second
    assert first != second

    figure.locator("summary").click()
    assert figure.locator(".numbers li").count() == figure.locator("svg [role=img]").count()


def test_flipped_answers_open_and_close(visit):
    """
    A scheme's button puts its documents below the row, with both answers, and takes them away again.
    """
    tab = visit("qwen")
    button = tab.locator("section:has(h2:text-is('Answers that flipped')) button.opens").first
    assert tab.locator("tr.detail").count() == 0
    button.click()

    assert button.get_attribute("aria-expanded") == "true"
    assert tab.locator("tr.detail dl").count() > 1
    assert {"right", "wrong"} <= {one.rpartition(": ")[2] for one in tab.locator("tr.detail dt").all_inner_texts()}
    button.click()
    assert tab.locator("tr.detail").count() == 0


def test_words_stand_out_from_the_paper(visit):
    """
    In both colours every text has a contrast of 4.5 : 1 to what is behind it, as WCAG AA asks.
    """
    for scheme in ("light", "dark"):
        faint = visit("qwen", scheme=scheme).evaluate(
            """() => {
              const parts = (text) => text.match(/[\\d.]+/g).map(Number);
              const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
                .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
              const behind = (one) => {
                for (let at = one; at; at = at.parentElement) {
                  const rgb = parts(getComputedStyle(at).backgroundColor);
                  if (rgb.length < 4 || rgb[3] > 0) return rgb;
                }
              };
              const found = new Set();
              const texts = "h1, h2, p, li, a, td, td .mark, th button, summary, figcaption, label";
              for (const one of document.querySelectorAll(texts)) {
                const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))];
                const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                if (contrast < 4.5) found.add(`${one.tagName}.${one.className} ${contrast.toFixed(2)}`);
              }
              return [...found];
            }"""
        )
        assert faint == []


def test_a_page_prints(visit):
    """
    On paper no control is left, and the whole of every table is there.
    """
    tab = visit("qwen")
    tab.emulate_media(media="print")

    assert tab.locator(".tools:visible, nav:visible").count() == 0
    assert tab.locator(".scroll.long").first.evaluate("one => one.scrollHeight <= one.clientHeight + 1")
    assert len(tab.pdf(format="A4")) > 20_000
