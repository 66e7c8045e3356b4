"""What the parts of a page share: the cells of a report, its comparisons, and what their schemes are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvbench.measured import Measured
from kvbench.render import Bar, Cell
from kvbench.render.document import Mark
from kvbench.report.compare import Comparisons
from kvbench.report.comparison_text import shown_difference, shown_interval, shown_verdict
from kvbench.report.labels import task_labels
from kvbench.report.verdicts import Comparison
from kvbench.results import Record, Store, shown_number

BITS_AT = 8192  # tokens; for so long a sequence a record states the bits of a scheme with a window
MARKS: dict[str | None, Mark] = {
    "WORSE": "worse",
    "BETTER": "better",
    "EQUIVALENT": "same",
    "INCONCLUSIVE": "open",
    "NOT-DISCRIMINATIVE": "void",
    "INVALID": "bad",
    None: "void",
}


@dataclass(frozen=True)
class Scheme:
    """One way to store of one model, and how it compares.

    bits: a value, at 8192 tokens where that depends on the length. bytes_per_token: None where unknown; ring: bytes of
    a sequence's recent tokens and sinks in 16 bits. rows: its comparisons.
    """

    model: str
    dtype: str
    rotation: str
    bits: float | None
    bytes_per_token: float | None
    ring: float
    baseline: bool
    rows: Sequence[Comparison]

    @property
    def name(self) -> str:
        """`int4_per_token_head · hadamard`; without a rotation the dtype alone."""
        return scheme_name(self.dtype, self.rotation)

    def size(self, tokens: int) -> float:
        """Bytes of a sequence of so many tokens."""
        return (self.bytes_per_token or 0.0) * tokens + self.ring

    def having(self, *verdicts: str) -> list[Comparison]:
        """Its comparisons with one of these verdicts."""
        return [row for row in self.rows if row.verdict in verdicts]


@dataclass(frozen=True)
class Found:
    """A report's records and comparisons. kernels: timings that stand beside accuracy."""

    store: Store
    records: Sequence[Record]
    kernels: Sequence[Record]
    measured: Measured
    comparisons: Comparisons

    @cached_property
    def by_cell(self) -> dict[str, Record]:
        """The records by cell name."""
        return {record.cell: record for record in self.records}

    @cached_property
    def labels(self) -> dict[str, str]:
        """What the task of each cell is called."""
        return task_labels(self.records)

    @cached_property
    def rows(self) -> list[Comparison]:
        """The comparisons, without the A/A cells'."""
        return [row for row in self.comparisons.rows if not row.again]

    @cached_property
    def models(self) -> list[str]:
        """Every model that was measured."""
        return list(dict.fromkeys(cell.model for cell in self.measured.cells))

    @cached_property
    def schemes(self) -> list[Scheme]:
        """Every scheme of every model, as the sweep lists them, the controls left out."""
        made = []
        for model, dtype, rotation in dict.fromkeys(
            (cell.model, *cell.scheme) for cell in self.measured.cells if not cell.control
        ):
            cells = [
                one
                for one in self.records
                if (one.model["name"], one.dtype, one.rotation) == (model, dtype, rotation) and one.status == "done"
            ]
            rows = [row for row in self.rows if (row.model, row.dtype, row.rotation) == (model, dtype, rotation)]
            bits = next((one.bits_per_value for one in cells if one.bits_per_value), None)
            size = next((one.kv_bytes_per_token for one in cells if one.kv_bytes_per_token), None)
            values = sum(2 * heads * dim for one in cells[:1] for heads, dim in one.model.get("layers") or ())
            ring = max(0.0, (bits / 8 * values - size) * BITS_AT) if bits and size and values else 0.0
            baseline = (dtype, rotation) == self.measured.baseline
            made.append(Scheme(model, dtype, rotation, bits, size, round(ring), baseline, rows))
        return made

    @cached_property
    def tasks(self) -> list[str]:
        """What the tasks are called, as the sweep lists them."""
        return list(dict.fromkeys(self.labels[cell.name] for cell in self.measured.cells))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model takes; 0 where unknown."""
        return max((one.model.get("max_length") or 0 for one in self.records), default=0)

    def baseline(self, model: str) -> Scheme | None:
        """What the schemes of a model are compared with."""
        return next((one for one in self.schemes if one.model == model and one.baseline), None)

    def task(self, row: Comparison) -> str:
        """What the task of a comparison is called."""
        return self.labels.get(row.cell, row.task)

    def bits(self, row: Comparison) -> float | None:
        """True bits of the scheme that is compared."""
        record = self.by_cell.get(row.cell)
        return record.bits_per_value if record else None


def scheme_name(dtype: str, rotation: str) -> str:
    """A scheme in words."""
    return dtype if rotation == "none" else f"{dtype} · {rotation}"


def difference(row: Comparison) -> str:
    """`−2.2 pp`, `+6.7 %`; from eleven times the baseline's on as `× 1.5e7`: percents of that size say nothing."""
    return _times(row.difference) if _far(row) else shown_difference(row.difference, row.unit)


def interval(row: Comparison) -> str:
    """Both ends, in the words of the difference."""
    if not _far(row) or row.ci_low is None or row.ci_high is None:
        return shown_interval(row)
    return f"[{_times(row.ci_low)}, {_times(row.ci_high)}]"


def _far(row: Comparison) -> bool:
    return row.unit == "relative" and (row.difference or 0.0) >= 10


def _times(ratio_less_1: float | None) -> str:
    return f"× {1 + (ratio_less_1 or 0.0):.2g}".replace("e+0", "e").replace("e+", "e")


def difference_and_interval(row: Comparison) -> str:
    """`−2.2 pp [−3.0, −1.5]`."""
    ends = interval(row)
    return f"{difference(row)}{'' if ends == '-' else f' {ends}'}"


def said(row: Comparison) -> str:
    """`−2.2 pp [−3.0, −1.5], WORSE`: a difference with its interval and its verdict."""
    return f"{difference_and_interval(row)}, {shown_verdict(row)}"


def verdict_cell(row: Comparison) -> Cell:
    """A verdict with its sign."""
    return Cell(shown_verdict(row), mark=MARKS[row.verdict])


def interval_cell(row: Comparison) -> Cell:
    """An interval as text and as a bar, five margins to each side of 0."""
    text = interval(row)
    if row.ci_low is None or row.ci_high is None or row.difference is None:
        return Cell(text)
    ends = row.ci_low, row.difference, row.ci_high
    scale = 5 * row.margin if row.margin else 1.2 * max(map(abs, ends)) or 1.0
    return Cell(text, row.difference, Bar(*ends, row.margin, scale))


def number_cell(value: float | None) -> Cell:
    """A number to four digits, or a dash."""
    return Cell("-" if value is None else shown_number(value), value)
