"""Kernel timings against each other: ratios of medians with their bootstrap intervals. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvbench.files import read_json
from kvbench.render import Column, Document, Table
from kvbench.report.compare import DEFAULT_MARGIN
from kvbench.report.find_scheme import Scheme
from kvbench.results import NotARunError, Record, Store, describe, kernel_task
from kvbench.results.shapes import Environment, TimedRow, read_as
from kvbench.stats import parse_margin, ratio_of_medians

Verdict = Literal["FASTER", "SLOWER", "SAME", "AMBIGUOUS", "INVALID"]

# what two timings have in common
SHAPE = ("op", "query_heads", "kv_heads", "head_dim", "page_size", "prefix", "batch", "context")


@dataclass(frozen=True)
class SpeedComparison:
    """One timing against a baseline's. ratio: of medians, below 1 is faster; ci_low, ci_high: its 95 % interval.

    against: the baseline's dtype and rotation. n: samples of the smaller of the two.
    """

    op: str
    dtype: str
    rotation: str
    batch: int
    context: int
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    page_size: int | None
    prefix: int | None
    against: str
    baseline_us: float | None
    us: float | None
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    n: int | None
    test: str
    verdict: Verdict
    reason: str = ""


FIELDS = tuple(SpeedComparison.__dataclass_fields__)


@dataclass(frozen=True)
class Timings:
    """The timed rows of `kvbench kernel`, each with its `samples_us`. gpu: None where unsaid."""

    rows: list[dict[str, Any]]
    gpu: str | None


class BrokenTimingsError(NotARunError):
    """Timed rows that are not as `kvbench kernel` writes them; the message names the file and the place."""


def is_timings(path: Path) -> bool:
    """Whether a path holds kernel timings, and no model's cells."""
    if any(not record.kernel for record in Store(path).load().records.values()):
        return False
    try:
        return bool(read(path).rows)
    except BrokenTimingsError:
        return True
    except (OSError, NotARunError):
        return False


def read(path: Path) -> Timings:
    """The timed rows of a run folder of `kvbench kernel --output`, or of files that hold such rows as JSON.

    Raises:
        FileNotFoundError: nothing is there.
        NotARunError: no timed row is in it, or a broken one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    store = Store(path)
    records = [one for one in store.load().records.values() if one.kernel and one.status == "done"]
    rows = [_row_of(store, one) for one in records if one.facts["us"]]
    gpus = {str(one.identity["device"]) for one in records}
    for file in sorted(path.glob("*.json")) if path.is_dir() and not rows else [path] if path.is_file() else []:
        found, named = _rows_in(file)
        rows += found
        gpus |= named
    if not rows:
        raise NotARunError(f"{path} has no timed row: kvbench kernel --output DIR keeps them on a GPU")
    rows.sort(key=lambda row: [row.get(name) or 0 for name in SHAPE])  # "decode", 8, 32768, …
    return Timings(rows, ", ".join(sorted(gpus)) or None)


def _row_of(store: Store, record: Record) -> dict[str, Any]:
    """A kernel's row with its samples."""
    file = store.cells / record.cell / "samples.parquet"
    try:
        samples = read_as(list[float], store.samples(record.cell)["us"].tolist(), "us")
    except (OSError, ValueError, LookupError) as error:
        raise BrokenTimingsError(f"{file} has no times ({describe(error)})") from None
    if not samples or not np.isfinite(samples).all():
        raise BrokenTimingsError(f"{file} has no times (us: expected numbers)")
    return {**record.facts, "samples_us": samples}


def _rows_in(file: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """The timed rows of a JSON file and the GPUs that it names; none of a file of other things."""
    try:
        data = read_json(file)
    except (OSError, ValueError):
        return [], set()
    found = data.get("rows", []) if isinstance(data, dict) else data
    timed = [
        (number, row)
        for number, row in enumerate(found if isinstance(found, list) else [])
        if isinstance(row, dict) and row.get("samples_us") and "op" in row
    ]
    if not timed:
        return [], set()
    try:
        environment = read_as(
            Environment, (data.get("environment") or {}) if isinstance(data, dict) else {}, "environment"
        )
        rows: list[dict[str, Any]] = [read_as(TimedRow, row, f"rows[{number}]") for number, row in timed]
        for (number, _), row in zip(timed, rows, strict=True):
            if not np.isfinite(row["samples_us"]).all():
                raise ValueError(f"rows[{number}].samples_us: expected numbers")
    except ValueError as error:
        raise BrokenTimingsError(f"{file} holds a broken timing ({describe(error)})") from None
    return rows, {gpu["name"] for gpu in environment.get("gpus") or []}


def find(path: Path) -> Timings:
    """What `read` gives, or no row where there is none.

    Raises:
        BrokenTimingsError: a broken row.
    """
    try:
        return read(path)
    except BrokenTimingsError:
        raise
    except (OSError, NotARunError):
        return Timings([], None)


def compare_speed(
    timings: Timings, other: Timings | None, baseline: Scheme | None, margin: str | None
) -> list[SpeedComparison]:
    """Every timing against that of `baseline` on the same shape; of `other`, against the same of `timings`.

    baseline: without one, fp16 as it is; where it was not timed, no row has a baseline.
    """
    like_for_like = other is not None and baseline is None
    limit = parse_margin(margin or DEFAULT_MARGIN)
    scheme = None if like_for_like else baseline or ("fp16", "none")
    wrong = ""
    if other and timings.gpu != other.gpu:
        wrong = f"timed on {other.gpu or 'an unnamed GPU'}, the baseline on {timings.gpu or 'an unnamed GPU'}"
    found = []
    for row in (other or timings).rows:
        wanted = scheme or (row["dtype"], row["rotation"])
        same = (one for one in timings.rows if _shape(one) == _shape(row))
        base = next((one for one in same if (one["dtype"], one["rotation"]) == wanted), None)
        if base is not row:
            found.append(_compared(row, base, limit, wrong))
    return found


def schemes_of(timings: Timings) -> list[Scheme]:
    """Every timed scheme once."""
    return list(dict.fromkeys((row["dtype"], row["rotation"]) for row in timings.rows))


def same_timing(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two timings like for like have in common: their shape and scheme."""
    return (*_shape(row), row["dtype"], row["rotation"])


def timing_name(row: dict[str, Any]) -> str:
    """`decode 32×8192 · 32/8 heads × 128 · pages of 64 · int4_per_token_head · none`."""
    prefix = f" after {row['prefix']}" if row.get("prefix") else ""
    heads = f"{row.get('query_heads') or '-'}/{row.get('kv_heads') or '-'} heads × {row.get('head_dim') or '-'}"
    pages = f"pages of {row.get('page_size') or '-'}"
    return " · ".join([f"{kernel_task(row)}{prefix}", heads, pages, row["dtype"], row["rotation"]])


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in SHAPE)


def _compared(row: dict[str, Any], base: dict[str, Any] | None, limit: float, wrong: str) -> SpeedComparison:
    against = f"{base['dtype']} · {base['rotation']}" if base else ""
    ratio = low = high = n = None
    verdict: Verdict = "INVALID"
    if base and not wrong:
        after, before = np.array(row["samples_us"], float), np.array(base["samples_us"], float)
        n = min(len(after), len(before))
        ratio, low, high = ratio_of_medians(after, before)
        if 1 / (1 + limit) < low and high < 1 + limit:
            verdict = "SAME"
        elif high < 1:
            verdict = "FASTER"
        elif low > 1:
            verdict = "SLOWER"
        else:
            verdict = "AMBIGUOUS"
    return SpeedComparison(
        row["op"],
        row["dtype"],
        row["rotation"],
        row["batch"],
        row["context"],
        row.get("query_heads"),
        row.get("kv_heads"),
        row.get("head_dim"),
        row.get("page_size"),
        row.get("prefix"),
        against,
        base.get("us") if base else None,
        row.get("us"),
        ratio,
        low,
        high,
        n,
        "bootstrap of the ratio of medians",
        verdict,
        wrong or ("" if base else "the baseline was not timed on this shape"),
    )


COLUMNS = (
    Column(("op",), numeric=False),
    Column(("dtype",), numeric=False, prose=True),
    Column(("rotation",), numeric=False, prose=True, joins="none"),
    Column(("batch",)),
    Column(("context",)),
    Column(("heads",), drop=4),
    Column(("D",), drop=5),
    Column(("page",), drop=6),
    Column(("against",), numeric=False, prose=True, drop=3),
    Column(("baseline µs",), drop=2),
    Column(("µs",), drop=1),
    Column(("ratio",)),
    Column(("95 % interval",)),
    Column(("verdict",), numeric=False, verdict=True, prose=True),
)


def document(rows: Sequence[SpeedComparison]) -> Document:
    """A row a timing, beside the baseline's."""
    return Document(
        sections=[Table("", COLUMNS, _cells(rows))] if rows else [], rows=[asdict(row) for row in rows], fields=FIELDS
    )


def _cells(rows: Sequence[SpeedComparison]) -> list[list[str]]:
    """The rows as text."""

    def us(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    return [
        [
            row.op,
            row.dtype,
            row.rotation,
            str(row.batch),
            str(row.context or "-"),
            f"{row.query_heads or '-'}/{row.kv_heads or '-'}",
            str(row.head_dim or "-"),
            str(row.page_size or "-"),
            row.against or "-",
            us(row.baseline_us),
            us(row.us),
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "-" if row.ci_low is None else f"[{row.ci_low:.3f}, {row.ci_high:.3f}]",
            f"{row.verdict}: {row.reason}" if row.reason else row.verdict,
        ]
        for row in rows
    ]
