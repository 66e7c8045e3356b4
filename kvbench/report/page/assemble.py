"""A run folder's page, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvbench.render import Document, Section, Table, View
from kvbench.report.page import answer, lists, pictures
from kvbench.report.page.found import Found
from kvbench.report.tables import LEGEND, Report
from kvbench.results import NotARunError

COST = " · cost"


def page(report: Report, texts: Mapping[str, Mapping[str, str]] | None = None) -> Document:
    """The document of a page; texts: of documents by their hash, as `lists.flipped` takes them."""
    found = _found(report)
    # speed has a table of its own, by dtype: there a rotation has its dtype's times
    plain = (report if found is None else replace(report, kernels=[])).document()
    if found is None:
        drawn = pictures.speed(report.kernels)
        return replace(plain, sections=[*([drawn] if drawn else []), *plain.sections])
    told = answer.answer(found)
    parts: list[Section | None] = [
        replace(told, lines=[*told.lines, *lists.gain_lines(found), *filter(None, [lists.reach_line(found)])]),
        answer.cautions(found, "" if report.whole else f"{report.progress}."),
        lists.glance(found),
        pictures.pareto(found),
        pictures.forest(found),
        lists.comparisons(found),
        lists.gains(found),
        pictures.speed(found.kernels),
        pictures.positions(found),
        pictures.needles(found),
        lists.flipped(found, texts or {}),
        lists.controls(found, report.run),
        *_numbers(plain.tables),
        lists.environment(found),
        lists.again(report.run),
    ]
    return Document(plain.title, [part for part in parts if part], plain.lead, LEGEND, plain.notes)


def _numbers(tables: Sequence[Table]) -> list[Table]:
    """The plain tables, without speeds over other tasks from row to row: those look like a comparison and are none."""
    titles = [one.title for one in tables if not one.title.endswith(COST)]
    made = []
    for table in tables:
        cost, name = table.title.endswith(COST), table.title.removesuffix(COST)
        heading = "Cost of all cells" if cost else "All numbers"
        title = heading if len(titles) == 1 else f"{heading} · {name}"
        if not cost:
            made.append(replace(table, title=f"{title} · {name}" if len(titles) == 1 else title))
            continue
        kept = [place for place, one in enumerate(table.columns) if one.lines[-1] not in ("tokens/s", "s")]
        rows = [[row[place] for place in kept] for row in table.rows]
        note = "Without tokens a second: rows have other tasks and answers of other lengths. report.md has them."
        made.append(
            replace(table, title=title, columns=[table.columns[place] for place in kept], rows=rows, notes=[note])
        )
    return made


def trade_off(report: Report) -> list[View]:
    """Size against loss, the first picture of each model.

    Raises:
        NotARunError: nothing was compared that could be drawn.
    """
    found = _found(report)
    plot = pictures.pareto(found) if found else None
    if plot is None:
        raise NotARunError(f"nothing to draw: {report.folder} holds no cell that is compared with a baseline")
    return list({view.choice["model"]: view for view in reversed(plot.views)}.values())[::-1]


def _found(report: Report) -> Found | None:
    if report.compared is None:
        return None
    own = [record for record in report.records if not record.kernel]
    return Found(report.store, own, report.kernels, *report.compared)
