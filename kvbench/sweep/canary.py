"""Whether a zeroed cache wrecked the scores. Where not, the cache is not read and no number means anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvbench.results import Metric, Record

Verdict = Literal["wrecked", "unmoved", "undecided"]

# a zeroed cache leaves KL divergences of several nats, perplexities in the thousands, and chance
KLD_NATS = 0.5
PERPLEXITY_RATIO = 2.0
SAME_TOP_PERCENT = 50.0
STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Judgement:
    """What the canary of one task of one model showed; `why` is for a person."""

    model: str
    task: str
    limit: int | None
    verdict: Verdict
    why: str


def judge_all(records: Sequence[Record]) -> list[Judgement]:
    """A judgement for each canary record that was measured, against the baseline's record of the same task.

    records: of one sweep; the baseline's have an identity that differs from the canary's by the zeroed cache alone.
    """
    exact = {
        _key(record): record for record in records if record.status == "done" and not record.canary and not record.again
    }
    found = []
    for record in records:
        if record.canary and record.status == "done":
            base = exact.get(_key(record))
            if base is not None:
                found.append(judge(record, base))
    return found


def _key(record: Record) -> str:
    scheme = {**record.identity["scheme"], "destroyed": None}
    return repr({**record.identity, "scheme": scheme})


def judge(canary: Record, base: Record) -> Judgement:
    """One metric that moved as it must is enough: a cache that is not read moves none."""
    exact = {metric.name: metric for metric in base.metrics}
    votes = {
        metric.name: vote
        for metric in canary.metrics
        if metric.name in exact and (vote := verdict(metric, exact[metric.name]))
    }
    where = canary.model["name"], canary.task, canary.limit
    order: tuple[Verdict, ...] = ("wrecked", "unmoved", "undecided")
    for wanted in order:
        those = [metric for metric, vote in votes.items() if vote == wanted]
        if those:
            pairs = [f"{m.name} {exact[m.name].value:.4g} -> {m.value:.4g}" for m in canary.metrics if m.name in those]
            return Judgement(*where, wanted, ", ".join(pairs[:3]))
    return Judgement(*where, "undecided", "no metric that a zeroed cache must move")


def verdict(metric: Metric, base: Metric) -> Verdict | None:
    """What one metric says; None for one that says nothing of the cache."""
    if metric.when_zeroed is None or not math.isfinite(base.value):
        return None
    if metric.kind == "log":
        return "wrecked" if not metric.value <= PERPLEXITY_RATIO * base.value else "unmoved"
    if metric.kind == "distance":
        far = metric.value < SAME_TOP_PERCENT if metric.when_zeroed == "falls" else not metric.value <= KLD_NATS
        return "wrecked" if far else "unmoved"
    if metric.when_zeroed == "falls" and metric.stderr is not None and base.stderr is not None:
        return _score(metric, base)
    return None


def _score(metric: Metric, base: Metric) -> Verdict:
    """A share of right answers falls by more than chance, unless the baseline itself can't be told from none."""
    assert metric.stderr is not None
    assert base.stderr is not None
    if base.value - metric.value > STANDARD_ERRORS * math.hypot(metric.stderr, base.stderr):
        return "wrecked"
    # at the floor, or near the chance of a multiple choice, a zeroed cache does as well
    if metric.value == base.value and base.value > STANDARD_ERRORS * base.stderr and base.stderr > 0:
        return "unmoved"
    return "undecided"
