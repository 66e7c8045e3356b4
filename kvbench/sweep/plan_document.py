"""What a sweep would run, before it does: tables, time, what it could tell, and what is missing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvbench.files import unwritable
from kvbench.measured import of_records, prompt_forms
from kvbench.render import Column, Document, Table
from kvbench.sweep import estimate
from kvbench.sweep.clock import Clock, duration
from kvbench.sweep.command import Planned, not_done
from kvbench.sweep.parts import REAL, ModelFacts, Parts, Share, default_device
from kvbench.sweep.plan import Cell, done_otherwise, doubts, missing_data, too_large, too_long, unserved, unsuited
from kvbench.sweep.sensitivity import sensitivities, shown_size
from kvbench.tasks.throughput import RESERVE_BYTES

HOUR = 3600

Rows = list[dict[str, Any]]  # a cell each
Shares = Mapping[ModelFacts, Sequence[Share]]


def plan_rows(planned: Planned) -> Rows:
    """A row a cell, with what is known of it before it runs."""
    records = planned.contents.records
    clock = Clock(records.values())
    return [
        {
            "cell": cell.name,
            "model": cell.model.name,
            "compute_dtype": cell.model.compute_dtype,
            "dtype": cell.dtype,
            "rotation": cell.rotation,
            "task": cell.task.name,
            "scoring": cell.scoring,
            "limit": cell.limit,
            "task_limit": cell.task.identity().get("limit"),
            "bits_per_value": cell.bits_per_value,
            "kv_bytes_per_token": cell.kv_bytes_per_token,
            "max_length": cell.model.max_length,
            "status": records[cell.name].status if cell.name in records else "to run",
            "expected_seconds": clock.expect(cell.task.name),
            "estimated_seconds": None if clock.knows(cell.task.name) else _estimate(cell),
        }
        for cell in planned.cells
    ]


def _lacks(planned: Planned) -> list[str]:
    """What this machine or a model lacks to run the cells, one line each with what to do."""
    models = {cell.model.name: cell.model.missing for cell in planned.cells if cell.model.missing}
    place = unwritable(planned.store.folder)
    left = not_done(planned.cells, planned.contents, retry_failed=True)
    return (
        ([f"output {planned.store.folder}: {place}; --output takes another"] if place else [])
        + [f"model {name}: {todo}" for name, todo in models.items()]
        + missing_data(left)
        + too_large(left, default_device())
        + too_long(left)
        + unsuited(left)
        + unserved(left, planned.sweep.attention, default_device())
    )


def plan_document(planned: Planned, context: int | None = None, parts: Parts = REAL) -> Document:
    """What would run: its tables, and what they add up to."""
    rows = plan_rows(planned)
    shares = _shares(planned, parts)
    sections, notes = _tables(planned, rows, context, shares), _summary(planned, rows, shares)
    return Document(f"{planned.sweep.name}: what it would run", sections, notes=notes, rows=rows, fields=list(rows[0]))


def _shares(planned: Planned, parts: Parts) -> Shares:
    """Of each model that is spread and is here, what each GPU gets of it."""
    models = dict.fromkeys((cell.spec, cell.model) for cell in planned.cells if cell.spec.device_map)
    return {model: parts.divide(spec, model.compute_dtype) for spec, model in models if parts.divide and model.revision}


def _tables(planned: Planned, rows: Rows, context: int | None, shares: Shares) -> list[Table]:
    """A table a model: a row a scheme, a column a task with the state of its cell.

    context: tokens of the sequence whose bytes are stated; the model's longest where it is None.
    """
    tables = []
    for model in dict.fromkeys(cell.model for cell in planned.cells):
        of_model = [row for row in rows if (row["model"], row["compute_dtype"]) == (model.name, model.compute_dtype)]
        tasks = list(dict.fromkeys(row["task"] for row in of_model))
        first_cells = {(cell.dtype, cell.rotation): cell for cell in planned.cells if cell.model == model}
        length = context or model.max_length
        windowed = any(cell.scheme.window for cell in first_cells.values())
        at = [f"at {length} tokens"] if windowed and length else [] if model.layers else ["at D=128"]
        columns = [
            Column(("dtype",), numeric=False, prose=True),
            Column(("rotation",), numeric=False, prose=True, joins="none"),
            Column(("bits/value", *at)),
            Column(("KV KiB/", "token"), drop=2),
            Column(("KV MiB at", f"{length or '?'} tokens"), drop=1),
            *([Column(("tokens", "that fit"), drop=3)] if shares.get(model) else []),
            *(Column((task,), numeric=False, drop=place + 4) for place, task in enumerate(tasks)),
        ]
        table = []
        for dtype, rotation in dict.fromkeys((row["dtype"], row["rotation"]) for row in of_model):
            of_scheme = [row for row in of_model if (row["dtype"], row["rotation"]) == (dtype, rotation)]
            cell, status = first_cells[dtype, rotation], {row["task"]: row["status"] for row in of_scheme}
            size, sizes = cell.kv_bytes_per_token, ["-"] * 2
            if size and length and model.layers:
                whole = cell.scheme.nbytes(model.layers, length, cell.compute_dtype)
                sizes = [f"{size / 1024:.1f}", f"{whole / 2**20:.1f}"]
            bits = cell.bits_at(length) if length else cell.bits_per_value
            fits = [f"{_fitting(cell, shares[model]):,}"] if shares.get(model) else []
            table.append([dtype, rotation, f"{bits:.2f}", *sizes, *fits, *(status.get(task, "-") for task in tasks)])
        tables.append(Table(_model_line(model), columns, table))
    return tables


def _fitting(cell: Cell, shares: Sequence[Share]) -> int:
    """Tokens in the cache of the GPU that holds the fewest, beside its weights and room for a pass."""
    assert cell.model.layers is not None
    each = cell.resolved.layer_bytes(cell.model.layers)
    found = ((one.free - one.weights - RESERVE_BYTES) / sum(each[i] for i in one.layers) for one in shares)
    return max(0, int(min(found)))


def _memory(model: ModelFacts, shares: Sequence[Share]) -> list[str]:
    """What the weights take, and of a model that is spread on which GPU."""
    if shares:
        lines = [f"memory: {sum(one.weights for one in shares) / 2**30:.1f} GiB of weights ({model.name})"]
        lines[0] += f" over {len(shares)} GPUs, and the KV cache of the table"
        return lines + [
            f"  GPU {one.gpu}: layers {one.layers[0]} to {one.layers[-1]}, {one.weights / 2**30:.1f} GiB of the "
            f"{one.free / 2**30:.1f} that are free"
            for one in shares
        ]
    if model.quantized:
        method, size = model.quantized
        return [
            f"memory: {size / 2**30:.1f} GiB of {method} weights as stored ({model.name}), more where its library "
            f"expands them to {model.compute_dtype}, and the KV cache of the table"
        ]
    if not model.parameters:
        return []
    size = model.parameters * getattr(torch, model.compute_dtype).itemsize
    return [f"memory: {size / 2**30:.1f} GiB of weights ({model.name}), and the KV cache of the table"]


def _summary(planned: Planned, rows: Rows, shares: Shares) -> list[str]:
    """Lines below the tables: how much is left, how long that takes, what is missing, where results go."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed", "to run")}
    cells = "1 cell" if len(rows) == 1 else f"{len(rows)} cells"
    lines = [f"{cells}: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    lines += done_otherwise(planned.cells, planned.contents.records.values())
    lines += _time([row for row in rows if row["status"] == "to run"])
    for model in dict.fromkeys(cell.model for cell in planned.cells):
        lines += _memory(model, shares.get(model, ()))
    if planned.sweep.limit:
        lines.append(f"limit {planned.sweep.limit}: NOT A REAL SCORE")
    records = planned.contents.records.values()
    peaks = [record.timings["peak_memory_bytes"] for record in records if "peak_memory_bytes" in record.timings]
    if peaks:
        lines.append(f"peak memory {max(peaks) / 2**30:.1f} GiB in the cells done before")
    lines += prompt_forms((cell.task.name, cell.task.identity()) for cell in planned.cells)
    lines += _sensitivity(planned)
    lines += doubts([cell for cell in planned.cells if cell.name not in planned.contents.records])
    lacking = _lacks(planned)
    lines += ["missing here:", *(f"  {line}" for line in lacking)] if lacking else ["nothing is missing here"]
    return [*lines, str(planned.store.folder)]


def _estimate(cell: Cell) -> float | None:
    work, dtype = cell.task.work(), getattr(torch, cell.model.compute_dtype)
    if work is None or cell.model.parameters is None or (work.by_layer and cell.model.layers is None):
        return None
    if work.by_layer:
        work = replace(work, prompt_tokens=work.prompt_tokens * (1 + work.by_layer * len(cell.model.layers or ())))
    return estimate.seconds(work, cell.model.parameters, dtype.itemsize, estimate.rates(default_device(), dtype))


def _time(left: Sequence[dict[str, Any]]) -> list[str]:
    """Lines on how long these rows of cells take, and by what that is known."""
    # an estimate for a task goes before what another task took
    guessed = [row["estimated_seconds"] for row in left if row["estimated_seconds"] is not None]
    known = [row["expected_seconds"] for row in left if row["estimated_seconds"] is None]
    if not left:
        return []
    unknown = dict.fromkeys(row["task"] for row in left if row["estimated_seconds"] is row["expected_seconds"] is None)
    without = f"unknown until a cell is done of {', '.join(unknown)}"
    known = [seconds for seconds in known if seconds is not None]
    if not known and not guessed:
        return [f"time: {without}"]
    total = sum(known) + sum(guessed)
    by = ["by the cells done before"] * bool(known)
    by += [f"estimated by parameters, tokens and the speed of this {default_device()} just now"] * bool(guessed)
    low, high = sum(known) + sum(guessed) / estimate.FACTOR, sum(known) + sum(guessed) * estimate.FACTOR
    within = f" (± a factor of {estimate.FACTOR}: {duration(low)} to {duration(high)})" if guessed else ""
    lines = [f"time: about {duration(total)}{within}, {' and '.join(by)}"]
    if unknown:
        lines.append(f"  and {without}")
    if total > HOUR:
        lines.append("WARNING: more than an hour; --limit N, --only or --skip makes it shorter")
    return lines


def _sensitivity(planned: Planned) -> list[str]:
    """A line for each task and metric: the smallest difference that it can show, and whether that is wide."""
    margin = planned.sweep.margin
    records = list(planned.contents.records.values())
    rows = sensitivities(planned.cells, of_records(planned.store.folder, records, planned.store.run()), margin)
    if not rows:
        return []
    family = f"{'at least ' if rows[0].at_least else ''}{rows[0].family} comparisons"
    lines = [f"smallest difference that can be shown (80 % power, Holm over {family}; margin {margin}):"]
    for row in rows:
        name = f"{row.task} {row.metric}" if row.metric else row.task
        about = f"n={row.n or '?'}, {row.basis}"
        if row.smallest is None and row.n is not None:
            lines.append(f"  {name:24} no difference can be shown: {about}")
        else:
            wide = "   WIDER THAN THE MARGIN" if row.wide else ""
            lines.append(f"  {name:24} {shown_size(row.smallest, row.unit):>12}   {about}{wide}")
    return lines


def _model_line(model: ModelFacts) -> str:
    parts = [model.name, model.revision or "revision unknown", f"computes in {model.compute_dtype}"]
    for heads, head_dim in dict.fromkeys(model.layers or ()):
        count = (model.layers or ()).count((heads, head_dim))
        parts.append(f"{count} layers × {heads} KV heads × {head_dim}")
    return " · ".join(parts)
