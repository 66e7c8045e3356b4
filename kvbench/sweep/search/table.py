"""What a search found, as a document: every scheme verified, the best of each budget, and what mixing gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from kvbench.measured import Cell, of_records, paired
from kvbench.render.document import Axis, Column, Document, Plot, Table, View
from kvbench.results import Metric, Record, shown_metric
from kvbench.schemes import Scheme
from kvbench.sweep.command import Planned
from kvbench.sweep.config import Sweep
from kvbench.tasks.divergence import Divergence


@dataclass(frozen=True)
class Row:
    """A scheme that was verified. kind: where it comes from. predicted: what its layers cost alone, summed, in nats."""

    scheme: Scheme
    bits: float
    kind: str
    predicted: float


@dataclass(frozen=True)
class _Measured:
    row: Row
    record: Record
    cell: Cell
    metric: Metric

    @property
    def kld(self) -> float:
        return self.metric.value


def search_document(
    sweep: Sweep, context: int, rows: Sequence[Row], budgets: Sequence[float], planned: Planned
) -> tuple[Document, dict[float, Scheme]]:
    """The document, and the scheme of each budget that loses least; a budget without a measured one has none.

    The divergence counts behind the last of the task's `positions`, where it has them.
    """
    divergence = next(cell.task for cell in planned.cells if isinstance(cell.task, Divergence))
    task, name = divergence.name, [metric for metric in divergence.metrics() if metric.startswith("kld")][-1]
    records = planned.store.load().records
    cells = {cell.scheme.label: cell.name for cell in planned.cells if cell.task.name == task and cell.role == "cell"}
    measured = of_records(planned.store.folder, list(records.values()), planned.store.run())
    by_name = {cell.name: cell for cell in measured.cells}
    there = [
        _Measured(row, records[cell], by_name[cell], next(m for m in records[cell].metrics if m.name == name))
        for row in sorted(rows, key=lambda row: (row.bits, row.predicted))
        if (cell := cells.get(row.scheme.label)) in by_name
    ]
    front = _front(there)
    shown = [_shown(one, one in front) for one in there]
    notes = []
    winners = {}
    for budget in budgets:
        line, winner = _verdict(budget, there)
        notes.append(line)
        if winner is not None:
            winners[budget] = winner.row.scheme
            notes += _layers(winner.row.scheme)
    notes += _trust(there)
    table = Table(
        f"{planned.cells[0].model.name}, a sequence of {context} tokens",
        [
            Column(("dtype",), numeric=False),
            Column(("rotation",), numeric=False, drop=2),
            Column(("from",), numeric=False),
            Column(("bits/value", f"at {context} tokens")),
            Column((name, "nats")),
            Column(("by its layers", "nats"), drop=1),
            Column(("front",), numeric=False),
        ],
        shown,
    )
    facts = [
        {
            **one.row.scheme.columns(),
            "from": one.row.kind,
            "bits_per_value": one.row.bits,
            "context": context,
            "metric": name,
            "kld": one.kld,
            "predicted_kld": one.row.predicted,
            "front": one in front,
            "cell": one.record.cell,
        }
        for one in there
    ]
    legend = "front: no scheme here loses less at as few bits; by its layers: what each layer costs alone, summed"
    fields = list(facts[0]) if facts else []
    picture = Plot("Bits against loss", "points", [_view(there, front, name, context)] if there else [])
    document = Document(
        f"{sweep.name}: what a search found", [table, picture], legend=legend, notes=notes, rows=facts, fields=fields
    )
    return document, winners


def _view(there: Sequence[_Measured], front: Sequence[_Measured], name: str, context: int) -> View:
    points = [
        {
            "x": one.row.bits,
            "y": one.kld,
            "text": f"{one.row.scheme.label}, {one.row.kind}: {one.row.bits:.2f} bits, {name} {one.kld:.3g}",
            "series": one.row.kind,
            "label": one.row.scheme.columns()["dtype"].replace("_per_token_head", ""),
            "front": one in front,
        }
        for one in there
        if one.kld > 0  # of which there is a logarithm
    ]
    says = "; ".join(str(point["text"]) for point in points if point["front"])
    x = Axis(f"bits a value, of {context} tokens", log=True)
    return View({}, f"No scheme loses less at as few bits than: {says}", x, Axis(f"{name}, nats", log=True), points)


def _front(there: Sequence[_Measured]) -> list[_Measured]:
    """Those that no other beats in one of bits and divergence without losing in the other."""
    return [
        one
        for one in there
        if not any(
            other.row.bits <= one.row.bits
            and other.kld <= one.kld
            and (other.row.bits, other.kld) != (one.row.bits, one.kld)
            for other in there
        )
    ]


def _shown(one: _Measured, front: bool) -> list[str]:
    names = one.row.scheme.columns()
    bits = f"{one.row.bits:.2f}"
    return [
        names["dtype"],
        names["rotation"],
        one.row.kind,
        bits,
        shown_metric(one.metric),
        f"{one.row.predicted:.2g}",
        "yes" if front else "",
    ]


def _verdict(budget: float, there: Sequence[_Measured]) -> tuple[str, _Measured | None]:
    """A line on what the budget's best scheme gains over the best that was listed, and that best scheme."""
    within = [one for one in there if one.row.bits <= budget]
    if not within:
        return f"{budget:g} bits: no scheme of so few was measured", None
    best = min(within, key=lambda one: one.kld)
    listed = [one for one in within if one.row.kind == "listed"]
    name = f"{budget:g} bits: {best.row.scheme.label}, {best.metric.name} {best.kld:.3g} at {best.row.bits:.2f} bits"
    if not listed:
        return f"{name}; no listed scheme is as small", best
    uniform = min(listed, key=lambda one: one.kld)
    if uniform is best:
        return f"{name}: nothing was gained by mixing, this scheme was listed", best
    found = paired(best.cell.series[best.metric.name], uniform.cell.series[uniform.metric.name])
    gain = f"{100 * (1 - best.kld / uniform.kld):.0f} % less than the best listed, {uniform.row.scheme.label}"
    what = f"{gain} ({uniform.kld:.3g} at {uniform.row.bits:.2f} bits)"
    interval = f"95 % interval of the difference {found.ci_low:+.2g} to {found.ci_high:+.2g}"
    sure = "" if found.ci_high < 0 else "; that may be luck"
    return f"{name}, {what}; {interval}, n={found.n}{sure}", best


def _trust(there: Sequence[_Measured]) -> list[str]:
    """A line on how far the sums over layers, which chose, are from what was measured; none of fewer than two schemes.

    The sums rank schemes and are no forecast: they are of another text and of all its positions, and errors in many
    layers may add up to more than each does alone.
    """
    lossy = [one for one in there if one.row.predicted > 0 and one.kld > 0]
    if len(lossy) < 2:
        return []
    shares = [one.row.predicted / one.kld for one in lossy]
    pairs = list(combinations(lossy, 2))
    agree = sum((a.row.predicted < b.row.predicted) == (a.kld < b.kld) for a, b in pairs)
    return [
        f"by its layers: the sum is {median(shares):.2f} of what was measured (median of {len(lossy)} schemes; "
        f"{min(shares):.2f} to {max(shares):.2f}), and ranks {agree} of {len(pairs)} pairs as that does"
    ]


def _layers(scheme: Scheme) -> list[str]:
    """What a scheme's layers have, where they differ."""
    layers: Mapping[str, Mapping[str, Mapping[str, str]]] = scheme.spec().get("layers", {})
    lines = []
    for numbers, sides in layers.items():
        own = ", ".join(f"{name} {side['dtype']} {side['rotation']}" for name, side in sides.items())
        lines.append(f"  layers {numbers}: {own}")
    return lines
