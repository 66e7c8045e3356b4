"""What the verbs share: exit codes, options, and how a table is printed."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from kvbench.faults import fault_of, triton_fault
from kvbench.render import Column, Document, View, all_renderers, render, text
from kvbench.render.text import seen

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


def writable_path(text: str) -> Path:
    """The path to write at; ends the command where it is in an object store, which is none."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        fail(
            f"{text}: kvbench writes to paths, mounted ones too; object stores can't rename, so write to a folder here "
            "and copy it there when it is done",
            BAD_INPUT,
        )
    return Path(text)


Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", parser=writable_path, help="The run folder.  [default: out/<sweep name>]"),
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
Budget = typer.Option("--budget", metavar="BITS", min=0.1, max=32, help="Bits a value at most; repeatable.")
Wide = Annotated[bool, typer.Option("--wide", help="All columns, in a narrow terminal too.")]

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="auto|HOST:PORT",
        help="The Ray cluster.  [default: RAY_ADDRESS, else one on this machine, else one started here]",
    ),
]
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


def epilog(examples: str) -> str:
    """What stands below a verb's options: commands to copy, each on a line of its own."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in examples.splitlines())])


def fail(error: object, code: int) -> NoReturn:
    """The message alone on stderr, and the exit code; what Triton lacks is the machine's fault, whatever it came as."""
    if isinstance(error, Exception) and (line := triton_fault(error)):
        error, code = line, UNUSABLE
    with suppress(OSError):  # of a stderr that takes nothing the code alone is left
        print(f"error: {seen(error)}", file=sys.stderr)
    raise typer.Exit(code)


def fail_to_write(error: OSError, place: Path, hint: str = "") -> NoReturn:
    """`fail` for what was to be written at a place: the machine's fault where it is full, else that of the place."""
    full = fault_of(error) is not None
    fail(
        f"cannot write {error.filename or place}: {error.strerror or error}{'' if full else hint}",
        UNUSABLE if full else BAD_INPUT,
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for inside the block: imports and plans make none, and it took a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def say(*lines: str, to: TextIO | None = None) -> None:
    """Lines of text in the terminal, on stdout unless told otherwise."""
    print(seen("\n".join(lines)), file=to)


def show(document: Document, as_format: str, wide: bool = False) -> None:
    """A document on stdout; as a table with the columns that the terminal has room for, and in its colors."""
    if as_format == TABLE:
        print(text.render(document, None if wide else width(), _colored()), end="")
    else:
        print(render(document, as_format), end="")


def draw(views: Sequence[View], path: Path) -> None:
    """A picture in a file; a line and exit code 2 where there is no place or no way to draw it."""
    from kvbench.render.picture import save

    try:
        save(views, path)
    except OSError as error:
        fail_to_write(error, path)
    except ValueError as error:
        fail(error, BAD_INPUT)


def width() -> int | None:
    """Columns of the terminal that stdout is, or COLUMNS where that is set; None where nothing limits a line."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None


def _colored() -> bool:
    """Whether stdout shows colors: it is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_list(
    rows: Sequence[dict[str, Any]], as_format: ListFormat, absent: dict[str, str] | None = None, wide: bool = False
) -> None:
    """Rows as a table or as JSON; `absent` says what None is called in a column. A text stands in the last."""
    if as_format == ListFormat.JSON:
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0]) if rows else []
    shown = [[_shown(row[name], (absent or {}).get(name, "-")) for name in names] for row in rows]
    numeric = [i for i, name in enumerate(names) if any(isinstance(row[name], (int, float)) for row in rows)]
    print_rows([name.replace("_", " ") for name in names], shown, numeric, wide)


def _shown(value: object, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_rows(
    headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[int] = (), wide: bool = False
) -> None:
    """A table in the terminal; where it is too narrow, texts go on in the next line, and the last columns go first."""
    columns = [
        Column(tuple(header.split("\n")), place in numeric, drop=place, prose=place not in numeric)
        for place, header in enumerate(headers)
    ]
    print(text.table(columns, rows, None if wide else width(), _colored()))
