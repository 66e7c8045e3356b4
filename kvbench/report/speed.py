"""What kernel records say in a report: a table of their own, and a column beside accuracy. Loads without torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.render import Column, Table
from kvbench.results import Record, shown_megabytes

NOT_RUN = "- (not run)"
SAME_DTYPE = ("same_dtype_speedup", "same_dtype_peer", "same_dtype_us")  # older records have none


def kernel_tables(records: Sequence[Record]) -> list[Table]:
    """A table an operation, GPU and shape, a row a size and scheme; of a failed gate only the verdict is shown."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_setting(record)].append(record)
    return [
        _table(" · ".join(map(str, setting)), [record.facts for record in sorted(group, key=_order)])
        for setting, group in groups.items()
    ]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    names = ["batch", "context", "read MB", "µs [p10, p90]", "GB/s", "of copy", "vs 16-bit"]
    # a column only where such a peer was timed
    compared = any(row.get("same_dtype_speedup") for row in rows)
    names += [*(["vs same dtype"] if compared else []), "rel. error"]
    columns = [
        Column(("dtype",), numeric=False, prose=True),
        Column(("rotation",), numeric=False, prose=True, joins="none"),
        *(Column((name,)) for name in names),
    ]
    return Table(title, columns, [_row(row, compared) for row in rows])


def _setting(record: Record) -> tuple[Any, ...]:
    row = record.facts
    heads = f"{row['query_heads']} query / {row['kv_heads']} KV heads, D {row['head_dim']}, pages of {row['page_size']}"
    prefix = [f"on a prefix of {row['prefix']}"] if row["prefix"] else []
    return row["op"], *prefix, heads, record.identity["device"]


def _order(record: Record) -> tuple[Any, ...]:
    row = record.facts
    return row["batch"], row["context"] or 0, -(record.bits_per_value or 0), record.dtype, record.rotation


def _row(row: dict[str, Any], compared: bool) -> list[str]:
    timed = row["us"] is not None
    return [
        row["dtype"],
        row["rotation"],
        str(row["batch"]),
        str(row["context"] or "-"),
        shown_megabytes(row["read_bytes"]),
        f"{row['us']:.1f} [{row['us_p10']:.1f}, {row['us_p90']:.1f}]" if timed else "-",
        f"{row['gbps']:.0f}" if timed else "-",
        f"{row['share_of_copy']:.0%}" if timed else "-",
        _ratio(row["speedup"], row["best_16bit_peer"], row["best_16bit_us"]),
        *([_ratio(*map(row.get, SAME_DTYPE))] if compared else []),
        f"{row['rel_error']:.1e} {row['gate']}",
    ]


def _ratio(speedup: float | None, peer: str | None, us: float | None) -> str:
    return f"{speedup:.2f} × ({peer} {us:.0f})" if speedup else "-"


@dataclass(frozen=True)
class SpeedColumn:
    """The column `decode 32×8k` of an accuracy table: one size on one GPU, for as many of its schemes as were timed."""

    column: Column
    cells: dict[tuple[str, str], str]
    note: str

    def cell(self, scheme: tuple[str, str]) -> str:
        """`114 µs (3.07 ×)`, or that it was not run."""
        return self.cells.get(scheme, NOT_RUN)


def speed_column(
    records: Sequence[Record], schemes: Collection[tuple[str, str]], layers: Collection[tuple[int, int]] = ()
) -> SpeedColumn | None:
    """The decode timings that stand for a table's schemes; None where none was timed.

    Of the model's own shape (layers: KV heads and head_dim) where that was timed; then of the size that covers most
    schemes, of the shape with most timings, of the largest batch, of the least context.
    """
    timed = [record for record in records if record.facts.get("op") == "decode" and record.facts.get("us")]
    shapes = Counter(_setting(record) for record in timed)
    timed = [record for record in timed if (record.dtype, record.rotation) in schemes]
    own = [record for record in timed if (record.facts["kv_heads"], record.facts["head_dim"]) in layers]
    timed = own or timed
    if not timed:
        return None
    counts = Counter(_size(record) for record in timed)
    size = max(counts, key=lambda one: (counts[one], shapes[one[2]], one[0], -one[1]))
    chosen = [record for record in timed if _size(record) == size]
    batch, context, setting = size
    name = f"decode {batch}×{context // 1024}k" if context % 1024 == 0 else f"decode {batch}×{context}"
    counted = sorted({metric.n for record in chosen for metric in record.metrics if metric.name == "us"})
    shown = f"{counted[0]}" if len(counted) == 1 else f"{counted[0]}..{counted[-1]}"
    return SpeedColumn(
        Column((name, "µs (× 16-bit)", f"n={shown}"), drop=1),
        {(record.dtype, record.rotation): _speed(record.facts) for record in chosen},
        f"{name}: median time of one layer's attention kernel, {batch} sequences of {context} tokens, "
        f"{', '.join(setting[1:])}; × is against the best 16-bit attention timed in the same run",
    )


def _size(record: Record) -> tuple[int, int, tuple[Any, ...]]:
    return record.facts["batch"], record.facts["context"], _setting(record)


def _speed(row: dict[str, Any]) -> str:
    ratio = f" ({row['speedup']:.2f} ×)" if row["speedup"] else ""
    return f"{row['us']:.0f}{ratio}"
