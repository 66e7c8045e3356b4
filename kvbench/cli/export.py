"""`kvbench export`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, UNUSABLE, fail, fail_to_write, say, writable_path

EXAMPLES = """\
kvbench export out/mine --to lm-eval                   # into out/mine/lm-eval
kvbench export out/mine --to eee --output datastore
kvbench export out/mine --to wandb                     # or mlflow; WANDB_MODE=offline keeps it here
"""


class Target(StrEnum):
    """Whose files are written."""

    LM_EVAL = "lm-eval"
    EEE = "eee"
    MLFLOW = "mlflow"
    WANDB = "wandb"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)],
    to: Annotated[Target, typer.Option("--to", help="Whose files to write.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", parser=writable_path, help="Where to.  [default: a folder in DIR]"),
    ] = None,
) -> None:
    """Write a run as other tools keep results.

    lm-eval: a results file a scheme and its samples, as `lm_eval --output_path --log_samples` writes them. eee: the
    schema of Every Eval Ever, a file a scheme, which `every_eval_ever validate` accepts. mlflow, wandb: a run a scheme
    and model, its metrics as task/metric, with the report. MLflow's go to --output, else to MLFLOW_TRACKING_URI, else
    into DIR; wandb's to its server, or with WANDB_MODE=offline into DIR.
    """
    from kvbench.report import to_eee, to_lm_eval, to_mlflow, to_wandb
    from kvbench.report.tracked import TrackerError
    from kvbench.results import NotARunError

    try:
        if to in (Target.MLFLOW, Target.WANDB):
            say(*{Target.MLFLOW: to_mlflow.export, Target.WANDB: to_wandb.export}[to](folder, output))
            _tell_what_is_left_out(folder)
            return
        written = {Target.LM_EVAL: to_lm_eval.export, Target.EEE: to_eee.export}[to](
            folder, output or folder / to.value
        )
    except NotARunError as error:
        fail(error, NOTHING_TO_COMPARE)
    except TrackerError as error:
        fail(error, UNUSABLE)
    except OSError as error:
        fail_to_write(error, output or folder)
    except ValueError as error:
        fail(error, BAD_INPUT)
    results = [path for path in written if path.suffix == ".json"]
    samples = f", {len(written) - len(results)} files of samples" if len(written) > len(results) else ""
    say(*map(str, results), f"{len(results)} results{samples}")
    _tell_what_is_left_out(folder)


def _tell_what_is_left_out(folder: Path) -> None:
    """On stderr a line for each file that can't be read, and one for cells that were not run."""
    from kvbench import measured

    for fault in measured.read(folder).faults:
        say(fault, to=sys.stderr)
