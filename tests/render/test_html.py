"""A page shows texts as they are, runs nothing but its own scripts, and needs nothing beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from kvbench.render import Axis, Bar, Cell, Column, Document, Plot, Prose, Table, View, render

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><b>",
    "a&lt;b",
    '" onmouseover="x',
    "\u2028",
    "<!--",
    "]]>",
    "\x1b[31m",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=20))


class Reader(HTMLParser):
    """The elements of a page, and the text of those that are asked for."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.cells, self.attributes = [], [], [], []
        self.inside = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "wbr":  # where a line may break, and nothing else
            return
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        elif tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1] == "script":
            attrs, text = self.scripts.pop()
            self.scripts.append((attrs, text + data))
        elif "td" in self.inside:
            self.cells[-1] += data


def page(text):
    columns = [Column((text,), numeric=False, choose=True), Column(("n",))]
    rows = [[text, Cell(text, 1.0, Bar(-1, 0, 1, 0.5, 2), "worse")]] * 2
    view = View({"metric": text}, text, Axis(text), Axis(text, True), [{"x": 1, "y": 2, "label": text, "text": text}])
    sections = [
        Prose(text, [text], copy=True),
        Table(text, columns, rows, [text], [text], [[{text: text}], []]),
        Plot(text, "points", [view], [text]),
    ]
    return render(Document(text, sections, text, text, [text]), "html")


def seen(text):
    """The text as other renderers show it: what a terminal would obey is written out."""
    from kvbench.render.text import seen

    return seen(text)


@given(texts)
def test_no_text_becomes_code(text):
    """
    Whatever the names, a page has the elements and attributes of one with a plain name, and a cell shows the name.
    """
    plain, found = Reader(page("name")), Reader(page(text))

    assert found.tags == plain.tags
    assert set(found.attributes) <= set(plain.attributes)
    assert found.cells[0] == seen(text)


@given(texts)
def test_the_data_come_back_as_they_went_in(text):
    """
    The JSON element holds every text of the pictures and details, and does not end before its end.
    """
    attributes, data = Reader(page(text)).scripts[0]
    kept = json.loads(data)

    assert attributes["type"] == "application/json"
    assert kept["plots"]["s2"][0]["points"][0]["label"] == seen(text)


def test_only_its_own_scripts_run():
    """
    The page's policy allows the scripts in it by their hash, and nothing from elsewhere; no address is in its markup.
    """
    shown = page("name")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', shown)[1]
    own = [text for attributes, text in Reader(shown).scripts if not attributes]

    assert policy.startswith("default-src 'none';")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    assert re.findall(r"sha256-([^']+)", policy) == digests
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=", shown)


def test_a_page_of_tables_carries_no_chart_library():
    """
    A comparison or a plan is a page of some kilobytes; with a picture it has the library, and stays under 300.
    """
    table = Table("t", [Column(("a",))], [["1"]])

    assert len(render(Document("d", [table]), "html")) < 30_000
    assert 200_000 < len(page("name")) < 300_000


def test_a_sentence_says_what_it_is_about_first():
    """
    Up to its colon it stands out, what is in backticks is code, and no line breaks between a number and its unit.
    """
    lines = ["Size: `int8` takes 14 KiB <b>", "one without"]

    page = render(Document(sections=[Prose("Answer", lines, leads=True), Prose("Plain", ["a: b", "c"])]), "html")

    assert "<li><strong>Size:</strong> <code>int8</code> takes 14\xa0KiB &lt;b&gt;</li><li>one without</li>" in page
    assert "<li>a: b</li>" in page
