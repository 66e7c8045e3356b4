"""`kvbench export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, fail, say

EXAMPLES = """\
kvbench export out/mine --to lm-eval                   # into out/mine/lm-eval
kvbench export out/mine --to lm-eval --output results
"""


class Target(StrEnum):
    """Whose files are written."""

    LM_EVAL = "lm-eval"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    to: Annotated[Target, typer.Option("--to", help="Whose files to write.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where to.  [default: a folder in DIR]")
    ] = None,
) -> None:
    """Write a run as other tools keep results.

    lm-eval: a results file a scheme and its samples, as `lm_eval --output_path --log_samples` writes them.
    """
    from kvbench.report.to_lm_eval import export as exported
    from kvbench.results import NotARunError

    try:
        written = exported(folder, output or folder / to.value)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (OSError, ValueError) as error:
        fail(error, BAD_INPUT)
    results = [path for path in written if path.name.startswith("results_")]
    say(*map(str, results), f"{len(results)} results, {len(written) - len(results)} files of samples")
