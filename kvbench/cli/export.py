"""`kvbench export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, fail, say

EXAMPLES = """\
kvbench export out/mine --to lm-eval                   # into out/mine/lm-eval
kvbench export out/mine --to eee --output datastore
"""


class Target(StrEnum):
    """Whose files are written."""

    LM_EVAL = "lm-eval"
    EEE = "eee"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    to: Annotated[Target, typer.Option("--to", help="Whose files to write.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where to.  [default: a folder in DIR]")
    ] = None,
) -> None:
    """Write a run as other tools keep results.

    lm-eval: a results file a scheme and its samples, as `lm_eval --output_path --log_samples` writes them. eee: the
    schema of Every Eval Ever, a file a scheme, which `every_eval_ever validate` accepts.
    """
    from kvbench.report import to_eee, to_lm_eval
    from kvbench.results import NotARunError

    exported = {Target.LM_EVAL: to_lm_eval.export, Target.EEE: to_eee.export}[to]
    try:
        written = exported(folder, output or folder / to.value)
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except (OSError, ValueError) as error:
        fail(error, BAD_INPUT)
    results = [path for path in written if path.suffix == ".json"]
    samples = f", {len(written) - len(results)} files of samples" if len(written) > len(results) else ""
    say(*map(str, results), f"{len(results)} results{samples}")
