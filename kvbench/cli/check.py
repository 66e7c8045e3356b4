"""`kvbench check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.shared import (
    BAD_INPUT,
    GATE_FAILED,
    NOTHING_TO_COMPARE,
    Margin,
    fail,
    fail_to_write,
    say,
    writable_path,
)

if TYPE_CHECKING:
    from kvbench.measured import Measured


EXAMPLES = """\
kvbench check out/mine --write base.json   # a small file to commit
kvbench check out/mine --against base.json # in CI: exit 1 where it got worse
"""


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
            help="worse (by the test), drop (by more than the margin), missing (a cell or metric of the baseline that "
            "is absent, renamed, refused or unreadable), inconclusive, skipped; "
            "repeatable.  [default: worse, drop and missing]",
        ),
    ] = None,
    margin: Margin = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="FILE", parser=writable_path, help="Instead: keep DIR as a baseline file to commit."
        ),
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
        say(f"FAILED {line}")
    for line in found.skipped:
        say(f"skipped {line}")
    say(*found.notes, f"{found.compared} compared, {len(found.failed)} failed, {len(found.skipped)} skipped")
    if not found.compared:
        raise typer.Exit(NOTHING_TO_COMPARE)
    if found.failed:
        raise typer.Exit(GATE_FAILED)


def _keep(here: Measured, write: Path, timed: bool) -> None:
    from kvbench import measured

    if timed and not here.cells:
        fail(
            f"{here.path} holds kernel times alone, and a baseline file has none: commit the folder", NOTHING_TO_COMPARE
        )
    try:
        measured.write(here, write)
    except OSError as error:
        if not write.parent.is_dir():
            error = FileNotFoundError(error.errno, f"there is no folder {write.parent}", str(write))
        fail_to_write(error, write, "; --write takes a file in a folder that is there")
    if timed:
        print("kernel times are not kept in it: --against a run folder compares them", file=sys.stderr)
    say(str(write))
