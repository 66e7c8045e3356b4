"""`kvbench check`: whether a run folder is as good as an earlier one, for continuous integration. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from kvbench.measured import Cell, Measured
from kvbench.report.compare import DEFAULT_MARGIN, compare
from kvbench.report.comparison_text import shown_difference, shown_verdict
from kvbench.report.timings import Timings, compare_speed, same_timing, timing_name
from kvbench.report.verdicts import Comparison
from kvbench.results import shown_number
from kvbench.stats import parse_margin

# what may fail a check: a verdict, a drop, or a comparison that could not be made
FAILURES = ("worse", "drop", "missing", "inconclusive", "skipped")
DEFAULT_FAILURES = ("worse", "drop", "missing")


@dataclass(frozen=True)
class Check:
    """What a check found, a line each. compared: how many metrics."""

    failed: list[str]
    skipped: list[str]
    notes: list[str]
    compared: int

    def __add__(self, other: Check) -> Check:
        """What both found."""
        return Check(
            self.failed + other.failed,
            self.skipped + other.skipped,
            self.notes + other.notes,
            self.compared + other.compared,
        )


def check(
    measured: Measured, against: Measured, fail_on: Collection[str] = DEFAULT_FAILURES, margin: str | None = None
) -> Check:
    """Compares each cell with the same cell of an earlier run, on the same documents.

    fail_on: of FAILURES. "worse": the paired test says so. "drop": the number itself got worse by more than the margin,
    and more moved than between the two baseline cells of one run. On the same documents and the same machine
    such a drop is no luck of the documents, so it needs no test; on another machine it is not held against the cell.
    "missing": a cell or a metric of the earlier run that is absent, renamed, refused or unreadable here, or unreadable
    there. A metric that its samples no longer give fails always.
    """
    found = compare(against, measured, margin=margin or against.margin)
    own = compare(measured).rows if measured.baseline else []
    floor = {(row.model, row.task, row.metric): _moved(row) for row in own if row.again and row.dtype == "again"}
    failed = []
    expected = [old for old in against.cells if not old.control]
    partners = {(cell.scheme, cell.key): cell for cell in measured.cells}
    alone = [old for old in expected if (old.scheme, old.key) not in partners]
    here = {cell.name: cell for cell in measured.cells}
    # what the baseline has and can't be compared, what it has not, and its cells that a line is about
    missing: dict[tuple[str, str], list[str]] = defaultdict(list)
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    named: set[str] = set()
    moved_machine = _other_machine(measured, against)
    for row in found.rows:
        cell = f"{row.model} {row.dtype} {row.rotation} {row.task}"
        if row.verdict == "INVALID":
            new = here[row.cell]
            olds = [old for old in alone if (old.model, old.scheme, old.task) == (new.model, new.scheme, new.task)]
            paired = any((old.scheme, old.key) == (new.scheme, new.key) for old in expected)
            if paired and row.metric in new.absent and row.baseline is not None:
                failed.append(f"{cell} {row.metric}: {row.reason}")
            elif (paired and row.baseline is not None) or (olds and not paired):
                missing[cell, row.reason].append(row.metric)
                named.update(old.name for old in olds)
            else:
                refused[cell, row.reason].append(row.metric)
            continue
        why = []
        if "worse" in fail_on and row.verdict == "WORSE":
            why.append("WORSE")
        if "inconclusive" in fail_on and row.verdict == "INCONCLUSIVE":
            why.append(shown_verdict(row))
        noise = floor.get((row.model, row.task, row.metric), 0.0)
        if "drop" in fail_on and not moved_machine and _dropped(row) and _moved(row) > noise:
            why.append(f"dropped by more than {found.margin}")
        if why:
            failed.append(f"{cell} {row.metric}: {_numbers(row)}: {', '.join(why)}")
    for old in expected:
        cell = " ".join((old.model, *old.scheme, old.task))
        partner = partners.get((old.scheme, old.key))
        if partner is None and old.name not in named:
            unread = next((line for line in measured.problems if f"{old.name}: " in line), "")
            missing[cell, unread or "no finished cell here"].append("")
        # metrics without a number a document are not compared, but they are there
        if partner is not None:
            lost = {**old.values, **old.absent}.keys() - old.series.keys() - _metrics(partner)
            for metric in sorted(lost):
                missing[cell, "not measured here"].append(metric)
    lines, skipped = _lines(missing), _lines(refused)
    lines += [f"in the baseline: {line}" for line in against.problems]
    notes = [note for note in found.notes if note not in against.problems]
    compared = sum(row.verdict not in ("INVALID", None) for row in found.rows)
    return _counted(Check(failed, skipped, [*moved_machine, *notes], compared), lines, fail_on)


def _metrics(cell: Cell) -> set[str]:
    return {*cell.values, *cell.absent, *cell.series}


def _lines(found: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """A line for each cell and reason, with the metrics that it is about."""
    return [f"{' '.join(filter(None, (cell, ', '.join(names))))}: {reason}" for (cell, reason), names in found.items()]


def check_times(
    timings: Timings, against: Timings, fail_on: Collection[str] = DEFAULT_FAILURES, margin: str | None = None
) -> Check:
    """Compares each kernel's time with that of the same kernel in an earlier run, on a GPU of the same name.

    "worse": the whole interval of the ratio of medians lies above 1 and the margin; the samples know the spread within
    one run alone, so the margin is what two runs may differ by. "missing": a time of the earlier run that is not here.
    """
    limit = parse_margin(margin or DEFAULT_MARGIN)
    failed, skipped = [], []
    known = {same_timing(row) for row in against.rows}
    missing: list[str] = []
    rows = compare_speed(against, timings, None, margin) if against.rows else []
    if timings.rows and not against.rows:
        skipped.append(f"{len(timings.rows)} kernel times: the baseline has none")
    for row in rows:
        name = timing_name(asdict(row))
        if row.ratio is None or row.ci_low is None:
            (missing if same_timing(asdict(row)) in known else skipped).append(f"{name}: {row.reason}")
        elif "worse" in fail_on and row.ci_low > 1 + limit:
            times = f"{row.baseline_us:.1f} -> {row.us:.1f} µs"
            failed.append(f"{name}: {times} (× {row.ratio:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]): SLOWER")
    here = {same_timing(row) for row in timings.rows}
    missing += [f"{timing_name(row)}: no time here" for row in against.rows if same_timing(row) not in here]
    compared = sum(row.ratio is not None for row in rows)
    notes = [
        f"{compared} kernel times: SLOWER where the whole interval of the ratio is above {1 + limit:g}; "
        "it knows the spread within one run alone"
    ]
    return _counted(Check(failed, skipped, notes if compared else [], compared), missing, fail_on)


def _counted(found: Check, missing: list[str], fail_on: Collection[str]) -> Check:
    """With what is missing, as a failure or as skipped; and what was skipped as a failure too, where it is to fail."""
    if "missing" in fail_on:
        found = replace(found, failed=found.failed + missing)
    else:
        found = replace(found, skipped=found.skipped + missing)
    if "skipped" in fail_on:
        found = replace(found, failed=[*found.failed, *(f"{line} (skipped)" for line in found.skipped)])
    return found


def _moved(row: Comparison) -> float:
    """Documents that flipped; of a number that is no share, how far it moved."""
    return (row.worse or 0) + (row.better or 0) if row.unit == "share" else abs(row.difference or 0.0)


def _dropped(row: Comparison) -> bool:
    """Whether the number got worse by more than the margin."""
    if row.difference is None or row.margin is None or row.higher_is_better is None:
        return False
    return (row.difference < -row.margin) if row.higher_is_better else (row.difference > row.margin)


def _numbers(row: Comparison) -> str:
    flips = (
        f", {row.worse} of {row.n} documents worse and {row.better} better" if row.unit == "share" else f", n={row.n}"
    )
    values = " -> ".join("-" if value is None else shown_number(value) for value in (row.baseline, row.value))
    p = "" if row.p_holm is None else f", p {row.p_holm:.2g}"
    return f"{values} ({shown_difference(row.difference, row.unit)}{flips}{p})"


def _other_machine(measured: Measured, against: Measured) -> list[str]:
    """A line where the cells of one were measured in another environment than those of the other."""
    here, there = ({cell.environment for cell in one.cells} for one in (measured, against))
    if here == there or not (here and there):
        return []
    names = " / ".join("; ".join(sorted(one)) for one in (here, there))
    return [f"another environment: {names}: a drop is not held against it, only what is WORSE"]
