"""What the cells of a table took: memory and tokens per second, as their runner measured them. Loads without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from kvbench.render import Column, Table
from kvbench.results import Record, shown_number

MEASURED = ("peak_memory_bytes", "kv_bytes_per_token", "prefill_seconds", "decode_seconds")
NOTE = (
    "over all tasks of a row: tokens and seconds in the model summed, what was shared counted once; "
    "peak memory is the allocator's on the GPU, weights included"
)


def cost_table(title: str, records: Sequence[Record]) -> Table | None:
    """A row a scheme over all its cells; None where no runner measured anything."""
    done = [record for record in records if record.status == "done"]
    if not any(name in record.timings for record in done for name in MEASURED):
        return None
    schemes: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in done:
        schemes[record.dtype, record.rotation].append(record)
    columns = [
        Column(("", "dtype"), numeric=False, prose=True),
        Column(("", "rotation"), numeric=False, prose=True, joins="none"),
        Column(("peak memory", "MiB")),
        Column(("KV bytes/token", "computed"), drop=2),
        Column(("KV bytes/token", "measured"), drop=4),
        Column(("prefill", "tokens/s"), drop=1),
        Column(("decode", "tokens/s")),
        Column(("all cells", "s"), drop=3),
    ]
    rows = []
    for (dtype, rotation), cells in schemes.items():
        peaks = [record.timings["peak_memory_bytes"] for record in cells if "peak_memory_bytes" in record.timings]
        sizes = {record.timings["kv_bytes_per_token"] for record in cells if "kv_bytes_per_token" in record.timings}
        seconds = [record.timings["seconds"] for record in cells if "seconds" in record.timings]
        row = [
            f"{max(peaks) / 2**20:.0f}" if peaks else "-",
            f"{cells[0].kv_bytes_per_token:.0f}" if cells[0].kv_bytes_per_token else "-",
            ", ".join(shown_number(value) for value in sorted(sizes)) or "-",
            _rate(cells, "prefill"),
            _rate(cells, "decode"),
            f"{sum(seconds):.1f}" if seconds else "-",
        ]
        rows.append([dtype, rotation, *row])
    odd = [f"{record.cell}: {record.facts['kv_bytes']}" for record in done if "kv_bytes" in record.facts]
    notes = [NOTE]
    if any(record.throughput for record in done):
        notes.append("tokens/s here are without throughput's: it has columns of its own above")
    return Table(f"{title} · cost", columns, rows, odd, notes)


def _rate(cells: Sequence[Record], what: str) -> str:
    """Tokens per second over all cells that measured them. Those of throughput began with a run that compiles."""
    tokens, seconds = f"{what}_tokens", f"{what}_seconds"
    timed = [
        one.timings for one in cells if one.timings.get(seconds, 0) > 0 and tokens in one.timings and not one.throughput
    ]
    spent = sum(timings[seconds] for timings in timed)
    return f"{sum(timings[tokens] for timings in timed) / spent:.0f}" if timed else "-"
