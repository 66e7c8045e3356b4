"""What `kvbench sweep` and `kvbench plan` do once their arguments are parsed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.environment import describe
from kvbench.results import DEFAULT_FOLDER, Contents, Record, Store
from kvbench.runners.model_files import RefusedError
from kvbench.stats import parse_margin
from kvbench.sweep.agreement import known
from kvbench.sweep.canary import Judgement, judge_all
from kvbench.sweep.clock import Clock
from kvbench.sweep.config import Sweep, load_sweep
from kvbench.sweep.executors.base import Executor
from kvbench.sweep.executors.inline import Inline
from kvbench.sweep.executors.process import Processes
from kvbench.sweep.job import Job
from kvbench.sweep.parts import REAL, Parts, default_device
from kvbench.sweep.plan import Cell, choose, done_otherwise, missing_data, plan
from kvbench.sweep.run import NotInEffectError, not_in_effect, run_cells
from kvbench.sweep.stopping import UnusableError, terminable
from kvbench.yaml_text import ConfigError

if TYPE_CHECKING:
    from kvbench.sweep.progress import Display

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
    every = plan(sweep, parts=parts, device=lambda: executor.device_name, gpus=executor.gpus)
    cells = choose(every, options.only, options.skip)
    if not cells:
        raise ConfigError("--only and --skip together leave no cell")
    return Planned(sweep, every, cells, run_folder(sweep, options), executor)


def run_folder(sweep: Sweep, options: Options) -> Store:
    """Where a sweep's results go.

    Raises:
        ConfigError: it is no place for a run.
    """
    store = Store(options.output or DEFAULT_FOLDER / sweep.name)
    if store.foreign:
        raise ConfigError(f"{store.folder} {store.foreign}; --output takes a run folder, or a new one")
    return store


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
    from kvbench.sweep.progress import Display  # imports rich, which a plan has no use for

    sweep, store, cells = planned.sweep, planned.store, planned.cells
    contents = store.load()
    _check_run(planned, contents, options.fresh)
    todo = cells if options.fresh else not_done(cells, contents, options.retry_failed)
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


def not_done(cells: Sequence[Cell], contents: Contents, retry_failed: bool) -> list[Cell]:
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
