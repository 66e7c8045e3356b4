"""`kvbench compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, Baseline, Margin, ReportFormat, fail, print_rows, say

if TYPE_CHECKING:
    from kvbench.report.timings import SpeedComparison


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
    from kvbench.report import comparison_text, table, timings, verdicts
    from kvbench.report.compare import compare as compared
    from kvbench.report.find_scheme import find_scheme
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
        scheme = find_scheme(first.schemes, baseline, first.baseline) if baseline else None
        found = compared(first, second, baseline=scheme, margin=margin)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (FileNotFoundError, ValueError) as error:
        fail(error, BAD_INPUT)
    if as_format == ReportFormat.TABLE:
        for title, lines in comparison_text.tables(found):
            say(title)
            print_rows(comparison_text.HEADERS, lines, comparison_text.NUMERIC)
            print()
        say(comparison_text.LEGEND, *comparison_text.summary(first, found, second))
    elif as_format == ReportFormat.MD:
        print(comparison_text.markdown(first, found, second), end="")
    else:
        as_json = as_format == ReportFormat.JSON
        print(table.rows_json(found.rows) if as_json else table.rows_csv(found.rows, verdicts.COLUMNS), end="")
        for fault in [*first.faults, *(second.faults if second else [])]:
            say(fault, to=sys.stderr)
    if found.invalid or not found.judged:
        raise typer.Exit(NOTHING_TO_COMPARE)


def _print_speed(rows: Sequence[SpeedComparison], as_format: ReportFormat) -> None:
    from kvbench.render import markdown
    from kvbench.report import table, timings

    if as_format == ReportFormat.TABLE:
        print_rows(timings.HEADERS, timings.table(rows), timings.NUMERIC)
    elif as_format == ReportFormat.MD:
        print("\n".join(markdown.table(timings.HEADERS, timings.table(rows), timings.NUMERIC)))
    else:
        as_json = as_format == ReportFormat.JSON
        print(table.rows_json(rows) if as_json else table.rows_csv(rows, timings.COLUMNS), end="")
