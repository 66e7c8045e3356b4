"""`kvbench kernel`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbench.cli.shared import BAD_INPUT, GATE_FAILED, TABLE, UNUSABLE, Format, Wide, fail, say, show, writable_path


class Operation(StrEnum):
    """What a kernel does."""

    DECODE = "decode"
    PREFILL = "prefill"
    WRITE = "write"
    MIXED = "mixed"


EXAMPLES = """\
kvbench kernel --dtype int4 --context 1k..32k
kvbench kernel configs/kernels.yaml --output out/kernels
"""


def kernel(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Grids from a YAML file, instead of options.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="NAME", help="A dtype, or KEY:VALUE; repeatable.  [default: all]"),
    ] = None,
    rotation: Annotated[
        list[str] | None,
        typer.Option("--rotation", metavar="NAME", help="A rotation; repeatable.  [default: each dtype's own]"),
    ] = None,
    op: Annotated[
        Operation, typer.Option("--op", help="One new token a sequence, many, a mixture; or writing to the cache.")
    ] = Operation.DECODE,
    batch: Annotated[str, typer.Option(metavar="GRID", help="Sequences (for write: tokens), 1,8 or 1..64.")] = "1,8,32",
    context: Annotated[str, typer.Option(metavar="GRID", help="Tokens of a sequence, 8k,32k or 1k..32k.")] = "8k,32k",
    prefix: Annotated[
        str | None, typer.Option(metavar="N", help="Of these, tokens cached before a prefill: 28k.")
    ] = None,
    heads: Annotated[str, typer.Option(metavar="QUERY/KV", help="Heads.")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="CONFIG", help="Heads and head_dim of a model's config.json.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also time torch, and FlashInfer and vLLM where installed.")
    ] = True,
    timed: Annotated[bool, typer.Option("--timed", help="Exit 4 where there is no GPU to time on.")] = False,
    as_format: Format = TABLE,
    wide: Wide = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", parser=writable_path, help="Also keep the rows there, as cells of a run folder."
        ),
    ] = None,
) -> None:
    """Check the attention kernels, and time them on a GPU.

    Each shape is first compared with plain torch, attention in float64 and writing to the byte; no time is shown where
    that fails. Without a GPU only the comparison runs, at a small size in Triton's interpreter.
    """
    import torch

    if not torch.cuda.is_available():
        if timed:
            fail("there is no GPU here to time on; without --timed the correctness gates run", UNUSABLE)
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is first imported
    from kvbench.dtypes import all_dtypes
    from kvbench.environment import describe
    from kvbench.results import Store
    from kvbench.timing import KernelRequest, Shape, as_record, document, load_requests, parse_grid, run, shape_of_model

    def numbers(option: str, text: str) -> tuple[int, ...]:
        try:
            return parse_grid(text)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None

    try:
        gpu = torch.cuda.is_available()
        if output and (foreign := Store(output).foreign):
            raise ValueError(f"{output} {foreign}; --output takes a run folder, or a new one")
        if config:
            _refuse(ctx, KERNEL_GRID, f"{config} states the grids")
            requests = load_requests(config)
        else:
            if model:
                _refuse(ctx, ("heads", "head_dim"), "--model states the heads")
            if prefix and op.value not in ("prefill", "mixed"):
                raise ValueError("--prefix is of a prefill: add --op prefill or --op mixed")
            query_heads, _, kv_heads = heads.partition("/")
            if not (query_heads.isdigit() and kv_heads.isdigit()):
                raise ValueError(f"heads are QUERY/KV, such as 32/8, not '{heads}'")
            cached = numbers("--prefix", prefix) if prefix else (0,)
            if len(cached) > 1:
                raise ValueError(f"--prefix is one number, such as 28k, not '{prefix}'")
            given = Shape(int(query_heads), int(kv_heads), head_dim, page_size)
            shape = shape_of_model(model, page_size) if model else given
            # those that fit; and Triton's interpreter gets bf16 wrong
            every = [
                name
                for name, one in all_dtypes().items()
                if name != "auto" and (gpu or name != "bf16") and shape.head_dim % one.head_dim_multiple == 0
            ]
            requests = [
                KernelRequest(
                    dtypes=tuple(dtype or every),
                    rotations=tuple(rotation or ()),
                    op=op.value,
                    batches=numbers("--batch", batch),
                    contexts=numbers("--context", context),
                    shape=shape,
                    prefix=cached[0],
                    peers=peers,
                )
            ]
        for request in requests:
            request.check(gpu)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error, BAD_INPUT)
    except ValueError as error:
        fail(error, BAD_INPUT)
    environment = {**describe(), "device": "cuda" if torch.cuda.is_available() else "cpu"}

    def keep(row: dict[str, Any]) -> None:
        say(_progress(row), to=sys.stderr)
        if output and row["rel_error"] is not None:  # a refused row has nothing to keep
            Store(output).save(*as_record(row, environment))

    try:
        with Store(output).writing() if output else nullcontext():
            done = [run(request, keep) for request in requests]
    except BlockingIOError:
        fail(f"another process is writing to {output}", UNUSABLE)
    except OSError as error:
        if not output:
            raise
        fail(f"cannot write to {output}: {error.strerror or error}", UNUSABLE)
    except ValueError as error:
        fail(error, BAD_INPUT)
    show(document(done), as_format, wide)
    if output:
        say(str(output), to=sys.stdout if as_format == TABLE else sys.stderr)
    if not all(timings.passed for timings in done):
        raise typer.Exit(GATE_FAILED)


# what a file of grids states by itself
KERNEL_GRID = (
    "dtype",
    "rotation",
    "op",
    "batch",
    "context",
    "prefix",
    "heads",
    "head_dim",
    "page_size",
    "model",
    "peers",
)


def _refuse(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises ValueError where one of these options was given: it would be ignored."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, one in sources.items() if one and one.name != "DEFAULT"]
    if given:
        raise ValueError(f"{why}: leave out {', '.join(given)}")


def _progress(row: dict[str, Any]) -> str:
    """One line of a kernel's row, as it is done."""
    took = "" if row["us"] is None else f"   {row['us']:.1f} µs"
    return f"{row['op']} · {row['dtype']} · {row['rotation']} · batch {row['batch']}   {row['gate']}{took}"
