"""`kvbench runs`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, UNUSABLE, AsList, ListFormat, Wide, fail, print_rows, say

if TYPE_CHECKING:
    from kvbench.results.runs import RunFolder


EXAMPLES = """\
kvbench runs
kvbench runs --remove 'try-*'
"""


def runs(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Where they are.  [default: out]")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="PATTERN", help="Remove all the others, after a question; repeatable."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="PATTERN", help="Remove those that match, after a question; repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without the question.")] = False,
    as_format: AsList = ListFormat.TABLE,
    wide: Wide = False,
) -> None:
    """List run folders, the newest first; remove those that are no longer wanted.

    Only what kvbench wrote is removed. With --remove, --keep names exceptions.
    """
    from kvbench.results import DEFAULT_FOLDER
    from kvbench.results.runs import find_runs

    place = folder or DEFAULT_FOLDER
    try:
        found = find_runs(place)
    except FileNotFoundError as error:
        if folder:
            fail(error, BAD_INPUT)
        found = []
    if keep or remove:
        _remove(found, keep or [], remove or ["*"], yes)
    elif as_format == ListFormat.JSON:
        print(json.dumps([{**asdict(run), "path": str(run.path)} for run in found], indent=1))
    elif found:
        rows = [(str(run.path), *_shown(run)) for run in found]
        print_rows(("run folder", "finished", "cells", "MB", "models"), rows, (3,), wide)
    else:
        say(f"no run folder in {place}; kvbench sweep CONFIG makes one")


def _shown(run: RunFolder) -> tuple[str, ...]:
    from datetime import datetime

    when = datetime.fromisoformat(run.finished).astimezone().strftime("%Y-%m-%d %H:%M") if run.finished else "-"
    whole = run.done + run.failed + run.left
    cells = f"{run.done} of {whole}" + (f", {run.failed} failed" if run.failed else "")
    return when, cells, _megabytes(run.size_bytes), ", ".join(run.models) or "-"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _remove(found: Sequence[RunFolder], keep: Sequence[str], wanted: Sequence[str], yes: bool) -> None:
    from kvbench.results.runs import remove

    def matches(run: RunFolder, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in (run.path.name, str(run.path)))

    for flag, patterns in (("--keep", keep), ("--remove", wanted)):
        for pattern in patterns:
            if not any(matches(run, [pattern]) for run in found):
                there = ", ".join(run.path.name for run in found)
                fail(
                    f"{flag} {pattern}: no such run folder; {f'one of {there}' if there else 'there is none'}",
                    BAD_INPUT,
                )
    goes = [run for run in found if matches(run, wanted) and not matches(run, keep)]
    if not goes:
        say("nothing to remove")
        return
    for run in goes:
        say("   ".join((str(run.path), *_shown(run)[:2], f"{_megabytes(run.size_bytes)} MB")))
    if not yes:
        size = _megabytes(sum(run.size_bytes for run in goes))
        noun = "folder" if len(goes) == 1 else "folders"
        try:
            agreed = typer.confirm(f"Remove {len(goes)} run {noun}, {size} MB?", err=True)
        except typer.Abort:
            fail("nobody answered, so nothing was removed; --yes removes without the question", BAD_INPUT)
        if not agreed:
            say("nothing was removed")
            return
    for run in goes:
        try:
            left = remove(run)
        except BlockingIOError:
            fail(f"a sweep is writing to {run.path}; it stays", UNUSABLE)
        except OSError as error:
            fail(f"cannot remove {run.path}: {error.strerror or error}", UNUSABLE)
        say(f"removed {run.path}" + (f", but not {', '.join(left)}, which kvbench did not write" if left else ""))
