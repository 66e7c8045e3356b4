"""`kvbench show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, AsList, ListFormat, fail, print_list, say


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
    say(found.title)
    if found.rows:
        print_list([asdict(row) for row in found.rows], as_format)
