"""Names are data: in no format does one become a command, a cell, an element or a formula."""

from __future__ import annotations

import csv as readers
import io
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvbench.render import Column, Document, Table, all_renderers, csv, markdown, render, text

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
    shown = text.table([Column(("a",)), Column(("b",))], rows)

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
    lines = markdown.table(Table("", [Column(("a",)), Column(("b",))], rows))

    assert len("\n".join(lines).splitlines()) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
    assert "<" not in "\n".join(lines)


@given(st.lists(names, min_size=1, max_size=5))
def test_a_spreadsheet_runs_nothing(values):
    """
    No text begins as a formula does, and a reader finds as many rows and cells as there were; numbers stay numbers.
    """
    written = csv.render(Document(rows=[{"a": value, "b": -0.5} for value in values], fields=["a", "b"]))
    _, *rows = readers.reader(io.StringIO(written))

    assert [row[1] for row in rows] == ["-0.5"] * len(values)
    assert not any(row[0].lstrip(" ").startswith(("=", "@", "+", "-", "\t", "\r")) for row in rows)


DOCUMENT = Document(
    "caches",
    [
        Table(
            "toy",
            [Column(("dtype",), numeric=False), Column(("bits/", "value"))],
            [["int4", "4.50"]],
            ["few"],
            ["on a CPU"],
        )
    ],
    "a look",
    "bits are true bits",
    ["1 cell done"],
    [{"dtype": "int4", "bits": 4.5, "peers": {"sdpa": 1.5}, "samples": []}],
    ["dtype", "bits", "peers"],
)
SHOWN = {
    "table": """toy
few
        bits/
dtype   value
─────────────
int4     4.50
on a CPU

bits are true bits
1 cell done
""",
    "md": """# caches

a look

## toy

**few**

| dtype | bits/value |
|:---|---:|
| int4 | 4.50 |

on a CPU@@

bits are true bits

- 1 cell done
""".replace("@", " "),
    "csv": """dtype,bits,peers
int4,4.5,"{""sdpa"": 1.5}"
""",
    "json": """[
 {
  "dtype": "int4",
  "bits": 4.5,
  "peers": {
   "sdpa": 1.5
  },
  "samples": []
 }
]
""",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_document_in_each_format(name):
    """
    People get title, tables, legend and notes; programs the rows, of which a table has those fields that it can hold.
    """
    assert render(DOCUMENT, name) == SHOWN[name]


@pytest.mark.parametrize("name", all_renderers())
def test_a_document_may_be_empty(name):
    """
    A document of nothing is text that ends its line, in every format of the folder.
    """
    assert render(Document(), name).endswith("\n")
