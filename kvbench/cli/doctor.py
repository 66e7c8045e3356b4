"""`kvbench doctor`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvbench.cli.shared import GATE_FAILED, UNUSABLE, Address, AsList, ListFormat, fail, print_list, print_rows

if TYPE_CHECKING:
    from kvbench.environment import Check


EXAMPLES = """\
kvbench doctor
kvbench doctor --keys smollm2-135m-instruct
"""


def doctor(
    parity: Annotated[
        str | None,
        typer.Option(
            "--parity",
            metavar="MODEL",
            help="Instead, write a model's own keys and values with the kernels, and compare them to the byte.",
        ),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            "--keys",
            metavar="MODEL",
            help="Instead, show how a model's own keys and values are spread, and what a low-bit cache makes of them.",
        ),
    ] = None,
    executor: Annotated[
        Literal["ray"] | None,
        typer.Option("--executor", help="Instead, say what a Ray cluster has, and what its nodes lack."),
    ] = None,
    address: Address = None,
    as_format: AsList = ListFormat.TABLE,
) -> None:
    """Say what this machine lacks to run kvbench.

    ok; absent: kvbench also runs without it; warn: something will not go as one thinks; fail: nothing runs.
    """
    from kvbench import environment
    from kvbench.runners import catalog

    if parity is not None:
        _print_parity(parity)
        return
    if keys is not None:
        _print_keys(keys, as_format)
        return
    checks = _of_cluster(address) if executor else [*environment.doctor(), *catalog.doctor()]
    if as_format == ListFormat.JSON:
        print_list([asdict(check) for check in checks], as_format)
    else:
        rows = [(one.status, one.name, f"{one.detail}: {one.todo}" if one.todo else one.detail) for one in checks]
        print_rows(("", "", ""), rows)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(UNUSABLE)


def _of_cluster(address: str | None) -> list[Check]:
    from kvbench.sweep.executors import ray
    from kvbench.sweep.stopping import UnusableError

    try:
        return ray.doctor(address)
    except UnusableError as error:
        fail(error, UNUSABLE)


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


def _print_keys(name: str, as_format: ListFormat) -> None:
    import torch

    from kvbench.environment import describe
    from kvbench.runners import catalog
    from kvbench.runners.keys import key_spreads, prediction, sample, table
    from kvbench.runners.transformers import TransformersModel

    gpu = torch.cuda.is_available()
    try:
        loaded = TransformersModel.load(
            catalog.resolve(name), "bfloat16" if gpu else "float32", "cuda" if gpu else "cpu"
        )
        calibration, tokens = sample(loaded)
        layers = key_spreads(loaded, tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--keys") from None
    info = loaded.info
    if as_format == ListFormat.JSON:
        record = {
            "command": f"kvbench doctor --keys {name} --format json",
            "model": {"name": info.name, "revision": info.revision, "compute_dtype": info.compute_dtype},
            "calibration": calibration.identity(),
            "prediction": prediction(layers),
            "layers": [asdict(one) for one in layers],
            "environment": describe(),
        }
        print(json.dumps(record, indent=1))
        return
    print(f"{info.name} · {info.compute_dtype} · {len(tokens)} tokens of the calibration text")
    heads, rows = table(layers)
    print_rows(heads, rows, numeric=range(len(heads)))
    print("|mean|: the largest of a channel. std, kurtosis: without the channels' means.")
    print("noise: of int4 keys, in std; rot.: under a Hadamard rotation; cent.: centred.")
    print(prediction(layers))
