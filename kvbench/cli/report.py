"""`kvbench report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, TABLE, Format, Wide, fail, say, show


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    kernels: Annotated[
        Path | None,
        typer.Option("--kernels", metavar="DIR", help="Another one, whose kernels' speed stands beside accuracy."),
    ] = None,
    as_format: Format = TABLE,
    wide: Wide = False,
) -> None:
    """Print and write the tables of a run folder.

    Puts report.md, report.csv and report.json into it.
    """
    from kvbench.report.tables import Report
    from kvbench.results import NotARunError

    try:
        found = Report.read(folder, kernels)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except FileNotFoundError as error:
        fail(error, BAD_INPUT)
    shown = as_format == TABLE
    show(found.document(portable=not shown), as_format, wide)
    if as_format in ("csv", "json"):
        for fault in found.faults:
            say(fault, to=sys.stderr)
    try:
        first, *others = found.write()
    except OSError as error:
        say(f"not written: {error.filename2 or error.filename}: {error.strerror}", to=sys.stderr)
    else:
        names = " · ".join([str(first), *(path.name for path in others)])
        say(names, to=sys.stdout if shown else sys.stderr)
