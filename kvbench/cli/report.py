"""`kvbench report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, ReportFormat, fail, print_table, say


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
            print_table(table)
        say(LEGEND, *found.summary())
    else:
        print({"md": found.markdown, "csv": found.csv, "json": found.json}[as_format.value](), end="")
        for fault in found.faults:
            say(fault, to=sys.stderr)
    try:
        first, *others = found.write()
    except OSError as error:
        say(f"not written: {error.filename2 or error.filename}: {error.strerror}", to=sys.stderr)
    else:
        names = " · ".join([str(first), *(path.name for path in others)])
        say(names, to=sys.stdout if as_format == ReportFormat.TABLE else sys.stderr)
