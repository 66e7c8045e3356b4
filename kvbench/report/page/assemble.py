"""A run folder's page, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvbench.render import Document, Section, View
from kvbench.report.page import answer, lists, pictures
from kvbench.report.page.found import Found
from kvbench.report.tables import LEGEND, Report
from kvbench.results import NotARunError


def page(report: Report, texts: Mapping[str, Mapping[str, str]] | None = None) -> Document:
    """The document of a page; texts: of documents by their hash, as `lists.flipped` takes them."""
    plain = report.document()
    found = _found(report)
    if found is None:
        drawn = pictures.speed(report.kernels)
        return replace(plain, sections=[*([drawn] if drawn else []), *plain.sections])
    told = answer.answer(found)
    parts: list[Section | None] = [
        replace(told, lines=[*told.lines, *filter(None, [lists.gain_line(found)])]),
        answer.cautions(found),
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
        *plain.tables,
        lists.environment(found),
        lists.again(report.run),
    ]
    return Document(plain.title, [part for part in parts if part], plain.lead, LEGEND, plain.notes)


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
