"""Every cell against its baseline on the same documents: the difference, how sure, a verdict. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvbench.measured import Cell, Measured, Series, comparable, paired, unrun_line
from kvbench.report.verdicts import Comparison, Paired, at_floor, judge, scale_of
from kvbench.results import NotARunError
from kvbench.stats import parse_margin

DEFAULT_MARGIN = "1pp"
REASONS = 3  # of a refusal, as many as are named


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of one report; what Holm corrects for is the number of those with a p-value.

    again: the A/A cells' rows, of the first folder where there are two. notes: a line each, for a person.
    """

    rows: list[Comparison]
    again: list[Comparison]
    margin: str
    notes: list[str]

    @property
    def family(self) -> list[Comparison]:
        """The rows that were tested, without the A/A cells'."""
        return [row for row in self.rows if row.p_holm is not None]

    @property
    def judged(self) -> list[Comparison]:
        """The rows that have a verdict, by a test or by their interval."""
        return [row for row in self.rows if row.verdict not in (None, "INVALID")]

    @property
    def invalid(self) -> list[Comparison]:
        """The rows that were refused."""
        return [row for row in self.rows if row.verdict == "INVALID"]


def compare(
    measured: Measured,
    other: Measured | None = None,
    *,
    baseline: tuple[str, str] | None = None,
    margin: str | None = None,
) -> Comparisons:
    """Compares the cells of a run folder with its baseline; those of `other` with the same cells of `measured`.

    baseline: another scheme to compare with; then the cells of `other` are compared with that of `measured`.
    margin: in place of the one that the sweep fixed.

    Raises:
        NotARunError: no baseline is given, and the run folder names none: its cells would be compared with themselves.
    """
    if other is None and not (baseline or measured.baseline):
        if "baseline" in measured.run:
            raise NotARunError(
                f"{measured.path} has no baseline: its cells measure distances from one, which kvbench report shows"
            )
        raise NotARunError(
            f"{measured.path} names no baseline: its run.json is missing or broken. Give --baseline DTYPE, or start "
            "the sweep again, which writes it"
        )
    chosen = margin or measured.margin or DEFAULT_MARGIN
    like_for_like = other is not None and baseline is None
    scheme = baseline or measured.baseline
    pairs = list(_pairs(measured, other or measured, None if like_for_like else scheme))
    found: list[Comparison | Paired] = []
    notes: dict[str, None] = dict.fromkeys([*measured.problems, *(other.problems if other else [])])
    absent: dict[str, dict[str, None]] = {}  # a reason, and the metrics that it keeps from being compared
    # the first of each, where several are of one task
    canaries = {cell.key: cell for cell in reversed(measured.cells) if cell.dtype == "canary"}
    for cell, base, wrong in pairs:
        floor = canaries.get(base.key) if base else None
        for metric in dict.fromkeys([*cell.series, *cell.absent, *(base.series if base else ())]):
            if not wrong and metric in cell.absent and base and metric in base.absent:
                if cell.again and base.values.get(metric):
                    found.append(_moved(cell, base, metric))
                absent.setdefault(cell.absent[metric], {})[f"{cell.task} {metric}"] = None
                continue
            # what the sweep's distances were measured from
            origin = base is not None and base.scheme == (measured.baseline or scheme)
            found.append(_compared(cell, base, wrong, metric, floor, parse_margin(chosen), origin))
    for one in filter(None, (measured, other)):
        notes |= dict.fromkeys(unrun_line(one.unrun))
    notes |= dict.fromkeys(f"not compared, {reason}: {', '.join(what)}" for reason, what in absent.items())
    notes |= dict.fromkeys(_margin_notes(measured, other, chosen))
    rows = judge(found)
    # between two runs like for like no A/A cell is a row, but what moves by chance is the first's all the same
    noise = rows
    if like_for_like:
        noise = compare(measured, margin=chosen).rows if measured.baseline else []
    again = [row for row in noise if row.again]
    return Comparisons(rows, again, chosen, list(notes))


def _margin_notes(measured: Measured, other: Measured | None, chosen: str) -> Iterator[str]:
    """A line where the margin is not what was fixed before the cells were measured."""
    limit = parse_margin(chosen)
    if measured.margin is None:
        yield f"margin {chosen}: the sweep's YAML fixed none before it ran"
    elif parse_margin(measured.margin) != limit:
        yield f"margin {chosen} given afterwards; the sweep fixed {measured.margin}"
    if other and other.margin and parse_margin(other.margin) != limit:
        yield f"margin {chosen}; the sweep of {other.path} fixed {other.margin}"


def _pairs(
    measured: Measured, cells: Measured, scheme: tuple[str, str] | None
) -> Iterator[tuple[Cell, Cell | None, str]]:
    """(cell, the cell it is compared with, why it can't be); scheme None: the same scheme's."""
    first = _by_scheme(measured)
    own = first if cells is measured else _by_scheme(cells)
    for cell in cells.cells:
        if cell.dtype == "canary" or (cells is measured and cell.scheme == scheme) or (scheme is None and cell.control):
            continue
        # what an A/A cell repeats is of its own sweep, whatever the others are compared with
        source, bases, wanted = (cells, own, cell.repeats) if cell.again else (measured, first, scheme)
        wanted = wanted or cell.scheme
        there = bases.get((wanted, cell.task), [])
        base = next((base for base in there if base.key == cell.key), None)
        if base is None and there:  # the nearest, for the reason
            base = min(there, key=lambda base: (base.model != cell.model, len(identity_differences(cell, base))))
        if base is None:
            yield cell, None, f"{' · '.join(wanted)} has no finished cell of {cell.task} in {source.path}"
        else:
            yield cell, base, "; ".join(reasons(cell, base)[:REASONS])


def _by_scheme(measured: Measured) -> dict[tuple[tuple[str, str], str], list[Cell]]:
    """The cells by their scheme and task."""
    found: dict[tuple[tuple[str, str], str], list[Cell]] = {}
    for cell in measured.cells:
        found.setdefault((cell.scheme, cell.task), []).append(cell)
    return found


def reasons(cell: Cell, base: Cell) -> list[str]:
    """Why a cell can't be compared with another: documents that differ, then all else that decides numbers."""
    found = []
    for name, series in cell.series.items():
        if name in base.series:
            line = document_differences(series, base.series[name])
            if line and line not in found:
                found.append(line)
    return found + identity_differences(cell, base)


def document_differences(series: Series, base: Series) -> str:
    """What is not the same about the documents of two cells; empty where they are equal."""
    if series.digest == base.digest:
        return ""
    if not (series.documents and base.documents):
        return f"other documents or prompts ({len(series.values)} here, {len(base.values)} in the baseline)"
    here = {document[:3]: document[3:] for document in series.documents}
    there = {document[:3]: document[3:] for document in base.documents}
    if here.keys() != there.keys():
        return f"{len(here)} documents here, {len(there)} in the baseline, {len(here.keys() & there.keys())} in both"
    changed = [key for key in here if here[key] != there[key]]
    what = "document" if here[changed[0]][0] != there[changed[0]][0] else "prompt"
    return f"{len(changed)} of {len(here)} documents differ, first doc_id {changed[0][1]} (another {what})"


def identity_differences(cell: Cell, base: Cell) -> list[str]:
    """Each option of model, task, scoring, seed or limit in which two cells differ."""
    here, there = _flat(comparable(cell.identity)), _flat(comparable(base.identity))

    def short(value: object) -> str:
        text = str(value)
        return text if len(text) <= 24 else f"{text[:21]}…"

    lines = []
    for name in dict.fromkeys([*here, *there]):
        if here.get(name) != there.get(name):
            hint = " (weights, configuration or tokenizer)" if name == "model.revision" else ""
            lines.append(f"{name}{hint} {short(here.get(name))} here, {short(there.get(name))} in the baseline")
    return lines


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def _compared(
    cell: Cell, base: Cell | None, wrong: str, metric: str, canary: Cell | None, margin: float, origin: bool
) -> Comparison | Paired:
    row = Comparison(
        cell.model,
        cell.dtype,
        cell.rotation,
        cell.task,
        metric,
        " · ".join(base.scheme) if base else "",
        cell=cell.name,
        again=cell.again,
        task_limit=(cell.identity.get("task") or {}).get("limit"),
    )
    here = cell.series.get(metric)
    there = base.series.get(metric) if base else None
    if here:
        row = replace(row, value=here.metric.value, n=len(here.values))
    if there:
        row = replace(row, baseline=there.metric.value)
    if wrong or here is None or there is None:
        why = wrong or cell.absent.get(metric) or (base.absent.get(metric) if base else "")
        why = why or ("not measured here" if here is None else "not in the baseline")
        return replace(row, verdict="INVALID", reason=why)
    difference = paired(here, there, origin)
    unit, limit = scale_of(here, margin)
    log = here.metric.kind == "log"
    ends: list[float | None] = [_relative(end) if log else end for end in (difference.ci_low, difference.ci_high)]
    if math.isinf(difference.ci_low) or math.isinf(difference.ci_high):  # nothing says how wide
        ends = [None, None]
    worse, better = difference.worse, difference.better
    if not here.metric.higher_is_better:
        worse, better = better, worse
    row = replace(
        row,
        difference=_relative(difference.mean) if log else difference.mean,
        ci_low=ends[0],
        ci_high=ends[1],
        unit=unit,
        worse=worse,
        better=better,
        test=difference.test,
        p=difference.p,
        margin=margin if log else limit,
        higher_is_better=here.metric.higher_is_better,
    )
    floor = at_floor(there, canary.series.get(metric) if canary else None)
    return Paired(row, difference, limit, floor)


def _moved(cell: Cell, base: Cell, metric: str) -> Comparison:
    """How far a number without documents, such as a speed, moved when it was measured again."""
    here, there = cell.values[metric], base.values[metric]
    place = (cell.model, cell.dtype, cell.rotation, cell.task, metric, " · ".join(base.scheme))
    return Comparison(
        *place, baseline=there, value=here, difference=here / there - 1, unit="relative", cell=cell.name, again=True
    )


def _relative(log: float) -> float:
    return math.expm1(log) if log < 700 else math.inf
