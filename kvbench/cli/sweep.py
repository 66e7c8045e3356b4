"""`kvbench sweep`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from kvbench.cli.plan import check_file, chosen, prepared, print_plan
from kvbench.cli.shared import BAD_INPUT, UNUSABLE, Address, Config, Limit, Only, Output, Set, Skip, fail


class Executor(StrEnum):
    """Where cells run."""

    INLINE = "inline"
    PROCESS = "process"
    RAY = "ray"


Fresh = Annotated[bool, typer.Option("--fresh", help="Forget earlier results and start over.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="0,1",
        help="Run on these GPUs at once, a process each; or cpu,cpu.  [default: the first GPU, else the CPU]",
    ),
]
Executors = Annotated[
    Executor | None,
    typer.Option(
        "--executor",
        help="Run cells in this process, in one a device, or in a Ray cluster, a worker a GPU.  "
        "[default: inline on a CPU, process on GPUs]",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="In a cluster, so many.  [default: all that it has room for]"),
]


EXAMPLES = """\
kvbench sweep configs/quickstart.yaml
kvbench sweep mine.yaml --only dtype=int4* --skip task=gsm8k
kvbench sweep mine.yaml --limit 8          # a quick look, marked as such
kvbench sweep mine.yaml --devices 0,1      # on two GPUs
"""


def sweep(
    config: Config,
    only: Only = None,
    skip: Skip = None,
    settings: Set = None,
    limit: Limit = None,
    output: Output = None,
    fresh: Fresh = False,
    retry_failed: RetryFailed = False,
    devices: Devices = None,
    executor: Executors = None,
    address: Address = None,
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and run nothing.")] = False,
) -> None:
    """Run the cells of CONFIG that are not done yet.

    A cell is one model × dtype × rotation × task. What is done is kept, whatever stops the sweep.
    """
    check_file(config)
    from kvbench.sweep.command import run_sweep
    from kvbench.sweep.stopping import UnusableError

    options = chosen(only, skip, settings, limit, output, fresh, retry_failed, devices, executor, address, workers)
    if dry_run:
        print_plan(prepared(config, options))
        return
    from kvbench.yaml_text import ConfigError

    try:
        code = run_sweep(config, options)
    except ConfigError as error:
        fail(error, BAD_INPUT)
    except UnusableError as error:
        fail(error, UNUSABLE)
    raise typer.Exit(code)
