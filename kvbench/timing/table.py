"""Rows as people and programs read them."""

from __future__ import annotations

import json
from typing import Any

from kvbench.render import csv, markdown, text
from kvbench.results import shown_megabytes
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
    "vs same dtype",
    "rel. error",
)
TEXT = 2  # columns, before the numbers


def render(timings: Timings, how: str) -> str:
    """The rows as `table`, `md`, `csv` or `json` (a list of the rows)."""
    if how == "json":
        return json.dumps(timings.rows, indent=1)
    if how == "csv":
        columns = [name for name in timings.rows[0] if name != "samples_us"] if timings.rows else []
        rows = [{name: row[name] for name in columns} for row in timings.rows]
        plain = [{name: json.dumps(one) if isinstance(one, dict) else one for name, one in row.items()} for row in rows]
        return csv.table(columns, plain).rstrip("\n")
    cells = [_cells(row) for row in timings.rows]
    numeric = range(TEXT, len(HEADER))
    if how == "md":
        lines = markdown.table(HEADER, cells, numeric)
        notes = map(markdown.plain, _notes(timings))
        return "\n".join([markdown.plain(_title(timings)), "", *lines, "", *notes]).rstrip()
    return text.seen("\n".join([_title(timings), text.table(HEADER, cells, numeric), *_notes(timings)]))


def _title(timings: Timings) -> str:
    shape = timings.request.shape
    device = timings.device or "no GPU: gates only, in the interpreter; nothing was timed"
    copy = f" · copy bandwidth {timings.copy_gbps:.0f} GB/s (measured now)" if timings.copy_gbps else ""
    heads = f"{shape.query_heads} query / {shape.kv_heads} KV heads · D {shape.head_dim} · pages of {shape.page_size}"
    return f"{timings.request.op} · {device} · {heads}{copy}"


def _cells(row: dict[str, Any]) -> list[str]:
    time = "-" if row["us"] is None else f"{row['us']:.1f} [{row['us_p10']:.1f}, {row['us_p90']:.1f}]"
    return [
        row["dtype"],
        row["rotation"],
        str(row["batch"]),
        "-" if row["context"] is None else str(row["context"]),
        "-" if row["read_bytes"] is None else shown_megabytes(row["read_bytes"]),
        time,
        "-" if row["gbps"] is None else f"{row['gbps']:.0f}",
        "-" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}",
        _ratio(row["speedup"], row["best_16bit_peer"], row["best_16bit_us"]),
        _ratio(row["same_dtype_speedup"], row["same_dtype_peer"], row["same_dtype_us"]),
        "-" if row["rel_error"] is None else f"{row['rel_error']:.1e} {row['gate']}",
    ]


def _ratio(speedup: float | None, peer: str | None, us: float | None) -> str:
    """`3.22 × (sdpa-cudnn 350)`: how many times faster than a peer of so many microseconds; `-` for None."""
    return "-" if speedup is None else f"{speedup:.2f} × ({peer} {us:.0f})"


def _notes(timings: Timings) -> list[str]:
    sizes = {(row["batch"], row["context"]): row["peers"] for row in timings.rows if row["peers"]}
    notes = [
        f"16 bits at {batch} × {context}, µs: "
        + ", ".join(f"{name} {us:.1f}" for name, us in sorted(peers.items(), key=lambda peer: peer[1]))
        for (batch, context), peers in sizes.items()
    ]
    notes += [
        f"{entry['dtype']} ({entry['rotation']}), batch {entry['batch']}: "
        + (f"faster than 16 bits from {entry['context']} tokens on" if entry["context"] else "not faster than 16 bits")
        for entry in timings.break_even
    ]
    reasons = dict.fromkeys((name, why) for row in timings.rows for name, why in row["peers_skipped"].items())
    notes += [f"{name} was not timed: {why}" for name, why in reasons]
    refused = dict.fromkeys((row["dtype"], row["rotation"], row["gate"]) for row in timings.rows)
    notes += [f"{d} ({r}) was {why}" for d, r, why in refused if why.startswith("refused")]
    held = sorted({reason for row in timings.rows for reason in row["throttled"] or ()})
    if held:
        notes.append(f"the GPU's clocks were held back in some rows: {', '.join(held)}")
    return notes
