"""`kvbench plan`, and what `kvbench sweep` shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.shared import (
    BAD_INPUT,
    TABLE,
    UNUSABLE,
    Config,
    Format,
    Limit,
    Only,
    Output,
    Set,
    Skip,
    Wide,
    fail,
    show,
    uncollected,
)

if TYPE_CHECKING:
    from kvbench.sweep.command import Options, Planned


EXAMPLES = """\
kvbench plan mine.yaml
kvbench plan mine.yaml --only task=gsm8k --context 32k
"""


@uncollected()
def plan(
    config: Config,
    only: Only = None,
    skip: Skip = None,
    settings: Set = None,
    limit: Limit = None,
    output: Output = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="N", help="State the memory of a sequence of N tokens, or 32k.  [default: the longest]"
        ),
    ] = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option("--budget", metavar="BITS", min=0.1, max=32, help="Of `kvbench search` with it, not of a sweep."),
    ] = None,
    as_format: Format = TABLE,
    wide: Wide = False,
) -> None:
    """Show what a sweep would run.

    Its cells, their true bits and KV memory, what is done, the smallest difference that each task can show, and what is
    missing on this machine. Runs nothing.
    """
    check_file(config)
    tokens, options = parsed(context), chosen(only, skip, settings, limit, output)
    if budgets:
        print_search(config, budgets, options, tokens, as_format, wide)
    else:
        print_plan(prepared(config, options), tokens, as_format, wide)


def parsed(context: str | None) -> int | None:
    """What --context says: 32k is 32768."""
    from kvbench.sizes import parse_tokens

    try:
        return parse_tokens(context) if context else None
    except ValueError as error:
        fail(f"--context: {error}", BAD_INPUT)


def print_search(
    config: Path, budgets: Sequence[float], options: Options, context: int | None, as_format: Format, wide: bool
) -> None:
    """What a search would measure; --only and --skip are a sweep's."""
    from kvbench.sweep.search.command import Request, Search, search_plan
    from kvbench.yaml_text import ConfigError

    if options.only or options.skip:
        fail("--budget goes with neither --only nor --skip: a search chooses from all that CONFIG lists", BAD_INPUT)
    try:
        document = search_plan(Search.of(config, Request(tuple(budgets), context), options))
    except ConfigError as error:
        fail(error, BAD_INPUT)
    show(document, as_format, wide)


def check_file(config: Path) -> None:
    """Says at once, before torch is imported, that CONFIG is no file that can be read."""
    from kvbench.yaml_text import ConfigError, read_file

    try:
        read_file(config)
    except ConfigError as error:
        fail(error, BAD_INPUT)


def chosen(
    only: Sequence[str] | None,
    skip: Sequence[str] | None,
    settings: Sequence[str] | None,
    limit: int | None,
    output: Path | None,
    fresh: bool = False,
    retry_failed: bool = False,
    devices: str | None = None,
    executor: str | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> Options:
    """What the options of sweep and plan ask for."""
    from kvbench.sweep.command import Options  # imports torch

    names = [name.strip() for name in devices.split(",")] if devices is not None else []
    if wrong := [name for name in names if not (name.isdecimal() or name == "cpu")]:
        fail(f"--devices {devices}: '{wrong[0]}' is neither a GPU's number nor cpu; write 0,1", BAD_INPUT)
    gpus = [int(name) for name in names if name != "cpu"]
    if twice := [gpu for gpu in gpus if gpus.count(gpu) > 1]:
        fail(f"--devices {devices}: GPU {twice[0]} appears twice, and a GPU has one process; name each once", BAD_INPUT)
    return Options(
        only or (), skip or (), settings or (), limit, output, fresh, retry_failed, names, executor, address, workers
    )


def prepared(config: Path, options: Options) -> Planned:
    """CONFIG as a plan; a mistake in it is said, and exits 2, and 4 where what was to run it is not there."""
    from kvbench.sweep.command import prepare
    from kvbench.sweep.stopping import UnusableError
    from kvbench.yaml_text import ConfigError

    try:
        return prepare(config, options)
    except ConfigError as error:
        fail(error, BAD_INPUT)
    except UnusableError as error:
        fail(error, UNUSABLE)


def print_plan(planned: Planned, context: int | None = None, as_format: Format = TABLE, wide: bool = False) -> None:
    """The plan's tables, and what they add up to."""
    from kvbench.sweep.plan_document import plan_document

    show(plan_document(planned, context), as_format, wide)
