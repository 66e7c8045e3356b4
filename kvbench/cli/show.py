"""`kvbench show`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.cli.shared import BAD_INPUT, NOTHING_TO_COMPARE, AsList, ListFormat, fail, say, width

if TYPE_CHECKING:
    from kvbench.report.flips import Flip, Flips

DOCUMENTS = 5


EXAMPLES = """\
kvbench show out/mine dtype=int4* task=gsm8k
kvbench show out/mine dtype=int8 --documents 20 --data DIR
"""


def show(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run folder, or a cell's: DIR/cells/NAME.", show_default=False)
    ],
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=PATTERN]...", help="Cells that match, such as dtype=int4* task=gsm8k.", show_default=False
        ),
    ] = None,
    documents: Annotated[
        int, typer.Option("--documents", metavar="N", min=0, help="Of each cell, so many in full.")
    ] = DOCUMENTS,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The data sets' rows, for the prompts.  [default: KVBENCH_DATA]"),
    ] = None,
    as_format: AsList = ListFormat.TABLE,
) -> None:
    """Show the documents whose score moved against the baseline.

    Each with what it asks, what is right, and what was said under the baseline and under the cell's scheme. JSON has
    all of them.
    """
    from kvbench.measured import read
    from kvbench.report.flips import NotComparableError, choose, flips, named
    from kvbench.results import NotARunError

    try:
        if which or not (folder / "record.json").is_file():
            measured = read(folder)
            cells = choose(measured, which or ())
        else:
            measured, cell = named(folder)
            cells = [cell]
        found = [flips(measured, cell) for cell in cells]
    except (NotARunError, NotComparableError) as error:
        fail(error, NOTHING_TO_COMPARE)
    except (FileNotFoundError, ValueError) as error:
        fail(error, BAD_INPUT)
    answered = [one for one in found if one.shares]
    texts = _texts(answered, data, documents if as_format == ListFormat.TABLE else 1)
    if as_format == ListFormat.JSON:
        print(json.dumps([_row(one, flip, texts) for one in found for flip in one.rows], indent=1))
        return
    for one in answered or found:
        say(*_lines(one, documents, texts), "")


def _texts(found: Sequence[Flips], data: Path | None, documents: int) -> dict[str, Any]:
    """By task: what its documents ask, or why that is not known."""
    from kvbench.files import named_path

    given = data or (named_path(os.environ["KVBENCH_DATA"]) if os.environ.get("KVBENCH_DATA") else None)
    known: dict[str, Any] = {}
    for one in found:
        if one.rows and documents and one.cell.task not in known:
            from kvbench.tasks import of_identity

            try:
                known[one.cell.task] = of_identity(one.cell.identity["task"], given).texts()
            except (ValueError, ImportError) as error:
                known[one.cell.task] = f"not shown: {error}"
            except Exception as error:  # code of lm-eval's tasks, some of which asks for a tokenizer
                known[one.cell.task] = f"not shown: {type(error).__name__}: {error}"
    return known


def _text(one: Flips, flip: Flip, texts: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """What a document asks, what is right, and the choices."""
    known = texts.get(one.cell.task)
    if not isinstance(known, dict):
        return str(known or "-"), "-", ()
    text = known.get((flip.task, flip.doc_id))
    if text is None or (text.doc_hash and not text.doc_hash.startswith(flip.doc_hash)):
        return "not shown: the rows here are others than those that were measured", "-", ()
    return text.prompt, text.target, text.choices


def _row(one: Flips, flip: Flip, texts: dict[str, Any]) -> dict[str, Any]:
    prompt, target, choices = _text(one, flip, texts)
    places = {key: getattr(one.cell, key) for key in ("model", "dtype", "rotation")}
    return {**places, **asdict(flip), "prompt": prompt, "target": target, "choices": list(choices)}


def _lines(one: Flips, documents: int, texts: dict[str, Any]) -> list[str]:
    """A title, and some documents in full, each with all of its metrics that moved."""
    lines = [one.title]
    moved: dict[tuple[str, str], list[Flip]] = {}
    for flip in one.rows:
        moved.setdefault((flip.task, flip.doc_id), []).append(flip)
    for rows in list(moved.values())[:documents]:
        first = rows[0]
        scores = ", ".join(f"{flip.metric} {flip.before:g} → {flip.after:g}" for flip in rows)
        lines += ["", f"document {first.doc_id} · {first.task or one.cell.task} · {scores}"]
        prompt, target, choices = _text(one, first, texts)
        lines += _field("prompt", prompt)
        lines += _field("choices", *(f"{place}  {choice}" for place, choice in enumerate(choices))) if choices else []
        lines += _field("target", target)
        lines += _field(
            " · ".join(one.base.scheme), *{flip.baseline_answer: None for flip in rows}, first.baseline_said
        )
        lines += _field(" · ".join(one.cell.scheme), *{flip.answer: None for flip in rows}, first.said)
    if len(moved) > documents:
        lines += ["", f"{documents} of {len(moved)} documents; --documents {len(moved)} shows all"]
    return lines


def _field(name: str, *values: str) -> list[str]:
    """A name, and below it its lines."""
    from kvbench.render.text import wrapped

    indented = [f"    {line}" for value in values if value for line in value.strip().split("\n") if line.strip()]
    return [f"  {name}", *(part for line in indented for part in wrapped(line, width()))]
