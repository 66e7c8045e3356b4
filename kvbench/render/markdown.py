"""Text in a Markdown file, whose readers also take HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvbench.render import text

# what Markdown or HTML would take for its own anywhere in a line: an escape, code, emphasis, the end of a cell, an
# element, an entity, a link. `_` between letters is none, and [ ] around an interval neither
MARKS = re.compile(r"[\\`*|<]|&(?=#?\w+;)|(?<=\])[(\[:]|!(?=\[)")
ENTITIES = {"&": "&amp;", "<": "&lt;"}


def plain(value: object) -> str:
    """A name or a message on one line that is shown as it is: no cell, link, emphasis or element begins in it."""
    line = " ".join(text.seen(value).split("\n"))
    return MARKS.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), line)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> list[str]:
    """The lines of a table; the columns of `numeric` are set to the right."""
    rule = "|".join("---:" if index in numeric else ":---" for index in range(len(headers)))
    names = [header.replace("\n", " ") for header in headers]
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (names, *rows)]
    return [lines[0], f"|{rule}|", *lines[1:]]
