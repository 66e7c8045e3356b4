"""One page that works from disk: tables that sort and filter, pictures, nothing fetched, no text taken for code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from kvbench.render.document import Bar, Cell, Document, Plot, Prose, Renderer, Section, Table
from kvbench.render.text import bound, seen
from kvbench.results import plain_json

WIDE = 45  # characters; a longer text takes several lines
FILTERED = 8  # rows; a shorter table is seen whole, and needs no filter


def plain(value: object) -> str:
    """A text that a browser shows as it is: no element, entity or attribute begins in it."""
    return escape(seen(value))


def data(value: Any) -> str:
    """A value as JSON that cannot end the script element that it is in; texts as `plain` has them."""
    text = json.dumps(_shown(plain_json(value)), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {seen(name): _shown(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, float):  # more digits are not known, and the last ones are another scipy's
        return float(f"{value:.6g}")
    return seen(value) if isinstance(value, str) else value


def render(document: Document) -> str:
    """The page."""
    sections = [*document.sections]
    if document.notes:
        sections.append(Prose("Notes", document.notes))
    plots = [one for one in sections if isinstance(one, Plot)]
    kept = {
        "plots": {f"s{place}": _views(one) for place, one in enumerate(sections) if isinstance(one, Plot)},
        "details": {
            f"s{place}": one.details for place, one in enumerate(sections) if isinstance(one, Table) and one.details
        },
    }
    scripts = [_file("plot.min.js")] if plots else []
    scripts.append(_file("page.js"))
    # what was not written here does not run, even if a text were taken for an element
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    title = plain(document.title or "kvbench")
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{title}</title>",
        f"<style>\n{_file('page.css')}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{title}</h1>",
        *([f"<p>{plain(document.lead)}</p>"] if document.lead else []),
        *_contents(sections),
        "</header>",
        "<main>",
        *(line for place, one in enumerate(sections) for line in _section(f"s{place}", one)),
        *([f'<p class="legend">{plain(document.legend)}</p>'] if document.legend else []),
        "</main>",
        f'<script type="application/json" id="data">{data(kept)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _file(name: str) -> str:
    return files("kvbench.render").joinpath("page", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _contents(sections: list[Section]) -> list[str]:
    named = [(place, one.title) for place, one in enumerate(sections) if one.title]
    if len(named) < 3:
        return []
    links = "".join(f'<li><a href="#s{place}">{plain(title)}</a></li>' for place, title in named)
    return [f'<nav aria-label="Contents"><ul>{links}</ul></nav>']


def _section(name: str, one: Section) -> Iterator[str]:
    yield f'<section id="{name}">'
    if one.title:
        yield f"<h2>{plain(one.title)}</h2>"
    if isinstance(one, Prose):
        yield from _prose(one)
    elif isinstance(one, Plot):
        yield from _plot(one)
    else:
        yield from _table(one)
    yield "</section>"


def _prose(one: Prose) -> Iterator[str]:
    if one.copy:
        text = "\n".join(one.lines)
        yield f'<button type="button" class="copy" hidden>copy</button><pre tabindex="0">{plain(text)}</pre>'
    elif len(one.lines) == 1:
        yield f"<p>{_sentence(one.lines[0], one.leads)}</p>"
    else:
        yield f"<ul>{''.join(f'<li>{_sentence(line, one.leads)}</li>' for line in one.lines)}</ul>"


def _sentence(line: str, leads: bool = False) -> str:
    """A line whose numbers keep their units, with what stands in backticks as code; what it is about stands out."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", plain(bound(line)))
    lead, colon, rest = text.partition(": ")
    return f"<strong>{lead}:</strong> {rest}" if leads and colon else text


def _notes(lines: Any) -> Iterator[str]:
    for line in lines:
        yield f'<p class="note">{_sentence(line)}</p>'


# ---- pictures


def _plot(one: Plot) -> Iterator[str]:
    first = one.views[0]
    yield f'<figure data-kind="{plain(one.kind)}">'
    names = dict.fromkeys(name for view in one.views for name in view.choice)
    picks = [(name, list(dict.fromkeys(view.choice[name] for view in one.views))) for name in names]
    picks = [(name, values) for name, values in picks if len(values) > 1]
    if picks:
        yield '<div class="tools" hidden>'
        for name, values in picks:
            options = "".join(f"<option>{plain(value)}</option>" for value in values)
            yield f'<label>{plain(name)} <select data-choice="{plain(name)}">{options}</select></label>'
        yield "</div>"
    yield '<div class="picture"></div>'
    yield '<output class="point" aria-live="polite"></output>'
    yield f'<figcaption aria-live="polite">{plain(first.says)}</figcaption>'
    yield '<details class="numbers"><summary>the numbers of this picture</summary><div class="scroll"></div></details>'
    yield "</figure>"
    yield from _notes(one.notes)


def _views(one: Plot) -> list[dict[str, Any]]:
    return [
        {
            "choice": dict(view.choice),
            "says": view.says,
            "x": vars(view.x),
            "y": vars(view.y),
            "points": [dict(point) for point in view.points],
        }
        for view in one.views
    ]


# ---- tables


def _table(one: Table) -> Iterator[str]:
    for line in one.warnings:
        yield f'<p class="warning"><strong>{plain(line)}</strong></p>'
    many = len(one.rows) > FILTERED
    if many:
        yield '<div class="tools" hidden><label>filter <input type="search" placeholder="any text"></label>'
        for place, column in enumerate(one.columns):
            values = list(dict.fromkeys(row[place] for row in one.rows)) if column.choose else []
            if len(values) > 1:
                options = "".join(f"<option>{plain(value)}</option>" for value in ("all", *sorted(values)))
                yield f'<label>{plain(_head(column.lines))} <select data-column="{place}">{options}</select></label>'
        yield '<output class="count" aria-live="polite"></output></div>'
    title = plain(one.title or "table")
    yield f'<div class="scroll{" long" if len(one.rows) > 25 else ""}" tabindex="0" role="region" aria-label="{title}">'
    yield f"<table{' class=sorts' if many else ''}><thead><tr>"
    for column in one.columns:
        kind = ' class="number"' if column.numeric else ""
        yield f'<th scope="col"{kind}>{"<br>".join(map(plain, filter(None, column.lines)))}</th>'
    yield "</tr></thead><tbody>"
    for place, row in enumerate(one.rows):
        cells = "".join(_cell(value, column.numeric) for value, column in zip(row, one.columns, strict=True))
        opens = f' data-row="{place}"' if one.details and one.details[place] else ""
        yield f"<tr{opens}>{cells}</tr>"
    yield "</tbody></table></div>"
    yield from _notes(one.notes)


def _head(lines: tuple[str, ...]) -> str:
    return " ".join(filter(None, lines)).replace("/ ", "/")


def _cell(value: str, numeric: bool) -> str:
    # a name may go on in the next line where its parts meet
    text = plain(value) if numeric else re.sub(r"(?<=[+:_])(?=\w)", "<wbr>", plain(value))
    classes, sort = ["number"] if numeric else ["wraps"] if len(value) > WIDE else [], ""
    if isinstance(value, Cell):
        if value.value is not None:
            sort = f' data-value="{value.value:.6g}"'
        if value.mark:
            text = f'<span class="mark {value.mark}">{text}</span>'
        if value.bar:
            text += _bar(value.bar)
            classes.append("with-bar")
    shown = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{shown}{sort}>{text}</td>"


def _bar(bar: Bar) -> str:
    """An interval against 0 and the margin; what lies beyond the scale ends at the edge, with an arrow."""

    def place(value: float) -> float:
        return 50 + 50 * max(-1.0, min(1.0, value / bar.scale))

    low, high = place(bar.low), place(bar.high)
    band = ""
    if bar.margin is not None:
        width = 50 * min(1.0, bar.margin / bar.scale)
        band = f'<i class="band" style="left:{50 - width:.1f}%;width:{2 * width:.1f}%"></i>'
    ends = "".join([" under" if bar.low < -bar.scale else "", " over" if bar.high > bar.scale else ""])
    return (
        f'<span class="bar{ends}" aria-hidden="true">{band}<i class="zero"></i>'
        f'<i class="reach" style="left:{low:.1f}%;width:{max(high - low, 1):.1f}%"></i>'
        f'<i class="middle" style="left:{place(bar.middle):.1f}%"></i></span>'
    )


HTML = Renderer("html", "html", render)
