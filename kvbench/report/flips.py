"""`kvbench show`: the documents whose score moved against the baseline, with both answers. Imports no torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.measured import Cell, Measured, Series, read
from kvbench.report.compare import reasons
from kvbench.results import NotARunError, Store, describe, shown_number

if TYPE_CHECKING:
    import pandas as pd


class NotComparableError(ValueError):
    """A cell without a baseline cell over the same documents."""


@dataclass(frozen=True)
class Flip:
    """One document whose score moved. before, after: the baseline's score and the cell's.

    *_answer: what counted of what was said; *_said: all of that, where it is a text.
    """

    task: str
    doc_id: str
    doc_hash: str
    metric: str
    before: float
    after: float
    baseline_answer: str
    answer: str
    baseline_said: str
    said: str


@dataclass(frozen=True)
class Flips:
    """The flips of one cell against a baseline's.

    shares: its metrics of single answers, others have none; documents: how many each is over.
    """

    cell: Cell
    base: Cell
    shares: list[str]
    rows: list[Flip]

    @property
    def title(self) -> str:
        """Cell and baseline, and how many of how many documents flipped."""
        counts = [
            f"{name} {sum(row.metric == name for row in self.rows)} of {len(self.cell.series[name].values)}"
            for name in self.shares
        ]
        names = " against ".join(" · ".join(one.scheme) for one in (self.cell, self.base))
        what = ", ".join(counts) or "no metric of single answers"
        return f"{self.cell.model} · {self.cell.task} · {names}: {what}"


KEYS = ("model", "dtype", "rotation", "task")


def choose(measured: Measured, patterns: Sequence[str]) -> list[Cell]:
    """The cells that match a KEY=PATTERN of each key given; controls and the baseline only where no other does.

    Raises:
        ValueError: another form or key, or no such cell; the message lists what there is.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for text in patterns:
        key, equals, pattern = text.partition("=")
        if not equals or key not in KEYS or not pattern:
            raise ValueError(f"'{text}': expected KEY=PATTERN with KEY one of {', '.join(KEYS)}, such as dtype=int4*")
        if not any(_matches(cell, key, pattern) for cell in measured.cells):
            there = ", ".join(sorted({getattr(cell, key) for cell in measured.cells}))
            raise ValueError(f"{text} matches no cell; there are {there}")
        wanted[key].append(pattern)
    found = [
        cell
        for cell in measured.cells
        if all(any(_matches(cell, key, one) for one in some) for key, some in wanted.items())
    ]
    usual = [cell for cell in found if not cell.control and cell.scheme != measured.baseline]
    if not found:
        raise ValueError(f"no cell matches all of {' '.join(patterns)}")
    return usual or found


def _matches(cell: Cell, key: str, pattern: str) -> bool:
    """Whether a cell is meant; a dtype's name may be short, and a hub id its last part."""
    name: str = getattr(cell, key)
    short = {name, name.rsplit("/", 1)[-1], *([re.sub("_per_[a-z_]+", "", name)] if key == "dtype" else [])}
    return any(fnmatchcase(one, pattern) for one in short)


def named(path: Path) -> tuple[Measured, Cell]:
    """The cell in a folder `DIR/cells/NAME`, and its run.

    Raises:
        FileNotFoundError, NotARunError: no such cell.
    """
    folder = path.resolve()
    if not (folder / "record.json").is_file() or folder.parent.name != "cells":
        raise FileNotFoundError(f"{path} is neither a run folder nor a cell's, DIR/cells/NAME")
    measured = read(folder.parents[1])
    cell = next((one for one in measured.cells if one.name == folder.name), None)
    if cell is None:
        raise NotARunError(_absence(Store(measured.path), folder.name))
    return measured, cell


def flips(measured: Measured, cell: Cell) -> Flips:
    """The flips of a cell; of shares alone, for other metrics have no answers.

    Raises:
        NotARunError: answers that can't be read.
        NotComparableError: the baseline's documents are not the cell's.
    """
    base = _baseline(measured, cell)
    store = Store(measured.path)
    here, there = _answers(store, cell), _answers(store, base)
    shares = [name for name, one in cell.series.items() if one.metric.kind == "share" and name in base.series]
    rows = []
    for name in shares:
        hashes = {document[:3]: document[3] for document in cell.series[name].documents}
        for key, before, after in moved(cell.series[name], base.series[name]):
            (old, old_said), (new, said) = there[key], here[key]
            rows.append(Flip(key[0], key[1], hashes[key], name, before, after, old, new, old_said, said))
    return Flips(cell, base, shares, rows)


def _absence(store: Store, cell: str) -> str:
    """Why a cell has no documents to list."""
    contents = store.load()
    record = contents.records.get(cell)
    if record is None:
        return next(line for line in contents.problems if f"/{cell}: " in line)
    return f"{cell} " + ("is of a kernel, which reads no documents" if record.kernel else f"failed: {record.error}")


def _baseline(measured: Measured, cell: Cell) -> Cell:
    scheme = cell.repeats if cell.again else measured.baseline
    same = [one for one in measured.cells if one.scheme == scheme and one.task == cell.task]
    base = next((one for one in same if one.key == cell.key), None)
    if base is cell:
        others = [one.name for one in measured.cells if one.key == cell.key and one is not cell and not one.control]
        instead = (
            f"pass a cell that is compared with it, such as {others[0]}"
            if others
            else "the sweep has no other finished cell of its task"
        )
        raise NotComparableError(f"{cell.name} is the baseline itself, whose answers moved nowhere: {instead}")
    if base is None:
        raise NotComparableError(f"{cell.name}: the sweep has no baseline cell to compare it with")
    if wrong := reasons(cell, base):
        raise NotComparableError(f"{cell.name}: {'; '.join(wrong)}")
    return base


def moved(series: Series, base: Series) -> list[tuple[tuple[str, str, str], float, float]]:
    """Each document whose number is another, with the baseline's and this one's."""
    triples = zip(series.documents, base.values, series.values, strict=True)
    return [(doc[:3], float(before), float(after)) for doc, before, after in triples if before != after]


def _answers(store: Store, cell: Cell) -> dict[tuple[str, str, str], tuple[str, str]]:
    """What counted of what the model said of each document, and all of it."""
    samples: pd.DataFrame = store.samples(cell.name)
    rows: list[dict[str, Any]] = samples.to_dict("records")  # type: ignore[assignment]
    try:
        return {
            (str(row.get("task", "")), str(row["doc_id"]), str(row["filter"])): (answer(row), _said(row))
            for row in rows
        }
    except (TypeError, ValueError, LookupError) as error:
        file = store.cells / cell.name / "samples.parquet"
        raise NotARunError(f"{file} holds answers that cannot be read ({describe(error)})") from None


def _said(row: dict[str, Any]) -> str:
    """All that a sample's answer says, where it is a text."""
    return "\n".join(map(str, row["resps"])) if row.get("resps") is not None else ""


def answer(row: dict[str, Any]) -> str:
    """A sample's answer, for a person."""
    if row.get("resps") is not None:
        said = row.get("filtered_resps")
        texts = row["resps"] if said is None else said
        return " | ".join(repr(str(text)) for text in texts)
    if row.get("logprobs") is not None:
        logprobs = [float(logprob) for logprob in row["logprobs"]]
        if len(logprobs) == 1:
            likely = "the most likely answer" if row["greedy"][0] else "not the most likely answer"
            return f"{likely}, log-likelihood {shown_number(logprobs[0])}"
        return f"log-likelihoods of the choices {', '.join(shown_number(logprob) for logprob in logprobs)}"
    return "-"
