"""The command line: parses, calls one layer, prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from kvbench.measured import Measured
    from kvbench.report.table import Table
    from kvbench.report.timings import SpeedComparison
    from kvbench.sweep.command import Options, Planned

# 3 comes from the sweep itself
GATE_FAILED, BAD_INPUT, UNUSABLE, NOTHING_TO_COMPARE, INTERRUPTED = 1, 2, 4, 5, 130

EPILOG = (
    "Exit codes: 0 all done and gates passed; 1 a gate failed; 2 bad usage or config; 3 finished, some cells failed; "
    "4 environment unusable; 5 not comparable, or nothing to report or compare; 130 interrupted, resumable."
)

# plain help: rich would take longer to import than all the rest
app = typer.Typer(
    name="kvbench",
    help="How few bits can a language model's KV cache have, at what cost in accuracy, and how sure are we?",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ls = typer.Typer(
    name="ls", help="List dtypes, rotations, tasks or models.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(ls)


class ReportFormat(StrEnum):
    """How a report is printed."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"


class Operation(StrEnum):
    """What a kernel does."""

    DECODE = "decode"
    PREFILL = "prefill"
    WRITE = "write"
    MIXED = "mixed"


class ListFormat(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    JSON = "json"


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The sweep's YAML file.", show_default=False)]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=PATTERN", help="Only cells that match, such as dtype=int4*; repeatable."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="KEY=PATTERN", help="No cells that match, such as task=gsm8k; repeatable."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the YAML: tasks[0].limit=50; repeatable."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", help="A quick look at N documents a task: NOT A REAL SCORE."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The run folder.  [default: results/<sweep name>]")
]
AsList = Annotated[ListFormat, typer.Option("--format", help="A table, or JSON.")]


# ---- verbs


@app.command()
def sweep(
    config: Config,
    only: Only = None,
    skip: Skip = None,
    settings: Set = None,
    limit: Limit = None,
    output: Output = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier results and start over.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="0,1",
            help="Run on these GPUs at once, a process each; or cpu,cpu.  [default: the first GPU, else the CPU]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and run nothing.")] = False,
) -> None:
    """Run the cells of CONFIG that are not done yet.

    A cell is one model × dtype × rotation × task. What is done is kept, whatever stops the sweep.
    """
    from kvbench.sweep.command import UnusableError, run_sweep

    options = _options(only, skip, settings, limit, output, fresh, retry_failed, devices)
    if dry_run:
        _print_plan(_prepared(config, options))
        return
    from kvbench.sweep.document import ConfigError

    try:
        code = run_sweep(config, options)
    except ConfigError as error:
        fail(error, BAD_INPUT)
    except UnusableError as error:
        fail(error, UNUSABLE)
    raise typer.Exit(code)


@app.command()
def plan(
    config: Config,
    only: Only = None,
    skip: Skip = None,
    settings: Set = None,
    limit: Limit = None,
    output: Output = None,
    as_format: AsList = ListFormat.TABLE,
) -> None:
    """Show what a sweep would run.

    Its cells, their true bits and KV memory, what is done, the smallest difference that each task can show, and what is
    missing on this machine. Runs nothing.
    """
    planned = _prepared(config, _options(only, skip, settings, limit, output))
    if as_format == ListFormat.JSON:
        from kvbench.sweep.command import plan_rows

        print(json.dumps(plan_rows(planned), indent=1))
    else:
        _print_plan(planned)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    kernels: Annotated[
        Path | None,
        typer.Option("--kernels", metavar="DIR", help="Another one, whose kernels' speed stands beside accuracy."),
    ] = None,
    as_format: Annotated[ReportFormat, typer.Option("--format", help="What to print.")] = ReportFormat.TABLE,
) -> None:
    """Print and write the tables of a run folder.

    Puts report.md, report.csv and report.json into it.
    """
    from kvbench.report.tables import LEGEND, Report
    from kvbench.results import NotARunError

    try:
        found = Report.read(folder, kernels)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except FileNotFoundError as error:
        fail(error, BAD_INPUT)
    if as_format == ReportFormat.TABLE:
        for table in found.tables():
            _print_table(table)
        print("\n".join([LEGEND, *found.summary()]))
    else:
        print({"md": found.markdown, "csv": found.csv, "json": found.json}[as_format.value](), end="")
        for problem in found.problems:
            print(problem, file=sys.stderr)
    try:
        first, *others = found.write()
    except OSError as error:
        print(f"not written: {error.filename}: {error.strerror}", file=sys.stderr)
    else:
        names = " · ".join([str(first), *(path.name for path in others)])
        print(names, file=sys.stdout if as_format == ReportFormat.TABLE else sys.stderr)


Margin = Annotated[
    str | None,
    typer.Option(
        "--margin", metavar="Npp", help="The difference that does not matter.  [default: the sweep's, or 1pp]"
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline", metavar="DTYPE[/ROTATION]", help="Compare with it.  [default: the sweep's; of timings fp16]"
    ),
]


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or kernel timings.", show_default=False)],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR2]", help="Another: its cells against the same of DIR.", show_default=False),
    ] = None,
    baseline: Baseline = None,
    margin: Margin = None,
    as_format: Annotated[ReportFormat, typer.Option("--format", help="What to print.")] = ReportFormat.TABLE,
) -> None:
    """Compare every cell with its baseline on the same documents.

    Differences with 95 % intervals, paired tests, p after Holm over the whole report, and a verdict. With DIR2 and
    --baseline, the cells of DIR2 are compared with that baseline of DIR. Exits 5 where a pair had to be refused.
    """
    from kvbench import measured
    from kvbench.report import compare as comparing
    from kvbench.report import timings
    from kvbench.results import NotARunError

    try:
        if timings.is_timings(folder):
            before, after = timings.read(folder), timings.read(other) if other else None
            rows = timings.compare_speed(before, after, baseline, margin)
            _print_speed(rows, as_format)
            if not rows or any(row.verdict == "INVALID" for row in rows):
                raise typer.Exit(NOTHING_TO_COMPARE)
            return
        first, second = measured.read(folder), measured.read(other) if other else None
        if empty := next((one for one in (first, second) if one and not one.cells), None):
            raise NotARunError(
                f"nothing to compare: {empty.path} holds no cell of a model; times are compared with times"
            )
        scheme = comparing.find_scheme(first.schemes, baseline, first.baseline) if baseline else None
        found = comparing.compare(first, second, baseline=scheme, margin=margin)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (FileNotFoundError, ValueError) as error:
        fail(error, BAD_INPUT)
    if as_format == ReportFormat.TABLE:
        for title, table in comparing.tables(found):
            print(title)
            _print_rows(comparing.HEADERS, table, comparing.NUMERIC)
            print()
        print("\n".join([comparing.LEGEND, *comparing.summary(first, found, second)]))
    elif as_format == ReportFormat.MD:
        print(comparing.markdown(first, found, second), end="")
    else:
        print(
            comparing.rows_json(found.rows) if as_format == ReportFormat.JSON else comparing.rows_csv(found.rows),
            end="",
        )
    if found.invalid or not found.family:
        raise typer.Exit(NOTHING_TO_COMPARE)


def _print_speed(rows: Sequence[SpeedComparison], as_format: ReportFormat) -> None:
    from kvbench.report import compare as comparing
    from kvbench.report import timings

    if as_format == ReportFormat.TABLE:
        _print_rows(timings.HEADERS, timings.table(rows), timings.NUMERIC)
    elif as_format == ReportFormat.MD:
        print("\n".join(comparing.markdown_table(timings.HEADERS, timings.table(rows), timings.NUMERIC)))
    else:
        print(comparing.rows_json(rows) if as_format == ReportFormat.JSON else comparing.rows_csv(rows), end="")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="BASELINE", help="A run folder, or a file that --write made.")
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="WHAT",
            help="worse (by the test), drop (by more than the margin), missing (a cell), inconclusive, skipped; "
            "repeatable.  [default: worse, drop and missing]",
        ),
    ] = None,
    margin: Margin = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Instead: keep DIR as a baseline file to commit.")
    ] = None,
) -> None:
    """Fail where a run got worse than an earlier one: a gate for continuous integration.

    Scores and, of two run folders of `kvbench kernel --output`, times. Prints a line for each regression. Exits 1 on
    one, 5 where nothing could be compared.
    """
    from kvbench import measured
    from kvbench.report import gate, timings
    from kvbench.results import NotARunError, Store

    unknown = set(fail_on or ()) - set(gate.FAILURES)
    if (against is None) == (write is None):
        fail("give either --against BASELINE or --write FILE", BAD_INPUT)
    if unknown:
        fail(f"--fail-on {unknown.pop()}: expected one of {', '.join(gate.FAILURES)}", BAD_INPUT)
    try:
        here = measured.read(folder)
        if write:
            _keep(here, write, any(record.kernel for record in Store(folder).load().records.values()))
            return
        assert against is not None
        before, wanted = measured.read(against), fail_on or gate.DEFAULT_FAILURES
        times = timings.find(folder), timings.find(against)
        found = gate.check(here, before, wanted, margin) + gate.check_times(*times, wanted, margin or before.margin)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (OSError, ValueError) as error:
        fail(error, BAD_INPUT)
    for line in found.failed:
        print(f"FAILED {line}")
    for line in found.skipped:
        print(f"skipped {line}")
    print(
        "\n".join(
            [*found.notes, f"{found.compared} compared, {len(found.failed)} failed, {len(found.skipped)} skipped"]
        )
    )
    if found.failed:
        raise typer.Exit(GATE_FAILED)
    if not found.compared:
        raise typer.Exit(NOTHING_TO_COMPARE)


def _keep(here: Measured, write: Path, timed: bool) -> None:
    from kvbench import measured

    if timed and not here.cells:
        fail(
            f"{here.path} holds kernel times alone, and a baseline file has none: commit the folder", NOTHING_TO_COMPARE
        )
    try:
        measured.write(here, write)
    except OSError as error:
        why = error.strerror if write.parent.is_dir() else f"there is no folder {write.parent}"
        fail(f"cannot write {write}: {why}; --write takes a file in a folder that is there", BAD_INPUT)
    if timed:
        print("kernel times are not kept in it: --against a run folder compares them", file=sys.stderr)
    print(write)


@app.command()
def show(
    cell: Annotated[Path, typer.Argument(metavar="CELL", help="A cell's folder, DIR/cells/NAME.", show_default=False)],
    as_format: AsList = ListFormat.TABLE,
) -> None:
    """List the documents of a cell whose score moved against the baseline, with both answers."""
    from dataclasses import asdict

    from kvbench.report.flips import NotComparableError, flips
    from kvbench.results import NotARunError

    try:
        found = flips(cell)
    except FileNotFoundError as error:
        fail(error, BAD_INPUT)
    except (NotARunError, NotComparableError) as error:
        fail(error, NOTHING_TO_COMPARE)
    if as_format == ListFormat.JSON:
        print(json.dumps([asdict(row) for row in found.rows], indent=1))
        return
    print(found.title)
    if found.rows:
        _print_list([asdict(row) for row in found.rows], as_format)


@app.command()
def kernel(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Grids from a YAML file, instead of options.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="NAME", help="A dtype, or KEY:VALUE; repeatable.  [default: all]"),
    ] = None,
    rotation: Annotated[
        list[str] | None,
        typer.Option("--rotation", metavar="NAME", help="A rotation; repeatable.  [default: each dtype's own]"),
    ] = None,
    op: Annotated[
        Operation, typer.Option("--op", help="One new token a sequence, many, a mixture; or writing to the cache.")
    ] = Operation.DECODE,
    batch: Annotated[str, typer.Option(metavar="GRID", help="Sequences (for write: tokens), 1,8 or 1..64.")] = "1,8,32",
    context: Annotated[str, typer.Option(metavar="GRID", help="Tokens of a sequence, 8k,32k or 1k..32k.")] = "8k,32k",
    prefix: Annotated[
        str | None, typer.Option(metavar="N", help="Of these, tokens cached before a prefill: 28k.")
    ] = None,
    heads: Annotated[str, typer.Option(metavar="QUERY/KV", help="Heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="CONFIG", help="Heads and head_dim of a model's config.json.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also time torch, and FlashInfer and vLLM where installed.")
    ] = True,
    timed: Annotated[bool, typer.Option("--timed", help="Exit 4 where there is no GPU to time on.")] = False,
    as_format: Annotated[ReportFormat, typer.Option("--format", help="What to print.")] = ReportFormat.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Also keep the rows there, as cells of a run folder.")
    ] = None,
) -> None:
    """Check the attention kernels, and time them on a GPU.

    Each shape is first compared with plain torch, attention in float64 and writing to the byte; no time is shown where
    that fails. Without a GPU only the comparison runs, at a small size in Triton's interpreter.
    """
    import torch

    if not torch.cuda.is_available():
        if timed:
            fail("there is no GPU here to time on; without --timed the correctness gates run", UNUSABLE)
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is first imported
    from kvbench.dtypes import all_dtypes
    from kvbench.environment import describe
    from kvbench.results import Store
    from kvbench.timing import KernelRequest, Shape, as_record, load_requests, parse_grid, render, run, shape_of_model

    try:
        gpu = torch.cuda.is_available()
        if output and (foreign := Store(output).foreign):
            raise ValueError(f"{output} {foreign}; --output takes a run folder, or a new one")
        if config:
            _refuse(ctx, KERNEL_GRID, f"{config} states the grids")
            requests = load_requests(config)
        else:
            if model:
                _refuse(ctx, ("heads", "head_dim"), "--model states the heads")
            if prefix and op.value not in ("prefill", "mixed"):
                raise ValueError("--prefix is of a prefill: add --op prefill or --op mixed")
            query_heads, _, kv_heads = heads.partition("/")
            if not (query_heads.isdigit() and kv_heads.isdigit()):
                raise ValueError(f"heads are QUERY/KV, such as 32/8, not '{heads}'")
            cached = parse_grid(prefix) if prefix else (0,)
            if len(cached) > 1:
                raise ValueError(f"--prefix is one number, such as 28k, not '{prefix}'")
            given = Shape(int(query_heads), int(kv_heads), head_dim, page_size)
            requests = [
                KernelRequest(
                    # Triton's interpreter gets bf16 wrong
                    dtypes=tuple(dtype or [n for n in all_dtypes() if n != "auto" and (gpu or n != "bf16")]),
                    rotations=tuple(rotation or ()),
                    op=op.value,
                    batches=parse_grid(batch),
                    contexts=parse_grid(context),
                    shape=shape_of_model(model, page_size) if model else given,
                    prefix=cached[0],
                    peers=peers,
                )
            ]
        for request in requests:
            request.check(gpu)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error, BAD_INPUT)
    except ValueError as error:
        fail(error, BAD_INPUT)
    environment = {**describe(), "device": "cuda" if torch.cuda.is_available() else "cpu"}

    def keep(row: dict[str, Any]) -> None:
        print(_progress(row), file=sys.stderr)
        if output:
            Store(output).save(*as_record(row, environment))

    try:
        with Store(output).writing() if output else nullcontext():
            done = [run(request, keep) for request in requests]
    except BlockingIOError:
        fail(f"another process is writing to {output}", UNUSABLE)
    except OSError as error:
        if not output:
            raise
        fail(f"cannot write to {output}: {error.strerror or error}", UNUSABLE)
    except ValueError as error:
        fail(error, BAD_INPUT)
    rows = [row for timings in done for row in timings.rows]
    if as_format == ReportFormat.JSON:
        print(json.dumps(rows, indent=1))
    else:
        print("\n\n".join(render(timings, as_format.value) for timings in done))
    if output:
        print(output, file=sys.stdout if as_format == ReportFormat.TABLE else sys.stderr)
    if not all(timings.passed for timings in done):
        raise typer.Exit(GATE_FAILED)


# what a file of grids states by itself
KERNEL_GRID = (
    "dtype",
    "rotation",
    "op",
    "batch",
    "context",
    "prefix",
    "heads",
    "head_dim",
    "page_size",
    "model",
    "peers",
)


def _refuse(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises ValueError where one of these options was given: it would be ignored."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, one in sources.items() if one and one.name != "DEFAULT"]
    if given:
        raise ValueError(f"{why}: leave out {', '.join(given)}")


def _progress(row: dict[str, Any]) -> str:
    """One line of a kernel's row, as it is done."""
    took = "" if row["us"] is None else f"   {row['us']:.1f} µs"
    return f"{row['op']} · {row['dtype']} · {row['rotation']} · batch {row['batch']}   {row['gate']}{took}"


@app.command()
def doctor(
    parity: Annotated[
        str | None,
        typer.Option(
            "--parity",
            metavar="MODEL",
            help="Instead, write a model's own keys and values with the kernels, and compare them to the byte.",
        ),
    ] = None,
) -> None:
    """Say what this machine lacks to run kvbench."""
    from kvbench import environment
    from kvbench.runners import models

    if parity is not None:
        _print_parity(parity)
        return
    checks = [*environment.doctor(), *models.doctor()]
    _print_rows(("", "", "", ""), [(check.status, check.name, check.detail, check.todo) for check in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(UNUSABLE)


def _print_parity(name: str) -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    from kvbench.runners import models
    from kvbench.runners.parity import parity
    from kvbench.runners.transformers import TransformersModel
    from kvbench.tasks import text

    gpu = torch.cuda.is_available()
    try:
        source = models.resolve(name)
        # the interpreter gets bf16 wrong, and takes milliseconds a program
        loaded = TransformersModel.load(source, "bfloat16" if gpu else "float16", "cuda" if gpu else "cpu")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--parity") from None
    tokens = loaded.tokenizer.encode(text.builtin().text[:20000])[: 2048 if gpu else 16]
    where = torch.cuda.get_device_name() if gpu else "interpreted"
    print(
        f"{source.name} · {loaded.info.compute_dtype} · {len(tokens)} tokens · kernels {where}, definitions on the CPU"
    )
    rows = []
    for one in parity(loaded, tokens):
        verdict = (
            "equal" if not one.wrong_rows else f"{one.wrong_rows} differ, the first in layer {one.first_wrong_layer}"
        )
        rows.append((one.dtype, one.rotation, str(one.layers), str(one.rows), verdict))
        print(f"{one.dtype} · {one.rotation}   {verdict}", file=sys.stderr)
    _print_rows(("dtype", "rotation", "layers", "rows", "bytes"), rows)
    if any(row[-1] != "equal" for row in rows):
        raise typer.Exit(GATE_FAILED)


@ls.command("dtypes")
def ls_dtypes(as_format: AsList = ListFormat.TABLE) -> None:
    """KV-cache dtypes, with their true bits a value at head_dim 128."""
    from kvbench.dtypes import all_dtypes

    rows = [
        {
            "name": dtype.name,
            "bits_per_value": None if dtype.name == "auto" else dtype.bits_per_value(128),
            "granularity": dtype.granularity,
            "default_rotation": dtype.default_rotation,
            "source": dtype.source,
        }
        for dtype in all_dtypes().values()
    ]
    _print_list(rows, as_format, {"bits_per_value": "model's own"})


@ls.command("rotations")
def ls_rotations(as_format: AsList = ListFormat.TABLE) -> None:
    """Rotations."""
    from kvbench.transforms import all_rotations

    _print_list([{"name": one.name, "source": one.source} for one in all_rotations().values()], as_format)


@ls.command("tasks")
def ls_tasks(as_format: AsList = ListFormat.TABLE) -> None:
    """Tasks: kvbench's own first, then lm-eval's."""
    from dataclasses import asdict

    from kvbench.tasks import list_tasks

    _print_list([asdict(task) for task in list_tasks()], as_format)


@ls.command("models")
def ls_models(as_format: AsList = ListFormat.TABLE) -> None:
    """Models that this machine knows by name. A folder, a .gguf file, a .json configuration or a hub id is one too."""
    from kvbench.runners.models import list_models

    _print_list(list_models(), as_format)


# ---- what the verbs share


def fail(error: object, code: int) -> NoReturn:
    """The message alone on stderr, and the exit code."""
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(code)


def _options(
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    settings: Sequence[str] | None,
    limit: int | None,
    output: Path | None,
    fresh: bool = False,
    retry_failed: bool = False,
    devices: str | None = None,
) -> Options:
    from kvbench.sweep.command import Options

    names = [name.strip() for name in devices.split(",")] if devices is not None else []
    if wrong := [name for name in names if not (name.isdecimal() or name == "cpu")]:
        fail(f"--devices {devices}: '{wrong[0]}' is neither a GPU's number nor cpu; write 0,1", BAD_INPUT)
    gpus = [int(name) for name in names if name != "cpu"]
    if twice := [gpu for gpu in gpus if gpus.count(gpu) > 1]:
        fail(f"--devices {devices}: GPU {twice[0]} stands twice, and a GPU has one process; name each once", BAD_INPUT)
    return Options(only or (), skip or (), settings or (), limit, output, fresh, retry_failed, names)


def _prepared(config: Path, options: Options) -> Planned:
    from kvbench.sweep.command import prepare
    from kvbench.sweep.document import ConfigError

    try:
        return prepare(config, options)
    except ConfigError as error:
        fail(error, BAD_INPUT)


def _print_plan(planned: Planned) -> None:
    from kvbench.sweep.command import plan_summary, plan_tables

    for title, headers, rows in plan_tables(planned):
        print(title)
        _print_rows(headers, rows, numeric=(2, 3, 4))
        print()
    print("\n".join(plan_summary(planned)))


def _print_table(table: Table) -> None:
    print(table.title)
    for warning in table.warnings:
        print(warning)
    numeric = [index for index, header in enumerate(table.headers) if header.numeric]
    _print_rows(["\n".join(header.lines) for header in table.headers], table.rows, numeric)
    print("\n".join([*table.notes, ""]))


def _print_list(rows: Sequence[dict[str, Any]], as_format: ListFormat, absent: dict[str, str] | None = None) -> None:
    if as_format == ListFormat.JSON:
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0]) if rows else []
    shown = [[_shown(row[name], (absent or {}).get(name, "-")) for name in names] for row in rows]
    numeric = [i for i, name in enumerate(names) if any(isinstance(row[name], (int, float)) for row in rows)]
    _print_rows([name.replace("_", " ") for name in names], shown, numeric)


def _shown(value: object, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A table as wide as it needs to be, whatever the terminal: a value that is cut short is a wrong value."""
    heads = [header.split("\n") for header in headers]
    depth = max(map(len, heads)) if any(headers) else 0
    lines = [[*[""] * (depth - len(head)), *head] for head in heads]
    head_rows = [[line[level] for line in lines] for level in range(depth)]
    widths = [max(map(len, column)) for column in zip(*head_rows, *rows, strict=True)]

    def joined(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if index in numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "   ".join(cells).rstrip()

    print("\n".join(map(joined, head_rows)), end="\n" if head_rows else "")
    if head_rows:
        print("─" * (sum(widths) + 3 * (len(widths) - 1)))
    print("\n".join(map(joined, rows)))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kvbench {version('kvbench')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; what it prints may be cut off by a pipe that closes."""
    try:
        app()
    except BrokenPipeError:
        # the interpreter would try to flush it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
