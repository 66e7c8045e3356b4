"""The application: its verbs, in the order in which help lists them."""

from __future__ import annotations

import codecs
import contextlib
import gc
import io
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from kvbench.cli import (
    check,
    compare,
    doctor,
    export,
    init,
    kernel,
    ls,
    plan,
    report,
    runs,
    schema,
    search,
    show,
    sweep,
)
from kvbench.cli.shared import CRASHED, INTERRUPTED, UNUSABLE, epilog

EPILOG = (
    "Exit codes: 0 all done and gates passed; 1 a gate failed; 2 bad usage or config; 3 finished, some cells failed; "
    "4 environment unusable; 5 not comparable, or nothing to report or compare; 70 a fault of kvbench's own; "
    "130 interrupted, resumable."
)

# plain help: rich would take longer to import than all the rest
app = typer.Typer(
    name="kvbench",
    help="How few bits can a language model's KV cache have, at what cost in accuracy, and how sure are we?",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(ls.ls)
for verb, examples in (
    (init.init, init.EXAMPLES),
    (plan.plan, plan.EXAMPLES),
    (sweep.sweep, sweep.EXAMPLES),
    (search.search, search.EXAMPLES),
    (report.report, report.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (show.show, show.EXAMPLES),
    (check.check, check.EXAMPLES),
    (runs.runs, runs.EXAMPLES),
    (export.export, export.EXAMPLES),
    (kernel.kernel, kernel.EXAMPLES),
    (doctor.doctor, doctor.EXAMPLES),
    (schema.schema, schema.EXAMPLES),
):
    app.command(epilog=epilog(examples))(verb)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kvbench {version('kvbench')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; what it prints may be cut off by a pipe that closes, or go nowhere."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _open(getattr(sys, name)))
    try:
        app()
    except BrokenPipeError:
        # the interpreter would try to flush it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(_crashed(error))
    finally:
        # Python's end would look for garbage in all that torch brought, half a second; Triton names what is not freed
        if "triton" not in sys.modules:
            gc.freeze()


def _open(stream: TextIO | None) -> TextIO:
    """A stream that takes every text: nowhere where a shell closed it (`>&-`), a file or a pipe in UTF-8.

    A terminal of another encoding shows what it can.
    """
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors=stream.errors)
    return stream


def _crashed(error: Exception) -> int:
    """The exit code of an error that no verb knows, once it is told: a file's, or of a fault of kvbench's."""
    import tempfile
    import traceback

    from kvbench.faults import closed_to_us, fault_of, triton_fault
    from kvbench.render.text import seen

    def tell(line: str, code: int) -> int:
        with contextlib.suppress(OSError):  # of a stderr that takes nothing the code alone is left
            print(f"error: {line}", file=sys.stderr)
        return code

    if fault := fault_of(error):
        where = f" {fault.filename}" if fault.filename else ""
        return tell(seen(f"cannot write{where}: {fault.strerror or fault}"), UNUSABLE)
    if line := triton_fault(error):
        return tell(seen(line), UNUSABLE)
    if closed := closed_to_us(error):
        return tell(seen(f"{closed.filename}: {closed.strerror}"), UNUSABLE)
    text = "".join(["kvbench ", " ".join(map(repr, sys.argv[1:])), "\n\n", *traceback.format_exception(error)])
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kvbench-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
        where = f"please report it with its traceback, which is in {file.name}"
    except OSError:
        where = f"please report it with its traceback:\n{text}"
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return tell(f"a fault of kvbench's own, {seen(line)}; {where}", CRASHED)
