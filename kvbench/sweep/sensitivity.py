"""What a sweep will be able to tell, before it runs: the smallest difference that each of its tasks can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

from kvbench.measured import Measured, key_of, paired
from kvbench.stats import ALPHA, Difference, parse_margin, smallest_drop, smallest_mean
from kvbench.sweep.plan import Cell
from kvbench.tasks.base import Task

DISCORDANCE = 0.05  # assumed share of answers that flip, where no earlier record says


@dataclass(frozen=True)
class Sensitivity:
    """What one metric of a task can show with 80 % power, after Holm over the family.

    n: documents, None where that is not known. basis: what is assumed of one document, or was measured. smallest: of a
    share, of a divergence in nats, of a perplexity's ratio less 1; None where nothing can be seen, or said.
    family: comparisons that Holm corrects for; at_least: of a task only a run tells how many metrics it has.
    """

    task: str
    metric: str | None
    n: int | None
    unit: str
    basis: str
    smallest: float | None
    margin: float
    family: int
    at_least: bool

    @property
    def wide(self) -> bool:
        """Wider than the margin."""
        return self.n is not None and (self.smallest is None or self.smallest > self.margin)


def sensitivities(cells: Sequence[Cell], earlier: Measured, margin: str) -> list[Sensitivity]:
    """A row for each task and metric: by earlier records of the same documents, else by DISCORDANCE of answers.

    The family is every metric of every cell that is compared, as many as earlier records have or as the task names;
    where only a run tells, one. A task whose metrics are not compared has no row.
    """
    limit = parse_margin(margin)
    compared = [cell for cell in cells if not (cell.baseline or cell.canary or cell.again)]
    tasks = {cell.task.name: cell.task for cell in cells}
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for cell in cells if earlier.cells else ():
        keys[cell.task.name].add(key_of(cell.identity))
    spreads = {name: _measured(keys[name], earlier) for name in tasks}
    metrics = {name: tuple(spreads[name]) or task.metrics() for name, task in tasks.items()}
    counts = {name: 1 if named is None else len(named) for name, named in metrics.items()}
    family = sum(counts[cell.task.name] for cell in compared) or 1
    at_least = any(metrics[cell.task.name] is None for cell in compared)
    rows = []
    for name, task in tasks.items():
        found = [_row(name, metric, *one, limit, family, at_least) for metric, one in spreads[name].items()]
        rows += found or ([_assumed(task, limit, family, at_least)] if counts[name] else [])
    return rows


def _measured(keys: Collection[str], earlier: Measured) -> dict[str, tuple[str, int, float, float]]:
    """By metric: kind or unit, documents, and the medians over schemes of the spread and of the share that flipped.

    keys: of the cells of one task.
    """
    there = [one for one in earlier.cells if one.key in keys]
    bases = {one.key: one for one in there if one.scheme == earlier.baseline}
    found: dict[str, list[tuple[str, Difference]]] = defaultdict(list)
    for cell in there:
        base = bases.get(cell.key)
        if cell.control or base is None or base is cell:
            continue
        for name, series in cell.series.items():
            if name in base.series and base.series[name].digest == series.digest:
                metric = series.metric
                kind = metric.kind if metric.kind in ("share", "log") else metric.unit
                found[name].append((kind, paired(series, base.series[name], origin=True)))
    return {
        name: (
            some[0][0],
            some[0][1].n,
            median(one.spread for _, one in some),
            median((one.worse + one.better) / one.n for _, one in some),
        )
        for name, some in found.items()
    }


def _row(
    task: str,
    metric: str,
    unit: str,
    n: int,
    spread: float,
    discordance: float,
    margin: float,
    family: int,
    at_least: bool,
) -> Sensitivity:
    alpha = ALPHA / family
    if unit == "share":
        smallest = smallest_drop(n, max(discordance, 1 / n), alpha)
        basis = f"{discordance:.1%} of answers flipped before (median scheme)"
    else:
        smallest = smallest_mean(n, spread, alpha)
        basis = "by the spread before (median scheme)"
    limit = 100 * margin if unit == "%" else margin
    return Sensitivity(task, metric, n, unit, basis, smallest, limit, family, at_least)


def _assumed(task: Task, margin: float, family: int, at_least: bool) -> Sensitivity:
    n = task.answers()
    smallest = None if n is None else smallest_drop(n, DISCORDANCE, ALPHA / family)
    basis = f"if {DISCORDANCE:.0%} of answers flip" if n is not None else "known once it was measured"
    return Sensitivity(task.name, None, n, "share", basis, smallest, margin, family, at_least)


def shown_size(size: float | None, unit: str) -> str:
    """3.1 pp, 12 %, 0.02 nats; - where it is not known."""
    if size is None:
        return "-"
    factor, name = {"share": (100, "pp"), "%": (1, "pp"), "log": (100, "%")}.get(unit, (1, unit))
    return f"{size * factor:.2g} {name}".rstrip()
