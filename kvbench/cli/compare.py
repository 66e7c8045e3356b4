"""`kvbench compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, TABLE, Baseline, Format, Margin, Wide, fail, say, show

EXAMPLES = """\
kvbench compare out/mine
kvbench compare out/mine --baseline int8 --margin 2pp
kvbench compare out/before out/after       # like with like
"""


def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or kernel timings.", show_default=False)],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR2]", help="Another: its cells against the same of DIR.", show_default=False),
    ] = None,
    baseline: Baseline = None,
    margin: Margin = None,
    as_format: Format = TABLE,
    wide: Wide = False,
) -> None:
    """Compare every cell with its baseline on the same documents.

    Differences with 95 % intervals, paired tests, p after Holm over the whole report, and a verdict. With DIR2 and
    --baseline, the cells of DIR2 are compared with that baseline of DIR. Exits 5 where a pair had to be refused.
    """
    from kvbench import measured
    from kvbench.report import comparison_text, timings
    from kvbench.report.compare import compare as compared
    from kvbench.report.find_scheme import find_scheme
    from kvbench.results import NotARunError

    try:
        if timings.is_timings(folder):
            before, after = timings.read(folder), timings.read(other) if other else None
            given = baseline or ("" if after else "fp16")
            chosen = find_scheme(timings.schemes_of(before), given, _meant) if given else None
            rows = timings.compare_speed(before, after, chosen, margin)
            show(timings.document(rows), as_format, wide)
            if not rows or any(row.verdict == "INVALID" for row in rows):
                raise typer.Exit(NOTHING_TO_COMPARE)
            return
        first, second = measured.read(folder), measured.read(other) if other else None
        if empty := next((one for one in (first, second) if one and not one.cells), None):
            raise NotARunError(
                f"nothing to compare: {empty.path} holds no cell of a model; times are compared with times"
            )
        scheme = find_scheme(first.schemes, baseline, _meant) if baseline else None
        found = compared(first, second, baseline=scheme, margin=margin)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (FileNotFoundError, ValueError) as error:
        fail(error, BAD_INPUT)
    show(comparison_text.document(first, found, second), as_format, wide)
    if as_format in ("csv", "json"):
        for fault in [*first.faults, *(second.faults if second else [])]:
            say(fault, to=sys.stderr)
    if found.invalid or not found.judged:
        raise typer.Exit(NOTHING_TO_COMPARE)


def _meant(name: str) -> tuple[str, str] | None:
    """What a YAML takes DTYPE, DTYPE/ROTATION or a preset's name for."""
    from kvbench.schemes import Scheme

    dtype, slash, rotation = name.partition("/")
    try:
        scheme = Scheme.parse(dtype, rotation) if slash else Scheme.of(dtype)
    except ValueError:
        return None
    return scheme.dtype_name, scheme.rotation_name
