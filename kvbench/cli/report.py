"""`kvbench report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.shared import (
    BAD_INPUT,
    NOTHING_TO_COMPARE,
    TABLE,
    Format,
    Wide,
    draw,
    fail,
    fail_to_write,
    say,
    show,
    writable_path,
)
from kvbench.files import is_folder

if TYPE_CHECKING:
    from kvbench.report.tables import Report

PAGE = "html"


EXAMPLES = """\
kvbench report out/mine
kvbench report out/mine --format csv > mine.csv
"""


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    kernels: Annotated[
        Path | None,
        typer.Option("--kernels", metavar="DIR", help="Another one, whose kernels' speed stands beside accuracy."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The data sets' rows: with html, prompts of answers that flipped."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", parser=writable_path, help="Also draw size against loss, as .svg or .png."
        ),
    ] = None,
    as_format: Format = TABLE,
    wide: Wide = False,
) -> None:
    """Print and write the tables of a run folder.

    Puts report.md, report.csv and report.json into it; with --format html report.html alone, a page that needs nothing
    beside it.
    """
    from kvbench.report.tables import Report
    from kvbench.results import NotARunError

    if data and not is_folder(data):
        fail(f"--data: no folder {data}", BAD_INPUT)
    try:
        found = Report.read(folder, kernels)
        if plot:
            from kvbench.report.page import trade_off

            draw(trade_off(found), plot)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (FileNotFoundError, ValueError) as error:
        fail(error, BAD_INPUT)
    shown = as_format in (TABLE, PAGE)
    if as_format != PAGE:
        show(found.document(portable=not shown), as_format, wide)
    if as_format in ("csv", "json"):
        for fault in found.faults:
            say(fault, to=sys.stderr)
    try:
        paths = [_write_page(found, data)] if as_format == PAGE else found.write()
    except OSError as error:
        if as_format == PAGE:  # all that was asked for
            fail_to_write(error, folder)
        say(f"not written: {error.filename or folder}: {error.strerror}", to=sys.stderr)
    else:
        first, *others = [*paths, *filter(None, [plot])]
        names = " · ".join([str(first), *(path.name for path in others)])
        say(names, to=sys.stdout if shown else sys.stderr)


def _write_page(found: Report, data: Path | None) -> Path:
    from kvbench.report.documents import texts
    from kvbench.report.page import page

    return found.write_as(PAGE, page(found, texts(found.records, data) if data else None))
