"""The application: its verbs, in the order in which help lists them."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

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
    """Runs the command line; what it prints may be cut off by a pipe that closes."""
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


def _crashed(error: Exception) -> int:
    """The exit code of an error that no verb knows, once it is told: a full disk's, or that of a fault of kvbench's."""
    import tempfile
    import traceback

    from kvbench.faults import fault_of, triton_fault
    from kvbench.render.text import seen

    if fault := fault_of(error):
        print(f"error: cannot write: {seen(str(fault))}", file=sys.stderr)
        return UNUSABLE
    if line := triton_fault(error):
        print(f"error: {seen(line)}", file=sys.stderr)
        return UNUSABLE
    text = "".join(["kvbench ", " ".join(map(repr, sys.argv[1:])), "\n\n", *traceback.format_exception(error)])
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kvbench-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
        where = f"please report it with its traceback, which is in {file.name}"
    except OSError:
        where = f"please report it with its traceback:\n{text}"
    line = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"error: a fault of kvbench's own, {seen(line)}; {where}", file=sys.stderr)
    return CRASHED
