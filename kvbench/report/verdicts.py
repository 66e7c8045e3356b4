"""What a paired difference is called, once it is known how many there are. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvbench.measured import Series, paired
from kvbench.results import shown_number
from kvbench.stats import ALPHA, Difference, documents_to_decide, holm

Verdict = Literal["WORSE", "BETTER", "EQUIVALENT", "INCONCLUSIVE", "NOT-DISCRIMINATIVE", "INVALID"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FLOOR_VERDICT: Verdict = "NOT-DISCRIMINATIVE"
FLOOR = 0.01  # a share up to this is at the floor: it has nothing to lose


@dataclass(frozen=True)
class Comparison:
    """One metric of one cell against a baseline's.

    against: the baseline's scheme. baseline, value: of the metric; difference: value less baseline, for a perplexity
    their ratio less 1; ci_low, ci_high: its 95 % interval. unit: of the difference. worse, better: documents that
    moved. task_limit: documents that the task was cut to. p_holm: after Holm over the whole report. margin: in the
    difference's unit. n_to_decide: documents that would decide what is INCONCLUSIVE. reason: of a verdict, where it
    has one. verdict: None for an A/A cell (again).
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
    again: bool = False
    task_limit: int | None = None


FIELDS = tuple(Comparison.__dataclass_fields__)


@dataclass(frozen=True)
class Paired:
    """A comparison before the correction for their number. limit: the margin on the test's scale, if there is one."""

    row: Comparison
    difference: Difference
    limit: float | None
    at_floor: str


def at_floor(base: Series, canary: Series | None) -> str:
    """Why a loss from a baseline's share cannot be seen: there is none to lose; else empty. From the ceiling it can."""
    if base.metric.kind != "share" or not base.metric.higher_is_better:
        return ""
    value = base.metric.value
    if value <= FLOOR:
        return f"the baseline is at the floor ({shown_number(value)})"
    if canary is not None and canary.digest == base.digest:
        gain = paired(base, canary)
        if gain.mean <= 0 or gain.p is None or gain.p >= ALPHA:
            destroyed = shown_number(canary.metric.value)
            return f"the baseline ({shown_number(value)}) can't be told from a zeroed cache ({destroyed})"
    return ""


def scale_of(series: Series, margin: float) -> tuple[str, float | None]:
    """The unit of a difference, and the margin on the scale that is tested; None where points mean nothing."""
    if series.metric.kind == "log":
        return "relative", math.log1p(margin)
    if series.metric.kind == "share":
        return "share", margin
    if series.metric.unit == "%":
        return "pp", 100 * margin
    return series.metric.unit, margin if series.metric.unit == "nats" else None


def judge(found: Sequence[Comparison | Paired]) -> list[Comparison]:
    """The verdicts, with p corrected for the number of comparisons that have one; the A/A cells are outside of it."""
    tested = [one for one in found if isinstance(one, Paired) and one.difference.p is not None and not one.row.again]
    corrected = dict(zip(map(id, tested), holm([one.difference.p or 0.0 for one in tested]), strict=True))
    return [
        _judged(one, corrected.get(id(one)), max(1, len(tested))) if isinstance(one, Paired) else one for one in found
    ]


def _judged(one: Paired, p_holm: float | None, family: int) -> Comparison:
    row = replace(one.row, p_holm=p_holm)
    if row.again:
        return row
    difference, limit = one.difference, one.limit
    within = limit is not None and -limit < difference.ci_low and difference.ci_high < limit
    beyond = limit is not None and (difference.ci_low >= limit or difference.ci_high <= -limit)
    # a distance has no p: the margin alone says what is far
    if beyond if p_holm is None else p_holm < ALPHA and not within:
        return replace(row, verdict="BETTER" if (difference.mean > 0) == row.higher_is_better else "WORSE")
    moved = difference.ci_low > 0 or difference.ci_high < 0  # where something moved, it could
    if one.at_floor and not moved:
        return replace(row, verdict=FLOOR_VERDICT, reason=one.at_floor)
    if within:
        return replace(row, verdict="EQUIVALENT")
    return replace(row, verdict="INCONCLUSIVE", n_to_decide=documents_to_decide(difference, limit, family))
