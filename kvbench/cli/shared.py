"""What the verbs share: exit codes, options, and how a table is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from kvbench.render import all_renderers
from kvbench.render.text import seen, table

# 3 comes from the sweep itself
GATE_FAILED, BAD_INPUT, UNUSABLE, NOTHING_TO_COMPARE, CRASHED, INTERRUPTED = 1, 2, 4, 5, 70, 130

MAX_COUNT = 10**9  # documents; no data set has more


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The sweep's YAML file.", show_default=False)]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=PATTERN", help="Only cells that match, such as dtype=int4*; repeatable."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="KEY=PATTERN", help="No cells that match, such as task=gsm8k; repeatable."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the YAML: tasks[0].limit=50; repeatable."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, max=MAX_COUNT, metavar="N", help="A quick look at N documents a task: NOT A REAL SCORE."
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The run folder.  [default: out/<sweep name>]")
]


class ListFormat(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    JSON = "json"


AsList = Annotated[ListFormat, typer.Option("--format", help="A table, or JSON.")]
# the files of render/
Renderers = StrEnum("Renderers", {name: name for name in all_renderers()})  # type: ignore[misc]
Format = Annotated[Renderers, typer.Option("--format", help="What to print.")]
TABLE = Renderers("table")

Margin = Annotated[
    str | None,
    typer.Option(
        "--margin", metavar="Npp", help="The difference that does not matter.  [default: the sweep's, or 1pp]"
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline", metavar="DTYPE[/ROTATION]", help="Compare with it.  [default: the sweep's; of timings fp16]"
    ),
]


def fail(error: object, code: int) -> NoReturn:
    """The message alone on stderr, and the exit code."""
    print(f"error: {seen(error)}", file=sys.stderr)
    raise typer.Exit(code)


def say(*lines: str, to: TextIO | None = None) -> None:
    """Lines of text in the terminal, on stdout unless told otherwise."""
    print(seen("\n".join(lines)), file=to)


def print_list(rows: Sequence[dict[str, Any]], as_format: ListFormat, absent: dict[str, str] | None = None) -> None:
    """Rows as a table or as JSON; `absent` says what None is called in a column."""
    if as_format == ListFormat.JSON:
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0]) if rows else []
    shown = [[_shown(row[name], (absent or {}).get(name, "-")) for name in names] for row in rows]
    numeric = [i for i, name in enumerate(names) if any(isinstance(row[name], (int, float)) for row in rows)]
    print_rows([name.replace("_", " ") for name in names], shown, numeric)


def _shown(value: object, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A table in the terminal."""
    print(table(headers, rows, numeric))
