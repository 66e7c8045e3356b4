"""Text in a Markdown file, whose readers also take HTML."""

from __future__ import annotations

import re

from kvbench.render import text
from kvbench.render.document import Document, Renderer, Table

# what Markdown or HTML would take for its own anywhere in a line: an escape, code, emphasis, the end of a cell, an
# element, an entity, a link. `_` between letters is none, and [ ] around an interval neither
MARKS = re.compile(r"[\\`*|<]|&(?=#?\w+;)|(?<=\])[(\[:]|!(?=\[)")
ENTITIES = {"&": "&amp;", "<": "&lt;"}


def plain(value: object) -> str:
    """A name or a message on one line that is shown as it is: no cell, link, emphasis or element begins in it."""
    line = " ".join(text.seen(value).split("\n"))
    return MARKS.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), line)


def table(one: Table) -> list[str]:
    """The lines of a table."""
    heads = [" ".join(filter(None, column.lines)).replace("/ ", "/") for column in one.columns]
    rule = "|".join("---:" if column.numeric else ":---" for column in one.columns)
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (heads, *one.rows)]
    return [lines[0], f"|{rule}|", *lines[1:]]


def render(document: Document) -> str:
    """A section a table, then what the signs mean, then the notes."""
    lines = [f"# {plain(document.title)}", ""] if document.title else []
    lines += [plain(document.lead), ""] if document.lead else []
    for one in document.tables:
        lines += [f"## {plain(one.title)}", ""] if one.title else []
        lines += [line for warning in one.warnings for line in (f"**{plain(warning)}**", "")]
        lines += [*table(one), ""]
        lines += [*(f"{plain(note)}  " for note in one.notes), ""] if one.notes else []
    lines += [document.legend, ""] if document.legend else []
    return "\n".join([*lines, *(f"- {plain(line)}" for line in document.notes)]).rstrip("\n") + "\n"


MARKDOWN = Renderer("md", "md", render)
