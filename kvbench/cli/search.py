"""`kvbench search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.plan import check_file, chosen, parsed
from kvbench.cli.shared import (
    BAD_INPUT,
    TABLE,
    UNUSABLE,
    Address,
    Budget,
    Config,
    Format,
    Limit,
    Output,
    Set,
    Wide,
    draw,
    fail,
    show,
    writable_path,
)
from kvbench.cli.sweep import Devices, Executors, Fresh, RetryFailed, Workers

EXAMPLES = """\
kvbench search mine.yaml --budget 4.5 --budget 3
"""


def search(
    config: Config,
    budgets: Annotated[list[float], Budget],
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="N", help="Count the bytes of a sequence of N tokens, or 32k.  [default: 8k]"
        ),
    ] = None,
    best: Annotated[
        int, typer.Option("--best", metavar="N", min=1, max=100, help="Verify so many schemes by layer a budget.")
    ] = 2,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=2, max=10**9, help="Measure a layer on N tokens of calibration text."
        ),
    ] = 4096,
    settings: Set = None,
    limit: Limit = None,
    output: Output = None,
    fresh: Fresh = False,
    retry_failed: RetryFailed = False,
    devices: Devices = None,
    executor: Executors = None,
    address: Address = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured, and measure nothing.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", parser=writable_path, help="Also draw bits against loss, as .svg or .png."
        ),
    ] = None,
    as_format: Format = TABLE,
    wide: Wide = False,
) -> None:
    """Find the scheme of at most BITS bits a value that loses least, made of the schemes that CONFIG lists.

    Keys, values and layers may each have another of them. What each layer costs alone is measured on calibration text,
    the best are chosen by an exact program and verified as a sweep; each budget's winner is written as a YAML file.
    What is done is kept, whatever stops the search.
    """
    check_file(config)
    from kvbench.render.document import Plot
    from kvbench.render.picture import ENDINGS
    from kvbench.sweep.search.command import Request, Search, run_search, search_plan
    from kvbench.sweep.stopping import UnusableError
    from kvbench.yaml_text import ConfigError

    if plot and plot.suffix not in ENDINGS:
        fail(f"--plot {plot}: a picture is a file that ends in {' or '.join(ENDINGS)}", BAD_INPUT)
    options = chosen(None, None, settings, limit, output, fresh, retry_failed, devices, executor, address, workers)
    request = Request(tuple(dict.fromkeys(budgets)), parsed(context), best, tokens)
    try:
        if dry_run:
            show(search_plan(Search.of(config, request, options)), as_format, wide)
            return
        code, found = run_search(config, request, options)
    except ConfigError as error:
        fail(error, BAD_INPUT)
    except UnusableError as error:
        fail(error, UNUSABLE)
    if found is not None:
        show(found, as_format, wide)
        if plot:
            draw([view for section in found.sections if isinstance(section, Plot) for view in section.views], plot)
    raise typer.Exit(code)
