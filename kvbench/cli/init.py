"""`kvbench init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, fail, fail_to_write, say, writable_path

EXAMPLES = """\
kvbench init smollm2-135m-instruct
kvbench init Qwen/Qwen3-4B --output sweeps/qwen3.yaml
"""


def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a hub id, a folder or a file.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", parser=writable_path, help="The YAML to write.  [default: MODEL.yaml]"
        ),
    ] = None,
) -> None:
    """Write a first sweep of MODEL, a commented YAML.

    What the model and this machine say goes into it: contexts as long as the model takes, sizes for a GPU or a CPU. It
    never replaces a file.
    """
    from kvbench.sweep.first import write_first
    from kvbench.sweep.schema import schema

    try:
        written = write_first(model, output, schema())
    except FileExistsError as error:
        fail(f"{error.filename} is there already, and stays as it is; --output names another", BAD_INPUT)
    except ValueError as error:
        fail(error, BAD_INPUT)
    except OSError as error:
        fail_to_write(error, output or Path.cwd())
    say(*map(str, written), f"next: kvbench plan {written[0]}")
