"""`kvbench doctor`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvbench.cli.shared import GATE_FAILED, UNUSABLE, print_rows


def doctor(
    parity: Annotated[
        str | None,
        typer.Option(
            "--parity",
            metavar="MODEL",
            help="Instead, write a model's own keys and values with the kernels, and compare them to the byte.",
        ),
    ] = None,
) -> None:
    """Say what this machine lacks to run kvbench."""
    from kvbench import environment
    from kvbench.runners import catalog

    if parity is not None:
        _print_parity(parity)
        return
    checks = [*environment.doctor(), *catalog.doctor()]
    print_rows(("", "", "", ""), [(check.status, check.name, check.detail, check.todo) for check in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(UNUSABLE)


def _print_parity(name: str) -> None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    from kvbench.runners import catalog
    from kvbench.runners.parity import parity
    from kvbench.runners.transformers import TransformersModel
    from kvbench.tasks import text

    gpu = torch.cuda.is_available()
    try:
        source = catalog.resolve(name)
        # the interpreter gets bf16 wrong, and takes milliseconds a program
        loaded = TransformersModel.load(source, "bfloat16" if gpu else "float16", "cuda" if gpu else "cpu")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--parity") from None
    tokens = loaded.tokenizer.encode(text.builtin().text[:20000])[: 2048 if gpu else 16]
    where = torch.cuda.get_device_name() if gpu else "interpreted"
    print(
        f"{source.name} · {loaded.info.compute_dtype} · {len(tokens)} tokens · kernels {where}, definitions on the CPU"
    )
    rows = []
    for one in parity(loaded, tokens):
        verdict = (
            "equal" if not one.wrong_rows else f"{one.wrong_rows} differ, the first in layer {one.first_wrong_layer}"
        )
        rows.append((one.dtype, one.rotation, str(one.layers), str(one.rows), verdict))
        print(f"{one.dtype} · {one.rotation}   {verdict}", file=sys.stderr)
    print_rows(("dtype", "rotation", "layers", "rows", "bytes"), rows)
    if any(row[-1] != "equal" for row in rows):
        raise typer.Exit(GATE_FAILED)
