"""`kvbench ls`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import typer

from kvbench.cli.shared import BAD_INPUT, AsList, ListFormat, Wide, epilog, fail, print_list, print_rows, say

ls = typer.Typer(
    name="ls",
    help="List dtypes, rotations, schemes, tasks or models.",
    epilog=epilog("kvbench ls dtypes\nkvbench ls tasks gsm*"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@ls.command("dtypes", epilog=epilog("kvbench ls dtypes --format json"))
def ls_dtypes(as_format: AsList = ListFormat.TABLE, wide: Wide = False) -> None:
    """KV-cache dtypes, with their true bits a value at head_dim 128."""
    from kvbench.dtypes import all_dtypes

    rows = [
        {
            "name": dtype.name,
            "bits_per_value": None if dtype.name == "auto" else dtype.bits_per_value(128),
            "granularity": dtype.granularity,
            "default_rotation": dtype.default_rotation,
            "source": dtype.source,
        }
        for dtype in all_dtypes().values()
    ]
    print_list(rows, as_format, {"bits_per_value": "model's own"}, wide)


@ls.command("rotations", epilog=epilog("kvbench ls rotations"))
def ls_rotations(as_format: AsList = ListFormat.TABLE, wide: Wide = False) -> None:
    """What prepares rows: rotations, and what learns from a text. `center+hadamard` is one after the other."""
    from kvbench.transforms import all_transforms

    rows = [
        {
            "name": one.name,
            "for": "keys" if one.keys_only else "keys and values",
            "learns": "yes" if one.learns else "no",
            "kernels": "yes" if one.lower(128) else "no",
            "source": one.source,
        }
        for one in all_transforms().values()
    ]
    print_list(rows, as_format, wide=wide)


@ls.command("schemes", epilog=epilog("kvbench ls schemes --wide"))
def ls_schemes(as_format: AsList = ListFormat.TABLE, wide: Wide = False) -> None:
    """Schemes by name, with their true bits a value of 8192 tokens at head_dim 128."""
    import torch

    from kvbench.presets import all_presets
    from kvbench.schemes import Scheme

    schemes = [(preset, Scheme.parse(preset.name)) for preset in all_presets().values()]
    rows = [
        {
            "name": preset.name,
            "bits_per_value": scheme.nbytes([(1, 128)], 8192, torch.bfloat16) / 8192 / 32,
            **scheme.columns(),
            "source": preset.source,
        }
        for preset, scheme in schemes
    ]
    print_list(sorted(rows, key=lambda row: -row["bits_per_value"]), as_format, wide=wide)


@ls.command("tasks", epilog=epilog("kvbench ls tasks gsm*"))
def ls_tasks(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="Those that match, such as gsm*.", show_default=False)
    ] = "*",
    as_format: AsList = ListFormat.TABLE,
    wide: Wide = False,
) -> None:
    """Tasks: kvbench's own first, then lm-eval's."""
    from dataclasses import asdict

    from kvbench.tasks import list_tasks

    found = [asdict(task) for task in list_tasks() if fnmatchcase(task.name, pattern)]
    if not found:
        fail(f"no task matches {pattern}; * and ? stand for letters, as in *gsm*", BAD_INPUT)
    print_list(found, as_format, wide=wide)


@ls.command("models", epilog=epilog("kvbench ls models"))
def ls_models(as_format: AsList = ListFormat.TABLE, wide: Wide = False) -> None:
    """Models that this machine knows by name. A folder, a .gguf file, a .json configuration or a hub id is one too."""
    from kvbench.runners.facts import list_models

    rows = list_models()
    if as_format == ListFormat.JSON:
        print_list(rows, as_format, wide=wide)
        return
    heads = ("name", "installed", "license", "size\nMB", "KV KiB\na token", "longest", "source")
    shown = [
        (
            row["name"],
            "yes" if row["available"] else "no",
            row["license"] or "-",
            f"{row['size_bytes'] / 1e6:.0f}",
            f"{row['kv_bytes_per_token'] / 1024:.1f}",
            str(row["max_length"]),
            row["source"],
        )
        for row in rows
    ]
    print_rows(heads, shown, (3, 4, 5), wide)
    if missing := [f"{row['name']}: {row['missing']}" for row in rows if row["missing"]]:
        say("", *missing)
