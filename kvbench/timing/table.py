"""Rows as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvbench.render import Column, Document, Table
from kvbench.results import shown_megabytes
from kvbench.timing.grid import SMALL_BATCH, SMALL_CONTEXT, Timings

COLUMNS = (
    Column(("dtype",), numeric=False, prose=True),
    Column(("rotation",), numeric=False, prose=True, joins="none"),
    Column(("batch",)),
    Column(("context",)),
    Column(("read MB",), drop=4),
    Column(("µs [p10, p90]",)),
    Column(("GB/s",), drop=3),
    Column(("of copy",), drop=1),
    Column(("vs 16-bit",)),
    Column(("vs same dtype",), drop=2),
    Column(("rel. error",)),
)


def document(done: Sequence[Timings]) -> Document:
    """A table a grid; as programs read them, all rows together, with their samples in JSON alone."""
    sections = [Table(_title(one), COLUMNS, [_cells(row) for row in one.rows], notes=_notes(one)) for one in done]
    rows = [row for one in done for row in one.rows]
    fields = [name for name in (rows[0] if rows else {}) if name != "samples_us"]
    return Document("kernels", sections, rows=rows, fields=fields)


def _untimed(timings: Timings) -> str:
    """What was done without a GPU, and that it is not the shape that was asked for."""
    request = timings.request
    sizes = f"batch {SMALL_BATCH} in place of {', '.join(map(str, request.batches))}"
    if request.op != "write":
        sizes += f", context {SMALL_CONTEXT} in place of {', '.join(map(str, request.contexts))}"
    return f"no GPU: nothing timed, only checked, in the interpreter and at a small size: {sizes}"


def _title(timings: Timings) -> str:
    shape = timings.request.shape
    device = timings.device or _untimed(timings)
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
