"""What `kvbench sweep` and `kvbench plan` do once their arguments are parsed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvbench.environment import describe
from kvbench.files import unwritable
from kvbench.measured import of_records, prompt_forms
from kvbench.render import Column, Document, Table
from kvbench.results import DEFAULT_FOLDER, Contents, Record, Store
from kvbench.runners.model_files import RefusedError
from kvbench.stats import parse_margin
from kvbench.sweep import estimate
from kvbench.sweep.agreement import known
from kvbench.sweep.canary import Judgement, judge_all
from kvbench.sweep.config import Sweep, load_sweep
from kvbench.sweep.executors.base import Executor
from kvbench.sweep.executors.inline import Inline
from kvbench.sweep.executors.process import Processes
from kvbench.sweep.job import Job
from kvbench.sweep.parts import REAL, ModelFacts, Parts, default_device
from kvbench.sweep.plan import Cell, choose, done_otherwise, doubts, missing_data, plan, too_long, unserved, unsuited
from kvbench.sweep.progress import Clock, Display, duration
from kvbench.sweep.run import NotInEffectError, not_in_effect, run_cells
from kvbench.sweep.sensitivity import sensitivities, shown_size
from kvbench.sweep.stopping import UnusableError, terminable
from kvbench.yaml_text import ConfigError

HOUR = 3600
OK, GATE_FAILED, SOME_FAILED, INTERRUPTED = 0, 1, 3, 130


@dataclass(frozen=True)
class Options:
    """The flags of `kvbench sweep`; its help says what they mean."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    settings: Sequence[str] = ()
    limit: int | None = None
    output: Path | None = None
    fresh: bool = False
    retry_failed: bool = False
    devices: Sequence[str] = ()
    executor: str | None = None
    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Planned:
    """A sweep laid out: all its cells, those that the filters leave, its run folder, and what will run them.

    known: how a comparison of its model with transformers ended elsewhere, as a Job has it.
    """

    sweep: Sweep
    every: list[Cell]
    cells: list[Cell]
    store: Store
    executor: Executor
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def contents(self) -> Contents:
        """What the run folder held when it was first asked for."""
        return self.store.load()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """`plan_rows`, made once."""
        return plan_rows(self)


def prepare(path: Path, options: Options, parts: Parts | None = None, executor: Executor | None = None) -> Planned:
    """The cells that a command line means. executor: what runs them, where it is there already.

    Raises:
        ConfigError: the file or a flag is wrong.
        UnusableError: there is no cluster.
    """
    parts = parts or REAL
    sweep = load(path, options, parts)
    executor = executor or make_executor(options, parts)
    return lay_out(suited(sweep, options, executor), options, parts, executor)


def load(path: Path, options: Options, parts: Parts) -> Sweep:
    """The sweep of a file, with what the flags say of it.

    Raises:
        ConfigError: the file or a flag is wrong.
    """
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    return load_sweep(path, [*options.settings, *limit], parts=parts)


def suited(sweep: Sweep, options: Options, executor: Executor) -> Sweep:
    """The sweep, where it says nothing computing in what a cluster would: that decides the numbers."""
    if executor.device == default_device() or sweep.compute_dtype is not None or options.executor != "ray":
        return sweep
    return sweep.model_copy(update={"compute_dtype": "float32" if executor.device == "cpu" else "bfloat16"})


def lay_out(sweep: Sweep, options: Options, parts: Parts, executor: Executor) -> Planned:
    """The cells of a sweep that the filters leave.

    Raises:
        ConfigError: a flag is wrong.
    """
    every = plan(sweep, parts=parts, device=lambda: executor.device_name)
    cells = choose(every, options.only, options.skip)
    if not cells:
        raise ConfigError("--only and --skip together leave no cell")
    store = Store(options.output or DEFAULT_FOLDER / sweep.name)
    if re.match(r"[a-z][a-z0-9+]*:/", str(store.folder)):
        raise ConfigError(
            f"--output {store.folder}: a run folder is a path, also a mounted one; object stores can't rename, so copy "
            "the folder there when the sweep is done"
        )
    if store.foreign:
        raise ConfigError(f"{store.folder} {store.foreign}; --output takes a run folder, or a new one")
    return Planned(sweep, every, cells, store, executor)


def run_sweep(path: Path, options: Options, parts: Parts | None = None) -> int:
    """Runs what is not done yet, and returns the exit code.

    Raises:
        ConfigError: the file or a flag is wrong, or a model would be measured wrongly.
        UnusableError: a model or data is missing, or another sweep writes to the folder.
    """
    parts = parts or REAL
    planned = prepare(path, options, parts)
    try:
        with terminable():
            absent = fetch_models(planned.cells, parts)
            if any(cell.model.missing for cell in planned.cells):  # they were: now their revisions are known
                planned = prepare(path, options, parts, planned.executor)
            return measure(planned, options, parts, absent)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; finished work is kept. The same command continues it.\n")
        return INTERRUPTED


def measure(planned: Planned, options: Options, parts: Parts, absent: Sequence[str] = ()) -> int:
    """Runs what is not done, with the sole right to write, and returns the exit code.

    What a task raises is its cell's; an OSError here is the run folder's. absent: a line for each model that is.
    """
    folder = planned.store.folder
    try:
        with planned.store.writing():
            return _run(planned, options, parts, absent)
    except BlockingIOError:
        raise UnusableError(f"another sweep is writing to {folder}") from None
    except OSError as error:
        where = f": {error.filename}" if error.filename and not str(error.filename).startswith(str(folder)) else ""
        raise UnusableError(
            f"cannot write to {folder}: {error.strerror or error}{where}; finished work is kept"
        ) from error


def fetch_models(cells: Sequence[Cell], parts: Parts) -> list[str]:
    """Brings the models here that are not; returns a line for each that can't be had."""
    lines = []
    for spec in dict.fromkeys(cell.spec for cell in cells if cell.model.missing):
        try:
            parts.fetch_model(spec)
        except ValueError as error:
            lines.append(str(error))
    return lines


def _run(planned: Planned, options: Options, parts: Parts, absent: Sequence[str]) -> int:
    sweep, store, cells = planned.sweep, planned.store, planned.cells
    contents = store.load()
    _check_run(planned, contents, options.fresh)
    todo = cells if options.fresh else _left(cells, contents, options.retry_failed)
    if lacking := [*absent, *missing_data(todo)]:
        lacking += done_otherwise(cells, contents.records.values())
        lacking.append("--skip task=NAME or --skip model=NAME runs the rest")
    if lacking := planned.executor.missing(todo) + lacking:
        raise UnusableError("\n  ".join(["this machine lacks what the sweep needs", *lacking]))
    if options.fresh:
        store.remove(None if len(cells) == len(planned.every) else [cell.name for cell in cells])
        contents = store.load()

    environment = {**describe(), "device": planned.executor.device}
    display = Display(todo, Clock(contents.records.values()), store.cells, before=len(cells) - len(todo))
    for problem in contents.problems:
        display.say(problem, "yellow")
    before = [contents.records[cell.name].status for cell in cells if cell.name in contents.records]
    display.say(_header(sweep, len(cells), before, environment))
    for line in done_otherwise(cells, contents.records.values()):
        display.say(line, "yellow")
    _write_run(planned, [])
    if _unmoved(planned, contents.records):
        return _conclude(planned, display, contents.records)
    job = Job(
        baselines=store,
        baseline=sweep.baseline_scheme,
        page_size=sweep.page_size,
        attention=sweep.attention,
        device=planned.executor.device,
        environment=environment,
        parts=parts,
        agreement=sweep.agreement,
        known={**planned.known, **known(contents.records.values())},
    )
    # an unmoved canary is named by the conclusion, which also sees those that were run before
    with display, contextlib.suppress(NotInEffectError):
        try:
            run_cells(planned.executor, todo, job, store, display, contents.records)
        except RefusedError as error:
            others = len({cell.model.name for cell in cells}) > 1
            raise ConfigError(f"{error}{'; --skip model=NAME runs the rest' if others else ''}") from error
    return _conclude(planned, display, contents.records)


def _check_run(planned: Planned, contents: Contents, fresh: bool) -> None:
    """Raises ConfigError where records stay of another sweep, or of another margin, which is fixed before them."""
    if fresh and len(planned.cells) == len(planned.every):
        return
    run = planned.store.run()
    stays = contents.records.keys() - {cell.name for cell in planned.cells if fresh}
    named, name = run.get("sweep"), planned.sweep.name
    if stays and named and named != name:
        raise ConfigError(
            f"{planned.store.folder} is a run of the sweep '{named}', and this is '{name}': take another --output, or "
            f"add to that run with --set name={named}"
        )
    fixed, wanted = run.get("config", {}).get("margin"), planned.sweep.margin
    if stays and fixed and parse_margin(fixed) != parse_margin(wanted):
        raise ConfigError(
            f"margin {wanted}: {planned.store.folder} was measured under margin {fixed}, fixed before its first cell; "
            f"keep that, start over with --fresh, or take another --output. compare --margin {wanted} changes nothing"
        )


def make_executor(options: Options, parts: Parts = REAL) -> Executor:
    """What runs the cells: this process on a CPU, and on GPUs, or devices by name, a process each.

    A GPU has a process unless `inline` is asked for: after a fault its memory is free when that process has ended.

    Raises:
        ConfigError: flags that do not go together.
        UnusableError: there is no cluster.
    """
    device = default_device()
    if options.executor != "ray" and (options.address is not None or options.workers is not None):
        raise ConfigError("--address and --workers are of a cluster: add --executor ray")
    if options.executor == "ray":
        if options.devices:
            raise ConfigError("--executor ray takes no --devices: it runs on the GPUs of the cluster; see --workers")
        from kvbench.sweep.executors.ray import Ray

        return Ray(options.address, options.workers, parts)
    if options.executor == "inline" and options.devices:
        raise ConfigError("--executor inline takes no --devices: it runs in this process, on the first GPU or the CPU")
    if options.executor == "inline" or (options.executor is None and not options.devices and device == "cpu"):
        return Inline(device)
    return Processes(options.devices or [device])


def _left(cells: Sequence[Cell], contents: Contents, retry_failed: bool) -> list[Cell]:
    """The cells without a record, and with `retry_failed` those that failed."""
    kept = {name for name, record in contents.records.items() if record.status == "done" or not retry_failed}
    return [cell for cell in cells if cell.name not in kept]


def _unmoved(planned: Planned, records: dict[str, Record]) -> list[Judgement]:
    """The canaries of the sweep that were measured and not wrecked."""
    judgements = judge_all([records[cell.name] for cell in planned.every if cell.name in records])
    return [one for one in judgements if one.verdict == "unmoved"]


def _header(sweep: Sweep, cells: int, before: Sequence[str], environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    versions = environment.get("versions") or {}
    machine = gpus[0]["name"] if gpus and environment["device"] != "cpu" else environment.get("cpu") or "CPU"
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name)
    )
    limit = f"first {sweep.limit} documents: NOT A REAL SCORE" if sweep.limit else ""
    counts = [f"{before.count(status)} {status} before" for status in ("done", "failed") if status in before]
    parts = [sweep.name, f"{cells} cells", *counts, f"{machine}, {software}", limit]
    return " · ".join(part for part in parts if part)


def _write_run(planned: Planned, judgements: list[dict[str, Any]]) -> None:
    sweep = planned.sweep
    baseline = sweep.baseline_scheme
    schemes = {scheme.label: scheme for scheme in [baseline, *sweep.all_schemes()]}
    planned.store.write_run(
        {
            "sweep": sweep.name,
            "note": sweep.note,
            # cells that measure a distance from the exact cache themselves have none
            "baseline": baseline.columns() if any(cell.baseline for cell in planned.every) else None,
            "schemes": [scheme.columns() for scheme in schemes.values()],
            "cells": [cell.name for cell in planned.every],
            "canary": judgements if judgements or sweep.canary else None,
            "config": sweep.config(),
        }
    )


def _conclude(planned: Planned, display: Display, records: dict[str, Record]) -> int:
    """The last lines, and the exit code."""
    _write_run(planned, [asdict(judgement) for judgement in judge_all(list(records.values()))])
    judgements = judge_all([records[cell.name] for cell in planned.every if cell.name in records])
    here = [records[cell.name] for cell in planned.cells if cell.name in records]
    failed = [record for record in here if record.status == "failed"]
    undecided = [one for one in judgements if one.verdict == "undecided"]
    unmoved = _unmoved(planned, records)
    for one in undecided:
        display.say(f"canary undecided: {one.model}, {one.task}: {one.why}", "yellow")
    if failed:
        display.say(f"{len(failed)} of {len(planned.cells)} cells failed; --retry-failed runs them again", "red")
    if unmoved:
        display.say(f"error: {not_in_effect(unmoved)}", "red")
    else:
        display.say(
            f"{len(here) - len(failed)} of {len(planned.cells)} cells done · kvbench report {planned.store.folder}"
        )
    return GATE_FAILED if unmoved else SOME_FAILED if failed else OK


# ---- plan


def plan_rows(planned: Planned) -> list[dict[str, Any]]:
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


def plan_lacks(planned: Planned) -> list[str]:
    """What this machine or a model lacks to run the cells, one line each with what to do."""
    models = {cell.model.name: cell.model.missing for cell in planned.cells if cell.model.missing}
    place = unwritable(planned.store.folder)
    left = _left(planned.cells, planned.contents, retry_failed=True)
    return (
        ([f"output {planned.store.folder}: {place}; --output takes another"] if place else [])
        + [f"model {name}: {todo}" for name, todo in models.items()]
        + missing_data(left)
        + too_long(left)
        + unsuited(left)
        + unserved(left, planned.sweep.attention, default_device())
    )


def plan_document(planned: Planned, context: int | None = None) -> Document:
    """What would run: its tables, and what they add up to."""
    rows = planned.rows
    sections, notes = plan_tables(planned, context), plan_summary(planned)
    return Document(f"{planned.sweep.name}: what it would run", sections, notes=notes, rows=rows, fields=list(rows[0]))


def plan_tables(planned: Planned, context: int | None = None) -> list[Table]:
    """A table a model: a row a scheme, a column a task with the state of its cell.

    context: tokens of the sequence whose bytes are stated; the model's longest where it is None.
    """
    rows = planned.rows
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
            Column(("rotation",), numeric=False, prose=True),
            Column(("bits/value", *at)),
            Column(("KV KiB/", "token"), drop=2),
            Column(("KV MiB at", f"{length or '?'} tokens"), drop=1),
            *(Column((task,), numeric=False, drop=place + 3) for place, task in enumerate(tasks)),
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
            table.append([dtype, rotation, f"{bits:.2f}", *sizes, *(status.get(task, "-") for task in tasks)])
        tables.append(Table(_model_line(model), columns, table))
    return tables


def plan_summary(planned: Planned) -> list[str]:
    """Lines below the tables: how much is left, how long that takes, what is missing, where results go."""
    rows = planned.rows
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed", "to run")}
    lines = [f"{len(rows)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    lines += done_otherwise(planned.cells, planned.contents.records.values())
    lines += _time([row for row in rows if row["status"] == "to run"])
    for model in dict.fromkeys(cell.model for cell in planned.cells):
        if model.parameters:
            size = model.parameters * getattr(torch, model.compute_dtype).itemsize
            lines.append(f"memory: {size / 2**30:.1f} GiB of weights ({model.name}), and the KV cache of the table")
    if planned.sweep.limit:
        lines.append(f"limit {planned.sweep.limit}: NOT A REAL SCORE")
    records = planned.contents.records.values()
    peaks = [record.timings["peak_memory_bytes"] for record in records if "peak_memory_bytes" in record.timings]
    if peaks:
        lines.append(f"peak memory {max(peaks) / 2**30:.1f} GiB in the cells done before")
    lines += prompt_forms((cell.task.name, cell.task.identity()) for cell in planned.cells)
    lines += plan_sensitivity(planned)
    lines += doubts([cell for cell in planned.cells if cell.name not in planned.contents.records])
    lacking = plan_lacks(planned)
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


def plan_sensitivity(planned: Planned) -> list[str]:
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
