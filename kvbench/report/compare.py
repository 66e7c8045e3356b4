"""Every cell against its baseline on the same documents: the difference, how sure, a verdict. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from kvbench.measured import Cell, Measured, Series, comparable, paired, prompt_forms
from kvbench.registry import find_name
from kvbench.results import NotARunError, shown_number
from kvbench.stats import (
    ALPHA,
    Difference,
    documents_to_decide,
    holm,
    parse_margin,
)

Verdict = Literal["WORSE", "BETTER", "EQUIVALENT", "INCONCLUSIVE", "NOT-DISCRIMINATIVE", "INVALID"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FLOOR_VERDICT: Verdict = "NOT-DISCRIMINATIVE"
DEFAULT_MARGIN = "1pp"
FLOOR = 0.01  # a share up to this is at the floor: it has nothing to lose
REASONS = 3  # of a refusal, as many as are named


@dataclass(frozen=True)
class Comparison:
    """One metric of one cell against a baseline's.

    against: the baseline's scheme. baseline, value: of the metric; difference: value less baseline, for a perplexity
    their ratio less 1; ci_low, ci_high: its 95 % interval. unit: of the difference. worse, better: documents that
    moved. p_holm: after Holm over the whole report. margin: in the difference's unit. n_to_decide: documents that would
    decide what is INCONCLUSIVE. reason: of a verdict, where it has one. verdict: None for the A/A cell.
    """

    model: str
    dtype: str
    rotation: str
    task: str
    metric: str
    against: str
    baseline: float | None = None
    value: float | None = None
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    unit: str = ""
    worse: int | None = None
    better: int | None = None
    n: int | None = None
    test: str | None = None
    p: float | None = None
    p_holm: float | None = None
    margin: float | None = None
    n_to_decide: int | None = None
    verdict: Verdict | None = None
    reason: str = ""
    cell: str = ""
    higher_is_better: bool | None = None

    @property
    def again(self) -> bool:
        """Whether this is the A/A cell, whose flips are the noise floor."""
        return self.dtype == "again"


COLUMNS = tuple(Comparison.__dataclass_fields__)


@dataclass(frozen=True)
class _Paired:
    """A comparison before the correction for their number. limit: the margin on the test's scale, if there is one."""

    row: Comparison
    difference: Difference
    limit: float | None
    at_floor: str


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of one report; what Holm corrects for is their number.

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
        raise NotARunError(
            f"{measured.path} names no baseline: its run.json is missing or broken. Give --baseline DTYPE, or start "
            "the sweep again, which writes it"
        )
    chosen = margin or measured.margin or DEFAULT_MARGIN
    like_for_like = other is not None and baseline is None
    scheme = baseline or measured.baseline
    pairs = list(_pairs(measured, other or measured, None if like_for_like else scheme))
    found: list[Comparison | _Paired] = []
    notes: dict[str, None] = dict.fromkeys([*measured.problems, *(other.problems if other else [])])
    absent: dict[str, dict[str, None]] = {}  # a reason, and the metrics that it keeps from being compared
    canaries = [cell for cell in measured.cells if cell.dtype == "canary"]
    for cell, base, wrong in pairs:
        floor = next((canary for canary in canaries if base and canary.key == base.key), None)
        for metric in dict.fromkeys([*cell.series, *cell.absent, *(base.series if base else ())]):
            if not wrong and metric in cell.absent and base and metric in base.absent:
                if cell.dtype == "again" and base.values.get(metric):
                    found.append(_moved(cell, base, metric))
                absent.setdefault(cell.absent[metric], {})[f"{cell.task} {metric}"] = None
                continue
            found.append(_compared(cell, base, wrong, metric, floor, parse_margin(chosen)))
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
    for cell in cells.cells:
        if cell.dtype == "canary" or (cells is measured and cell.scheme == scheme) or (scheme is None and cell.control):
            continue
        # what the A/A cell repeats is the baseline of its own sweep, whatever the others are compared with
        source, wanted = (cells, cells.baseline or scheme) if cell.dtype == "again" else (measured, scheme)
        wanted = wanted or cell.scheme
        there = [base for base in source.cells if base.scheme == wanted and base.task == cell.task]
        base = next((base for base in there if base.key == cell.key), None)
        if base is None and there:  # the nearest, for the reason
            base = min(there, key=lambda base: (base.model != cell.model, len(identity_differences(cell, base))))
        if base is None:
            yield cell, None, f"{' · '.join(wanted)} has no finished cell of {cell.task} in {source.path}"
        else:
            yield cell, base, "; ".join(reasons(cell, base)[:REASONS])


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
    cell: Cell, base: Cell | None, wrong: str, metric: str, canary: Cell | None, margin: float
) -> Comparison | _Paired:
    row = Comparison(
        cell.model,
        cell.dtype,
        cell.rotation,
        cell.task,
        metric,
        " · ".join(base.scheme) if base else "",
        cell=cell.name,
    )
    here = cell.series.get(metric)
    there = base.series.get(metric) if base else None
    if here:
        row = replace(row, value=_finite(here.metric.value), n=len(here.values))
    if there:
        row = replace(row, baseline=_finite(there.metric.value))
    if wrong or here is None or there is None:
        why = wrong or cell.absent.get(metric) or (base.absent.get(metric) if base else "")
        why = why or ("not measured here" if here is None else "not in the baseline")
        return replace(row, verdict="INVALID", reason=why)
    difference = paired(here, there)
    unit, limit = _scale(here, margin)
    log = here.metric.kind == "log"
    worse, better = difference.worse, difference.better
    if not here.metric.higher_is_better:
        worse, better = better, worse
    row = replace(
        row,
        difference=_finite(_relative(difference.mean) if log else difference.mean),
        ci_low=_finite(_relative(difference.ci_low) if log else difference.ci_low),
        ci_high=_finite(_relative(difference.ci_high) if log else difference.ci_high),
        unit=unit,
        worse=worse,
        better=better,
        test=difference.test,
        p=difference.p,
        margin=margin if log else limit,
        higher_is_better=here.metric.higher_is_better,
    )
    floor = at_floor(there, canary.series.get(metric) if canary else None)
    return _Paired(row, difference, limit, floor)


def _moved(cell: Cell, base: Cell, metric: str) -> Comparison:
    """How far a number without documents, such as a speed, moved when it was measured again."""
    here, there = cell.values[metric], base.values[metric]
    place = (cell.model, cell.dtype, cell.rotation, cell.task, metric, " · ".join(base.scheme))
    return Comparison(
        *place, baseline=there, value=here, difference=_finite(here / there - 1), unit="relative", cell=cell.name
    )


def at_floor(base: Series, canary: Series | None) -> str:
    """Why a loss from a baseline's share cannot be seen: there is none to lose; else empty. From the ceiling it can."""
    if base.metric.kind != "share":
        return ""
    value = base.metric.value
    if value <= FLOOR:
        return f"the baseline is at the floor ({shown_number(value)})"
    if canary is not None and canary.digest == base.digest:
        gain = paired(base, canary)
        if gain.mean <= 0 or gain.p is None or gain.p >= ALPHA:
            destroyed = shown_number(canary.metric.value)
            return f"the baseline ({shown_number(value)}) can't be told from a destroyed cache ({destroyed})"
    return ""


def _scale(series: Series, margin: float) -> tuple[str, float | None]:
    """The unit of a difference, and the margin on the scale that is tested; None where points mean nothing."""
    if series.metric.kind == "log":
        return "relative", math.log1p(margin)
    if series.metric.kind == "share":
        return "share", margin
    if series.metric.unit == "%":
        return "pp", 100 * margin
    return series.metric.unit, margin if series.metric.unit == "nats" else None


def judge(found: Sequence[Comparison | _Paired]) -> list[Comparison]:
    """The verdicts, with p corrected for the number of comparisons; the A/A cells are outside of the count."""
    tested = [one for one in found if isinstance(one, _Paired) and one.difference.p is not None and not one.row.again]
    corrected = dict(zip(map(id, tested), holm([one.difference.p or 0.0 for one in tested]), strict=True))
    return [
        _judged(one, corrected.get(id(one)), max(1, len(tested))) if isinstance(one, _Paired) else one for one in found
    ]


def _judged(one: _Paired, p_holm: float | None, family: int) -> Comparison:
    row = replace(one.row, p_holm=p_holm)
    if row.again:
        return row
    difference, limit = one.difference, one.limit
    within = limit is not None and -limit < difference.ci_low and difference.ci_high < limit
    if p_holm is not None and p_holm < ALPHA and not within:
        return replace(row, verdict="BETTER" if (difference.mean > 0) == row.higher_is_better else "WORSE")
    moved = difference.ci_low > 0 or difference.ci_high < 0  # where something moved, it could
    if one.at_floor and not moved:
        return replace(row, verdict=FLOOR_VERDICT, reason=one.at_floor)
    if within:
        return replace(row, verdict="EQUIVALENT")
    return replace(row, verdict="INCONCLUSIVE", n_to_decide=documents_to_decide(difference, limit, family))


def _relative(log: float) -> float:
    return math.expm1(log) if log < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- which baseline


def find_scheme(
    schemes: Collection[tuple[str, str]], name: str, usual: tuple[str, str] | None = None
) -> tuple[str, str]:
    """The one of `schemes` that DTYPE or DTYPE/ROTATION means; each name may be short where it is unique.

    usual: what DTYPE alone means where it has several rotations, else the one without.

    Raises:
        ValueError: none or several; the message lists what there is.
    """
    dtype, slash, rotation = name.partition("/")
    try:
        wanted = _whole(dtype, [one[0] for one in schemes], "dtype")
        turned = _whole(rotation, [one[1] for one in schemes], "rotation") if slash else None
    except ValueError as error:
        fitting, why = [], str(error)
    else:
        fitting = [one for one in schemes if one[0] == wanted and turned in (None, one[1])]
        fitting = [one for one in (usual, (wanted, "none")) if one in fitting][:1] or fitting
        why = "several schemes" if fitting else "no such scheme was measured"
    if len(fitting) != 1:
        there = ", ".join("/".join(one) for one in fitting or schemes)
        raise ValueError(f"--baseline {name}: {why}; DTYPE/ROTATION is one of {there}")
    return fitting[0]


def _whole(text: str, names: Collection[str], what: str) -> str:
    """The one of `names`, some of which are KEY:VALUE, that `text` is or begins."""
    halves = {half for name in names for half in name.split(":")}
    return ":".join(dict.fromkeys(find_name(part, halves, what) for part in text.split(":")))


# ---- shown

HEADERS = (
    "dtype",
    "rotation",
    "task",
    "metric",
    "baseline",
    "value",
    "difference",
    "95 % interval",
    "flips\n−/+",
    "n",
    "test",
    "p (Holm)",
    "verdict",
)
NUMERIC = (4, 5, 6, 7, 8, 9, 11)
LEGEND = (
    "EQUIVALENT: the whole interval lies within the margin. INCONCLUSIVE (n): neither shown; so many documents would "
    "decide. Flips: documents that got worse / better."
)


def tables(found: Comparisons) -> list[tuple[str, list[list[str]]]]:
    """A title and rows for each model."""
    made = []
    for model in dict.fromkeys(row.model for row in found.rows):
        of_model = [row for row in found.rows if row.model == model]
        compared = [row for row in of_model if not row.again] or of_model
        against = ", ".join(dict.fromkeys(row.against for row in compared if row.against))
        made.append((f"{model} against {against} · margin {found.margin}", [_cells(row, against) for row in of_model]))
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
        _interval(row),
        f"{row.worse}/{row.better}" if flips else "-",
        _number(row.n),
        row.test or "-",
        "-" if row.p_holm is None else f"{row.p_holm:.2g}",
        shown_verdict(row) + (f" against {row.against}" if row.again and row.against != against else ""),
    ]


def _interval(row: Comparison) -> str:
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
    """A line a model on the A/A cells: their flips, or how far a number moved."""
    lines = []
    for model in dict.fromkeys(row.model for row in found.again):
        parts = []
        for row in (row for row in found.again if row.model == model):
            if row.verdict == "INVALID":
                parts.append(f"{row.task} {row.metric} INVALID: {row.reason}")
            elif row.unit == "share":
                parts.append(f"{row.task} {row.metric} {(row.worse or 0) + (row.better or 0)} of {row.n} flipped")
            else:
                parts.append(f"{row.task} {row.metric} {shown_difference(row.difference, row.unit)}")
        lines.append(f"A/A (the baseline again; other batches and seed, but for speeds), {model}: " + "; ".join(parts))
    return lines


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
    tested = f"{len(found.family)} comparisons (Holm over all): {counted}" if counted else "no comparisons"
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


def markdown(measured: Measured, found: Comparisons, other: Measured | None = None) -> str:
    """The comparison as Markdown; measured, other: as `compare` took them."""
    shown = other or measured
    lines = [f"# {shown.run.get('sweep') or shown.path.name}: against the baseline", ""]
    for title, rows in tables(found):
        lines += [f"## {title}", "", *markdown_table(HEADERS, rows, NUMERIC), ""]
    lines += [LEGEND, "", *(f"- {line}" for line in summary(measured, found, other))]
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[int]) -> list[str]:
    """The lines of a table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"

    ruler = "|" + "|".join("---:" if i in numeric else ":---" for i in range(len(heads))) + "|"
    return [line(heads), ruler, *map(line, rows)]


def rows_json(rows: Sequence[Any]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"


def rows_csv(rows: Sequence[Any]) -> str:
    """The rows as CSV; what is absent is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])) if rows else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
