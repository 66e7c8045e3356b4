"""Text in a terminal: tables as wide as they need to be, and names that cannot move the cursor."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvbench.render.document import Document, Renderer

# what a terminal obeys instead of showing it: controls but line ends and tabs, and what turns the writing's direction
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def seen(text: object) -> str:
    r"""The text with each character that a terminal would obey written out, as `\x1b`."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def cell(text: object) -> str:
    """A text as one line of a table."""
    return seen(text).replace("\n", "\\n").replace("\t", "\\t")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table as wide as it needs to be, whatever the terminal: a value that is cut short is a wrong value.

    headers: a line break in one begins another line of it. numeric: columns that are set to the right.
    """
    heads = [header.split("\n") for header in headers]
    depth = max(map(len, heads)) if any(headers) else 0
    lines = [[*[""] * (depth - len(head)), *map(cell, head)] for head in heads]
    head_rows = [[line[level] for line in lines] for level in range(depth)]
    body = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*head_rows, *body, strict=True)]

    def joined(row: Sequence[str]) -> str:
        cells = [
            value.rjust(width) if index in numeric else value.ljust(width)
            for index, (value, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "   ".join(cells).rstrip()

    rule = ["─" * (sum(widths) + 3 * (len(widths) - 1))] if head_rows else []
    return "\n".join([*map(joined, head_rows), *rule, *map(joined, body)])


def render(document: Document) -> str:
    """Every table with its title, warnings and notes; then what the signs mean, and the notes."""
    lines: list[str] = []
    for one in document.sections:
        numeric = [place for place, column in enumerate(one.columns) if column.numeric]
        heads = ["\n".join(column.lines) for column in one.columns]
        lines += [seen(line) for line in (one.title, *one.warnings) if line]
        lines += [table(heads, one.rows, numeric), *map(seen, one.notes), ""]
    lines += [seen(line) for line in (document.legend, *document.notes) if line]
    return "\n".join(lines).rstrip("\n") + "\n"


TEXT = Renderer("table", "txt", render)
