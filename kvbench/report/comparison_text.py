"""How comparisons read. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from kvbench.measured import Measured, prompt_forms
from kvbench.render import Column, Document, Table
from kvbench.report.compare import Comparisons
from kvbench.report.verdicts import FIELDS, FLOOR_VERDICT, VERDICTS, Comparison
from kvbench.results import shown_number

COLUMNS = (
    Column(("dtype",), numeric=False, prose=True, group=True),
    Column(("rotation",), numeric=False, prose=True, group=True),
    Column(("task",), numeric=False, prose=True),
    Column(("metric",), numeric=False, prose=True, joins=""),
    Column(("baseline",), drop=3),
    Column(("value",), drop=2),
    Column(("difference",)),
    Column(("95 % interval",), drop=1),
    Column(("flips", "−/+"), drop=4),
    Column(("n",), drop=6),
    Column(("test",), numeric=False, drop=7),
    Column(("p (Holm)",), drop=5),
    Column(("verdict",), numeric=False, verdict=True, prose=True),
)
LEGEND = (
    "EQUIVALENT: the whole interval lies within the margin. INCONCLUSIVE (n): neither shown; so many documents would "
    "decide. A distance from the baseline itself (KL divergence, same top token) is never zero, so it has no p: WORSE "
    "where its whole interval lies beyond the margin. Flips: documents that got worse / better."
)


def tables(found: Comparisons) -> list[Table]:
    """A table a model."""
    made = []
    for model in dict.fromkeys(row.model for row in found.rows):
        of_model = [row for row in found.rows if row.model == model]
        compared = [row for row in of_model if not row.again] or of_model
        against = ", ".join(dict.fromkeys(row.against for row in compared if row.against))
        title = f"{model} against {against} · margin {found.margin}"
        made.append(Table(title, COLUMNS, [_cells(row, against) for row in of_model]))
    return made


def _cells(row: Comparison, against: str) -> list[str]:
    flips = row.test == "McNemar" or row.unit == "share"
    return [
        row.dtype,
        row.rotation,
        row.task,
        row.metric,
        _number(row.baseline),
        _number(row.value),
        shown_difference(row.difference, row.unit),
        shown_interval(row),
        f"{row.worse}/{row.better}" if flips else "-",
        _number(row.n),
        row.test or "-",
        "-" if row.p_holm is None else f"{row.p_holm:.2g}",
        shown_verdict(row) + (f" against {row.against}" if row.again and row.against != against else ""),
    ]


def shown_interval(row: Comparison) -> str:
    """Both ends in the unit of the difference, which stands beside it."""
    if row.ci_low is None or row.ci_high is None:
        return "-"
    low, high = (shown_difference(end, row.unit).partition(" ")[0] for end in (row.ci_low, row.ci_high))
    return f"[{low}, {high}]"


def shown_verdict(row: Comparison) -> str:
    """A verdict with what a reader must know of it."""
    if row.again:
        return "A/A" if row.verdict is None else f"A/A, {row.verdict}: {row.reason}"
    if row.n_to_decide:
        return f"{row.verdict} (n≥{shown_count(row.n_to_decide)})"
    return f"INVALID: {row.reason}" if row.verdict == "INVALID" else str(row.verdict)


def shown_count(count: int) -> str:
    """Two digits of a number of documents: more are not known."""
    digits = max(0, len(str(count)) - 2)
    return str(math.ceil(count / 10**digits) * 10**digits)


def shown_difference(value: float | None, unit: str) -> str:
    """A difference with its sign and unit: −2.0 pp, +6.7 %, +0.0567 nats."""
    if value is None:
        return "-"
    factor, name, digits = {"share": (100, " pp", 1), "relative": (100, " %", 2), "pp": (1, " pp", 2)}.get(
        unit, (1, f" {unit}" if unit else "", None)
    )
    size = abs(value) * factor
    text = shown_number(float(f"{size:.3g}")) if digits is None or size >= 1000 else f"{size:.{digits}f}"
    zero = float(text) == 0
    return f"{'' if zero else '−' if value < 0 else '+'}{text}{name}"


def _number(value: float | None) -> str:
    return "-" if value is None else shown_number(value)


def noise_floor(found: Comparisons) -> list[str]:
    """A line a model on the A/A cells: their flips, or how far a number moved; then one on a low-bit scheme's."""
    lines = []
    for model in dict.fromkeys(row.model for row in found.again):
        parts = []
        for row in (row for row in found.again if row.model == model and row.dtype == "again"):
            if row.verdict == "INVALID":
                parts.append(f"{row.task} {row.metric} INVALID: {row.reason}")
            elif row.unit == "share":
                parts.append(f"{row.task} {row.metric} {(row.worse or 0) + (row.better or 0)} of {row.n} flipped")
            else:
                parts.append(f"{row.task} {row.metric} {shown_difference(row.difference, row.unit)}")
        if parts:
            what = "the baseline again; other batches and seed, but for speeds"
            lines.append(f"A/A ({what}), {model}: " + "; ".join(parts))
        lines += _nudged([row for row in found.again if row.model == model and row.dtype != "again"])
    return lines


def _nudged(rows: Sequence[Comparison]) -> Iterator[str]:
    """A line on a low-bit scheme under noise of one ulp: between what its numbers lie, or how many answers flip."""
    for model, against in dict.fromkeys((row.model, row.against) for row in rows if row.verdict is None):
        places: dict[str, list[Comparison]] = {}
        for row in rows:
            if (row.model, row.against) == (model, against) and row.verdict is None:
                places.setdefault(f"{row.task} {row.metric}", []).append(row)
        parts = [f"{place} {_floor(repeats)}" for place, repeats in places.items()]
        times = max(map(len, places.values()))
        what = f"{against} again, {times} times, with one ulp of noise in the embedding"
        yield f"A/A of a quantized cache ({what}), {model}: " + "; ".join(parts)


def _floor(repeats: Sequence[Comparison]) -> str:
    if repeats[0].unit == "share":
        flipped = ", ".join(str((row.worse or 0) + (row.better or 0)) for row in repeats)
        return f"{flipped} of {repeats[0].n} flipped"
    values = [value for row in repeats for value in (row.baseline, row.value) if value is not None]
    unit = {"nats": " nats", "pp": " %"}.get(repeats[0].unit, "")
    return "–".join(dict.fromkeys((shown_number(min(values)), shown_number(max(values))))) + unit


def control_notes(measured: Measured, found: Comparisons, other: Measured | None = None) -> list[str]:
    """The noise floor, or why it is unknown."""
    if lines := noise_floor(found):
        return lines
    if other is not None:
        return [f"A/A: not shown: no such cell in {measured.path}"]
    if measured.without("again"):
        return ["A/A: turned off (again: false), so the noise floor was not measured"]
    return ["A/A: no cell, so the noise floor was not measured"]


def summary(measured: Measured, found: Comparisons, other: Measured | None = None) -> list[str]:
    """Lines below the tables; measured, other: as `compare` took them."""
    counts = {verdict: sum(row.verdict == verdict for row in found.rows) for verdict in VERDICTS}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    cells = [*measured.cells, *(other.cells if other else [])]
    environments = {cell.environment for cell in cells}
    untested = len(found.judged) - len(found.family)
    holm = f"{len(found.family)}; {untested} by their interval, without a p" if untested else "all"
    tested = f"{len(found.judged)} comparisons (Holm over {holm}): {counted}"
    tested = tested if counted else "no comparisons"
    lines = [tested, *control_notes(measured, found, other)]
    floors = dict.fromkeys(
        (row.reason, f"{row.task} {row.metric}") for row in found.rows if row.verdict == FLOOR_VERDICT
    )
    lines += [f"{FLOOR_VERDICT}: {what}: {reason}" for reason, what in floors]
    if len(environments) > 1:
        lines.append(f"cells of {len(environments)} environments: {'; '.join(sorted(environments))}")
    limits = sorted({cell.identity["limit"] for cell in cells if cell.identity.get("limit")})
    if limits:
        lines.append(f"NOT A REAL SCORE: --limit {', '.join(map(str, limits))}, the first documents of each task alone")
    forms = prompt_forms((cell.task, cell.identity.get("task", {})) for cell in measured.cells)
    return [*lines, *forms, *found.notes]


def document(measured: Measured, found: Comparisons, other: Measured | None = None) -> Document:
    """All of a comparison; measured, other: as `compare` took them."""
    shown = other or measured
    title = f"{shown.run.get('sweep') or shown.path.name}: against the baseline"
    rows = [asdict(row) for row in found.rows]
    return Document(title, tables(found), "", LEGEND, summary(measured, found, other), rows, FIELDS)
