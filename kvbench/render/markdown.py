"""Text in a Markdown file, whose readers also take HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvbench.render import text

# what Markdown or HTML would take for its own anywhere in a line; `_` stands inside our names and means nothing there
MARKS = re.compile(r"[\\`*|\[\]<>&]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(value: object) -> str:
    """A name or a message on one line that is shown as it is: no cell, link, emphasis or element begins in it."""
    return MARKS.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), text.cell(value))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> list[str]:
    """The lines of a table; the columns of `numeric` are set to the right."""
    rule = "|".join("---:" if index in numeric else ":---" for index in range(len(headers)))
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (headers, *rows)]
    return [lines[0], f"|{rule}|", *lines[1:]]
