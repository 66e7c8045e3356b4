"""Rows as people and programs read them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from kvbench.timing.grid import Timings

FORMATS = ("table", "md", "csv", "json")
HEADER = (
    "dtype",
    "rotation",
    "batch",
    "context",
    "read MB",
    "µs [p10, p90]",
    "GB/s",
    "of copy",
    "vs 16-bit",
    "rel. error",
)


def render(timings: Timings, how: str) -> str:
    """The rows as `table`, `md`, `csv` or `json` (a list of the rows)."""
    if how == "json":
        return json.dumps(timings.rows, indent=1)
    if how == "csv":
        out = io.StringIO()
        columns = [name for name in timings.rows[0] if name != "samples_us"] if timings.rows else []
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(timings.rows)
        return out.getvalue().rstrip("\n")
    cells = [_cells(row) for row in timings.rows]
    if how == "md":
        lines = [f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *cells)]
        return "\n".join([_title(timings), "", *lines, "", *_notes(timings)]).rstrip()
    widths = [max(len(line[i]) for line in (HEADER, *cells)) for i in range(len(HEADER))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (HEADER, *cells)
    ]
    return "\n".join([_title(timings), *lines, *_notes(timings)])


def _title(timings: Timings) -> str:
    shape = timings.request.shape
    device = timings.device or "no GPU: gates only, in the interpreter; nothing was timed"
    copy = f" · copy bandwidth {timings.copy_gbps:.0f} GB/s (measured now)" if timings.copy_gbps else ""
    heads = f"{shape.query_heads} query / {shape.kv_heads} KV heads · D {shape.head_dim} · pages of {shape.page_size}"
    return f"{timings.request.op} · {device} · {heads}{copy}"


def _cells(row: dict[str, Any]) -> list[str]:
    time = "-" if row["us"] is None else f"{row['us']:.1f} [{row['us_p10']:.1f}, {row['us_p90']:.1f}]"
    peer = (
        "-"
        if row["speedup"] is None
        else f"{row['speedup']:.2f} × ({row['best_16bit_peer']} {row['best_16bit_us']:.0f})"
    )
    return [
        row["dtype"],
        row["rotation"],
        str(row["batch"]),
        "-" if row["context"] is None else str(row["context"]),
        f"{row['read_bytes'] / 1e6:.1f}",
        time,
        "-" if row["gbps"] is None else f"{row['gbps']:.0f}",
        "-" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}",
        peer,
        f"{row['rel_error']:.1e} {row['gate']}",
    ]


def _notes(timings: Timings) -> list[str]:
    notes = [
        f"{entry['dtype']} ({entry['rotation']}), batch {entry['batch']}: "
        + (f"faster than 16 bits from {entry['context']} tokens on" if entry["context"] else "not faster than 16 bits")
        for entry in timings.break_even
    ]
    held = sorted({reason for row in timings.rows for reason in row["throttled"] or ()})
    if held:
        notes.append(f"the GPU's clocks were held back in some rows: {', '.join(held)}")
    return notes
