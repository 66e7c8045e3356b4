"""Names are data: in no format does one become a command, a cell, an element or a formula."""

from __future__ import annotations

import csv as readers
import io
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvbench.render import csv, markdown, text

HOSTILE = [
    "\x1b[31mred",
    "a\r\nb",
    "a|b",
    "<img src=x onerror=alert(1)>",
    "=1+1",
    "@x",
    "+1",
    "-1",
    "[a](b)",
    "\u202egnp",
]
names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\x1b[31mred", r"\x1b[31mred"), ("a\nb", r"a\nb"), ("\u202egnp", r"\u202egnp"), ("a\x9bb", r"a\x9bb")],
)
def test_a_terminal_shows_what_it_would_obey(name, shown):
    """
    Control characters and turns of direction are written out.
    """
    assert text.cell(name) == shown


@given(st.lists(st.lists(names, min_size=2, max_size=2), min_size=1, max_size=4))
@example([["\x85", "\u2028"]])
def test_a_table_keeps_its_lines(rows):
    """
    Head, rule and one line a row, whatever the names; nothing that a terminal obeys.
    """
    shown = text.table(["a", "b"], rows)

    assert len(shown.split("\n")) == 2 + len(rows)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("[a](http://x)", r"[a]\(http://x)"),
        ("![a](x)", r"\![a]\(x)"),
        ("`x` *y*", r"\`x\` \*y\*"),
        ("&lt;", "&amp;lt;"),
        ("a\\|b", "a\\\\\\|b"),
        ("193.1 [192.0, 194.2] & more", "193.1 [192.0, 194.2] & more"),
        ("int4_per_token_head", "int4_per_token_head"),
    ],
)
def test_markdown_shows_a_name_as_it_is(name, shown):
    """
    No cell, element, link, code or emphasis begins in it; our own names and intervals stay as they were.
    """
    assert markdown.plain(name) == shown


@given(st.lists(st.lists(names, min_size=2, max_size=2), min_size=1, max_size=4))
def test_a_markdown_table_keeps_its_cells(rows):
    """
    Every line has as many cells as the head, and no element begins.
    """
    lines = markdown.table(["a", "b"], rows)

    assert len("\n".join(lines).splitlines()) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
    assert "<" not in "\n".join(lines)


@given(st.lists(names, min_size=1, max_size=5))
def test_a_spreadsheet_runs_nothing(values):
    """
    No text begins as a formula does, and a reader finds as many rows and cells as there were; numbers stay numbers.
    """
    written = csv.table(["a", "b"], [{"a": value, "b": -0.5} for value in values])
    _, *rows = readers.reader(io.StringIO(written))

    assert [row[1] for row in rows] == ["-0.5"] * len(values)
    assert not any(row[0].lstrip(" ").startswith(("=", "@", "+", "-", "\t", "\r")) for row in rows)
